"""What can go wrong on a ttrpc connection, and the status codes.

A ProtocolError is the end of a connection: the two ends no longer agree on where a frame begins.  A RemoteError is
the answer to one call; the connection lives on.
"""

from __future__ import annotations

# Status codes, as gRPC numbers them.
OK = 0
UNKNOWN = 2
INVALID_ARGUMENT = 3
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
UNIMPLEMENTED = 12
INTERNAL = 13


class TtrpcError(Exception):
    """Any error of this package."""


class ProtocolError(TtrpcError):
    """Bytes that no ttrpc peer sends; close the connection."""


class OversizeError(ProtocolError):
    """A length beyond the limit, seen before a byte was kept for it."""


class UsageError(TtrpcError):
    """The caller of this package asked for what the protocol does not allow now; nothing was sent."""


class RemoteError(TtrpcError):
    """The peer answered a call with an error: `code`, one of the status codes, and `message`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message or 'no reason given'} (status {code})")
        self.code = code
        self.message = message
