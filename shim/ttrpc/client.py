"""The end of a ttrpc connection that calls.

    client = Client()
    stream = client.call("some.Service", "Method", payload)
    send(client.take())
    for reply in client.receive(data):
        …  # reply.stream, reply.result()

Sans-IO.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from shim.ttrpc import errors, frame
from shim.ttrpc.errors import ProtocolError, RemoteError, UsageError
from shim.ttrpc.frame import Decoder, Frame
from shim.ttrpc.messages import Request, Response

MAX_CALLS = 1024  # unanswered at one time
_MAX_STREAM = (1 << 32) - 1


class Reply(NamedTuple):
    """The answer on a stream: `code` 0 and the payload, or an error."""

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
    """Call, send what `take` gives, give it what was received, get replies."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._outgoing = bytearray()
        self._next = 1
        self._open: set[int] = set()

    def call(self, service: str, method: str, payload: bytes, timeout: int = 0) -> int:
        """The stream id of a new call.  `timeout` in nanoseconds.  Raises UsageError or OversizeError."""
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
        """The replies that are complete with `data`.  Raises ProtocolError."""
        replies: list[Reply] = []
        for one in self._decoder.feed(data):
            if one.kind != frame.RESPONSE:
                raise ProtocolError(f"a caller does not receive frames of type {one.kind}")
            if one.stream not in self._open:
                raise ProtocolError(f"an answer on stream {one.stream}, where none is awaited")
            try:
                response = Response.FromString(one.payload)
            except DecodeError:
                raise ProtocolError(f"the answer on stream {one.stream} is no ttrpc response") from None
            self._open.discard(one.stream)
            replies.append(Reply(one.stream, response.payload, response.status.code, response.status.message))
        return replies

    def take(self) -> bytes:
        """What is to be sent; it is gone from here afterwards."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data
