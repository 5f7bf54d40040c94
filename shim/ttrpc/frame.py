"""The ttrpc frame: ten bytes of header, then the message.

      4 bytes        4 bytes     1 byte  1 byte
    +------------+-------------+-------+-------+----------------+
    | length     | stream id   | type  | flags | length bytes … |    numbers big-endian
    +------------+-------------+-------+-------+----------------+

Sans-IO: it takes bytes, in pieces of any size, and gives frames.  Source: ttrpc, PROTOCOL.md.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from shim.ttrpc.errors import OversizeError, ProtocolError

HEADER = struct.Struct(">IIBB")
MAX_MESSAGE = 4 << 20  # bytes of one message; the limit of ttrpc's Go implementation

REQUEST, RESPONSE, DATA = 1, 2, 3


class Frame(NamedTuple):
    """One frame: a message, or a part of a stream."""

    stream: int
    kind: int
    flags: int
    payload: bytes


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.  Raises OversizeError."""
    if len(frame.payload) > MAX_MESSAGE:
        raise OversizeError(f"a message of {len(frame.payload)} bytes is more than the limit of {MAX_MESSAGE}")
    return HEADER.pack(len(frame.payload), frame.stream, frame.kind, frame.flags) + frame.payload


class Decoder:
    """Cuts a stream of bytes into frames.

    After an error it raises that error again at every call, since the beginning of the next frame is unknown.
    """

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> list[Frame]:
        """Takes bytes, and returns the frames that are now complete.

        Raises ProtocolError; then complete frames in the same bytes are lost.
        """
        if self._broken is not None:
            raise self._broken
        self._buffer += data
        frames: list[Frame] = []
        at = 0
        try:
            while len(self._buffer) - at >= HEADER.size:
                length, stream, kind, flags = HEADER.unpack_from(self._buffer, at)
                self._check(length, kind)
                end = at + HEADER.size + length
                if len(self._buffer) < end:
                    break
                frames.append(Frame(stream, kind, flags, bytes(self._buffer[at + HEADER.size : end])))
                at = end
        except ProtocolError as error:
            self._broken = error
            self._buffer.clear()
            raise
        del self._buffer[:at]
        return frames

    def _check(self, length: int, kind: int) -> None:
        if length > self.limit:
            raise OversizeError(f"a frame of {length} bytes is more than the limit of {self.limit}")
        if kind not in (REQUEST, RESPONSE, DATA):
            raise ProtocolError(f"a frame of the unknown type {kind}")

    @property
    def waiting(self) -> int:
        """The number of bytes of an incomplete frame that were received so far."""
        return len(self._buffer)
