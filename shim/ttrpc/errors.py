"""The errors of a ttrpc connection, and the status codes.

After a ProtocolError the connection cannot go on, because the two ends may disagree on where a frame begins.  A
RemoteError is the answer to one call, and the connection goes on.
"""

from __future__ import annotations

# Status codes, with gRPC's numbers.
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
    """The peer sent bytes that the protocol does not allow; close the connection."""


class OversizeError(ProtocolError):
    """A message is longer than the limit.  For a received one the header tells, before memory is used."""


class UsageError(TtrpcError):
    """The code that uses this package did something that the protocol does not allow now.  Nothing is sent."""


class RemoteError(TtrpcError):
    """The peer answered a call with an error.  `code`: one of the status codes."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message or 'no reason given'} (status {code})")
        self.code = code
        self.message = message
