"""NRI's multiplexer: several byte streams over one socket.

      4 bytes         4 bytes
    +---------------+------------+----------------+
    | connection id | length     | length bytes … |    numbers big-endian
    +---------------+------------+----------------+

A connection is a stream of bytes: a ttrpc message may span frames, and a frame may hold several messages.  Sans-IO.
Source: NRI, pkg/net/multiplex/mux.go.
"""

from __future__ import annotations

import struct

from shim.errors import ChandlerError
from shim.ttrpc import frame

HEADER = struct.Struct(">II")
PLUGIN, RUNTIME = 1, 2  # connection ids: on 1 the runtime calls the plugin, on 2 the plugin calls the runtime
MAX_FRAME_OUT = 4096  # bytes with the header; containerd closes a connection that sends 20 kB in one frame
MAX_FRAME_IN = frame.HEADER.size + frame.MAX_MESSAGE  # bytes without the header


class MuxError(ChandlerError):
    """Bytes that no NRI peer sends; close the socket."""


def encode(connection: int, data: bytes) -> bytes:
    """`data` in frames for the connection with the id `connection`."""
    size = MAX_FRAME_OUT - HEADER.size
    parts: list[bytes] = []
    for at in range(0, len(data), size):
        part = data[at : at + size]
        parts += (HEADER.pack(connection, len(part)), part)
    return b"".join(parts)


class MuxDecoder:
    """Splits the bytes of the socket into pieces of its connections.

    It gives pieces as they come and never stores a frame, which may be large.  Once `feed` has raised an error, each
    further call raises the same.
    """

    def __init__(self) -> None:
        self._header = bytearray()
        self._connection = 0
        self._left = 0
        self._broken: MuxError | None = None

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """(connection id, bytes) of all pieces in `data`, in order.  Raises MuxError."""
        if self._broken is not None:
            raise self._broken
        pieces: list[tuple[int, bytes]] = []
        offset = 0
        while offset < len(data):
            if self._left:
                piece = data[offset : offset + self._left]
                pieces.append((self._connection, piece))
                self._left -= len(piece)
                offset += len(piece)
                continue
            missing = HEADER.size - len(self._header)
            self._header += data[offset : offset + missing]
            offset += missing
            if len(self._header) == HEADER.size:
                self._connection, self._left = HEADER.unpack(self._header)
                self._header.clear()
                if self._left > MAX_FRAME_IN:
                    self._broken = MuxError(
                        f"an NRI frame of {self._left} bytes is more than the limit of {MAX_FRAME_IN}"
                    )
                    raise self._broken
        return pieces
