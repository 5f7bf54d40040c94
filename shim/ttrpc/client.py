"""The caller's end of a ttrpc connection.

    client = Client()
    stream = client.call("some.Service", "Method", payload)
    send(client.take())
    for reply in client.receive(data):
        …  # reply.stream, reply.result()

Sans-IO: it takes and gives bytes, and touches no socket.  Source: ttrpc, PROTOCOL.md.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from shim.ttrpc import errors, frame
from shim.ttrpc.errors import ProtocolError, RemoteError, UsageError
from shim.ttrpc.frame import Decoder, Frame
from shim.ttrpc.messages import Request, Response

MAX_CALLS = 1024  # calls without an answer at one time
_MAX_STREAM = (1 << 32) - 1


class Reply(NamedTuple):
    """The answer to the call on a stream.  `code`: 0 with a payload, or the code of an error with a message."""

    stream: int
    payload: bytes
    code: int
    message: str

    def result(self) -> bytes:
        """The payload; raises RemoteError when the peer answered with an error."""
        if self.code != errors.OK:
            raise RemoteError(self.code, self.message)
        return self.payload


class Client:
    """Makes calls.  Send the bytes that `take` gives, and pass received bytes to `receive`, which gives the replies."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._outgoing = bytearray()
        self._next = 1
        self._open: set[int] = set()

    def call(self, service: str, method: str, payload: bytes, timeout: int = 0) -> int:
        """Starts a call and returns its stream id.

        `timeout`: nanoseconds, 0 for none.  Raises UsageError or OversizeError.
        """
        if len(self._open) >= MAX_CALLS:
            raise UsageError(f"more than {MAX_CALLS} calls at a time")
        if self._next > _MAX_STREAM:
            raise UsageError("no stream id is left: open another connection")
        stream = self._next
        data = Request(service=service, method=method, payload=payload, timeout_nano=timeout).SerializeToString()
        self._outgoing += frame.encode(Frame(stream, frame.REQUEST, 0, data))
        self._next += 2
        self._open.add(stream)
        return stream

    def receive(self, data: bytes) -> list[Reply]:
        """Takes received bytes, and returns the replies that are now complete.  Raises ProtocolError."""
        replies: list[Reply] = []
        for received in self._decoder.feed(data):
            if received.kind != frame.RESPONSE:
                raise ProtocolError(f"a caller does not receive frames of type {received.kind}")
            if received.stream not in self._open:
                raise ProtocolError(f"an answer arrived on stream {received.stream}, which has no open call")
            try:
                response = Response.FromString(received.payload)
            except DecodeError:
                raise ProtocolError(f"the answer on stream {received.stream} is not a ttrpc response") from None
            self._open.discard(received.stream)
            replies.append(Reply(received.stream, response.payload, response.status.code, response.status.message))
        return replies

    def take(self) -> bytes:
        """Returns the bytes to send, and forgets them."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data
