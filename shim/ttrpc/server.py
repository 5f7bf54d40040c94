"""The end of a ttrpc connection that is called.

    server = Server()
    for call in server.receive(data):
        if (call.service, call.method) in known:
            server.answer(call, payload)
        else:
            server.unimplemented(call)
    send(server.take())

Sans-IO.  Unary calls only: a streaming call is answered UNIMPLEMENTED.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from shim.ttrpc import errors, frame
from shim.ttrpc.errors import ProtocolError, UsageError
from shim.ttrpc.frame import Decoder, Frame
from shim.ttrpc.messages import Request, Response

MAX_CALLS = 1024  # unanswered at one time
_REMOTE_CLOSED = 0x01  # flag: the caller sends nothing after this frame


class Call(NamedTuple):
    """A call that waits for its answer.  `timeout` in nanoseconds, 0 for none."""

    stream: int
    service: str
    method: str
    payload: bytes
    timeout: int


class Server:
    """Give it what was received, get calls; answer them; send what `take` gives."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._outgoing = bytearray()
        self._last = 0
        self._open: set[int] = set()

    def receive(self, data: bytes) -> list[Call]:
        """The calls that are complete with `data`.  Raises ProtocolError."""
        calls: list[Call] = []
        for one in self._decoder.feed(data):
            if one.kind != frame.REQUEST:
                raise ProtocolError(f"a server does not receive frames of type {one.kind}")
            if one.stream % 2 == 0 or one.stream <= self._last:
                raise ProtocolError(f"stream id {one.stream} after {self._last}: a caller's are odd and increase")
            self._last = one.stream
            if len(self._open) >= MAX_CALLS:
                self._send(one.stream, errors.RESOURCE_EXHAUSTED, f"more than {MAX_CALLS} calls at a time")
                continue
            try:
                request = Request.FromString(one.payload)
            except DecodeError:
                self._send(one.stream, errors.INVALID_ARGUMENT, "the request is no ttrpc request")
                continue
            if one.flags & ~_REMOTE_CLOSED:
                self._send(one.stream, errors.UNIMPLEMENTED, f"{request.service}/{request.method} is no stream")
                continue
            self._open.add(one.stream)
            calls.append(Call(one.stream, request.service, request.method, request.payload, request.timeout_nano))
        return calls

    def answer(self, call: Call, payload: bytes) -> None:
        """The result of a call."""
        self._close(call)
        data = Response(payload=payload).SerializeToString()
        if len(data) > frame.MAX_MESSAGE:
            self._send(
                call.stream,
                errors.RESOURCE_EXHAUSTED,
                f"the answer has {len(payload)} bytes, more than a message holds",
            )
        else:
            self._outgoing += frame.encode(Frame(call.stream, frame.RESPONSE, 0, data))

    def refuse(self, call: Call, code: int, message: str) -> None:
        """An error instead of a result."""
        self._close(call)
        self._send(call.stream, code, message)

    def unimplemented(self, call: Call) -> None:
        """The answer to a service or method that is not there."""
        self.refuse(call, errors.UNIMPLEMENTED, f"{call.service}/{call.method} is not implemented")

    def take(self) -> bytes:
        """What is to be sent; it is gone from here afterwards."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def _close(self, call: Call) -> None:
        if call.stream not in self._open:
            raise UsageError(f"the call on stream {call.stream} has its answer")
        self._open.discard(call.stream)

    def _send(self, stream: int, code: int, message: str) -> None:
        response = Response()
        response.status.code, response.status.message = code, message[: 64 << 10]
        self._outgoing += frame.encode(Frame(stream, frame.RESPONSE, 0, response.SerializeToString()))
