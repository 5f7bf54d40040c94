"""NRI's multiplexer: several byte streams over one socket.

      4 bytes         4 bytes
    +---------------+------------+----------------+
    | connection id | length     | length bytes … |    numbers big-endian
    +---------------+------------+----------------+

A connection is a stream: a ttrpc message may span frames, and a frame may hold several.  Sans-IO.
Source: NRI, pkg/net/multiplex/mux.go.
"""

from __future__ import annotations

import struct
from typing import List, Optional, Tuple

from shim.errors import ChandlerError
from shim.ttrpc import frame

HEADER = struct.Struct(">II")
PLUGIN, RUNTIME = 1, 2  # connection ids: on the first the runtime calls us, on the second we call it
MAX_FRAME_OUT = 4096  # bytes with the header; containerd drops a connection that sends 20 kB in one frame
MAX_FRAME_IN = frame.HEADER.size + frame.MAX_MESSAGE  # bytes without the header


class MuxError(ChandlerError):
    """Bytes that no NRI peer sends; close the socket."""


def encode(connection: int, data: bytes) -> bytes:
    """`data` for a connection, in frames."""
    size = MAX_FRAME_OUT - HEADER.size
    parts: List[bytes] = []
    for at in range(0, len(data), size):
        part = data[at : at + size]
        parts += (HEADER.pack(connection, len(part)), part)
    return b"".join(parts)


class MuxDecoder:
    """Pieces of the connections from the bytes of the socket, given on as they come: no frame is ever collected.

    Once it has raised, it raises the same again.
    """

    def __init__(self) -> None:
        self._header = bytearray()
        self._connection = 0
        self._left = 0
        self._broken: Optional[MuxError] = None

    def feed(self, data: bytes) -> List[Tuple[int, bytes]]:
        """(connection id, bytes) in order.  Raises MuxError."""
        if self._broken is not None:
            raise self._broken
        pieces: List[Tuple[int, bytes]] = []
        at = 0
        while at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                pieces.append((self._connection, piece))
                self._left -= len(piece)
                at += len(piece)
                continue
            wanted = HEADER.size - len(self._header)
            self._header += data[at : at + wanted]
            at += wanted
            if len(self._header) == HEADER.size:
                self._connection, self._left = HEADER.unpack(self._header)
                self._header.clear()
                if self._left > MAX_FRAME_IN:
                    self._broken = MuxError(
                        f"an NRI frame of {self._left} bytes is more than the limit of {MAX_FRAME_IN}"
                    )
                    raise self._broken
        return pieces
