"""The server's end of a ttrpc connection.

    server = Server()
    for call in server.receive(data):
        if (call.service, call.method) in known:
            server.answer(call, payload)
        else:
            server.unimplemented(call)
    send(server.take())

Sans-IO: it takes and gives bytes, and touches no socket.  It has unary calls only, and answers UNIMPLEMENTED to a
streaming call.  Source: ttrpc, PROTOCOL.md.
"""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from shim.ttrpc import errors, frame
from shim.ttrpc.errors import ProtocolError, UsageError
from shim.ttrpc.frame import Decoder, Frame
from shim.ttrpc.messages import Request, Response

MAX_CALLS = 1024  # calls without an answer at one time
_REMOTE_CLOSED = 0x01  # flag: the caller sends nothing after this frame


class Call(NamedTuple):
    """A call that waits for its answer.  `timeout`: nanoseconds, 0 for none."""

    stream: int
    service: str
    method: str
    payload: bytes
    timeout: int


class Server:
    """Pass received bytes to `receive`, which gives calls; answer the calls; send the bytes that `take` gives."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._outgoing = bytearray()
        self._last = 0
        self._open: set[int] = set()

    def receive(self, data: bytes) -> list[Call]:
        """Takes received bytes, and returns the calls that are now complete.  Raises ProtocolError."""
        calls: list[Call] = []
        for received in self._decoder.feed(data):
            if received.kind != frame.REQUEST:
                raise ProtocolError(f"a server does not receive frames of type {received.kind}")
            if received.stream % 2 == 0 or received.stream <= self._last:
                raise ProtocolError(
                    f"stream id {received.stream} after {self._last}: a caller's stream ids must be odd and increase"
                )
            self._last = received.stream
            if len(self._open) >= MAX_CALLS:
                self._send(received.stream, errors.RESOURCE_EXHAUSTED, f"more than {MAX_CALLS} calls at a time")
                continue
            try:
                request = Request.FromString(received.payload)
            except DecodeError:
                self._send(received.stream, errors.INVALID_ARGUMENT, "the request is not a ttrpc request")
                continue
            if received.flags & ~_REMOTE_CLOSED:
                self._send(received.stream, errors.UNIMPLEMENTED, f"{request.service}/{request.method} does not stream")
                continue
            self._open.add(received.stream)
            calls.append(Call(received.stream, request.service, request.method, request.payload, request.timeout_nano))
        return calls

    def answer(self, call: Call, payload: bytes) -> None:
        """Answers a call with its result.  Raises UsageError when it has an answer already."""
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
        """Answers a call with an error.  Raises UsageError when it has an answer already."""
        self._close(call)
        self._send(call.stream, code, message)

    def unimplemented(self, call: Call) -> None:
        """Answers a call of a service or method that does not exist."""
        self.refuse(call, errors.UNIMPLEMENTED, f"{call.service}/{call.method} is not implemented")

    def take(self) -> bytes:
        """Returns the bytes to send, and forgets them."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def _close(self, call: Call) -> None:
        if call.stream not in self._open:
            raise UsageError(f"the call on stream {call.stream} has an answer already")
        self._open.discard(call.stream)

    def _send(self, stream: int, code: int, message: str) -> None:
        response = Response()
        response.status.code, response.status.message = code, message[: 64 << 10]
        self._outgoing += frame.encode(Frame(stream, frame.RESPONSE, 0, response.SerializeToString()))
