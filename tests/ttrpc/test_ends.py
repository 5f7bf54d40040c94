"""Client and server connected in memory, and each against a peer that breaks the protocol."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.ttrpc import client as ttrpc_client
from shim.ttrpc import errors, frame
from shim.ttrpc import server as ttrpc_server
from shim.ttrpc.client import Client
from shim.ttrpc.errors import ProtocolError, RemoteError, TtrpcError, UsageError
from shim.ttrpc.frame import REQUEST, RESPONSE, Frame
from shim.ttrpc.messages import Request, Response
from shim.ttrpc.server import Call, Server


def request(stream: int, flags: int = 0, payload: bytes | None = None) -> bytes:
    return frame.encode(
        Frame(
            stream, REQUEST, flags, Request(service="s", method="m").SerializeToString() if payload is None else payload
        )
    )


def test_a_call_and_its_answer() -> None:
    client, server = Client(), Server()
    stream = client.call("a.Service", "Do", b"in", timeout=5)
    (call,) = server.receive(client.take())
    assert call == Call(stream, "a.Service", "Do", b"in", 5)
    assert server.take() == b"" and client.take() == b""
    server.answer(call, b"out")
    (reply,) = client.receive(server.take())
    assert (reply.stream, reply.result()) == (stream, b"out")


def test_answers_may_come_in_any_order() -> None:
    client, server = Client(), Server()
    streams = [client.call("s", "m", bytes([n])) for n in range(5)]
    assert streams == [1, 3, 5, 7, 9]
    calls = server.receive(client.take())
    for call in reversed(calls):
        server.answer(call, call.payload * 2)
    assert [(reply.stream, reply.payload) for reply in client.receive(server.take())] == [
        (1 + 2 * n, bytes([n, n])) for n in reversed(range(5))
    ]


def test_an_error_reaches_its_caller_alone() -> None:
    client, server = Client(), Server()
    client.call("s", "known", b"")
    client.call("s", "unknown", b"")
    known, unknown = server.receive(client.take())
    server.unimplemented(unknown)
    server.answer(known, b"fine")
    failed, fine = client.receive(server.take())
    with pytest.raises(RemoteError, match="s/unknown is not implemented") as error:
        failed.result()
    assert error.value.code == errors.UNIMPLEMENTED
    assert fine.result() == b"fine"


def test_an_answer_that_no_message_holds_becomes_an_error() -> None:
    client, server = Client(), Server()
    client.call("s", "m", b"")
    (call,) = server.receive(client.take())
    server.answer(call, bytes(frame.MAX_MESSAGE))
    (reply,) = client.receive(server.take())
    assert reply.code == errors.RESOURCE_EXHAUSTED


def test_a_call_is_answered_once() -> None:
    client, server = Client(), Server()
    client.call("s", "m", b"")
    (call,) = server.receive(client.take())
    server.answer(call, b"")
    with pytest.raises(UsageError):
        server.refuse(call, errors.INTERNAL, "late")


def test_a_request_that_is_no_request_is_answered_and_the_next_one_served() -> None:
    server = Server()
    (call,) = server.receive(request(1, payload=b"\xff\xff") + request(3))
    assert call.stream == 3
    (answer,) = frame.Decoder().feed(server.take())
    assert answer.stream == 1 and Response.FromString(answer.payload).status.code == errors.INVALID_ARGUMENT


def test_a_stream_is_not_implemented_and_a_closed_one_is_a_plain_call() -> None:
    server = Server()
    assert [call.stream for call in server.receive(request(1, flags=2) + request(3, flags=1))] == [3]
    (answer,) = frame.Decoder().feed(server.take())
    assert answer.stream == 1 and Response.FromString(answer.payload).status.code == errors.UNIMPLEMENTED


@pytest.mark.parametrize(
    "data",
    [request(2), request(3) + request(3), request(3) + request(1), frame.encode(Frame(1, RESPONSE, 0, b""))],
    ids=["an even stream", "a stream twice", "a lower stream", "a response"],
)
def test_a_server_ends_with_a_caller_that_breaks_the_rules(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Server().receive(data)


@pytest.mark.parametrize(
    "kind, stream, payload",
    [(REQUEST, 1, b""), (RESPONSE, 3, b""), (RESPONSE, 1, b"\xff")],
    ids=["a request", "nobody asked", "no response"],
)
def test_a_client_ends_with_a_server_that_breaks_the_rules(kind: int, stream: int, payload: bytes) -> None:
    client = Client()
    client.call("s", "m", b"")
    with pytest.raises(ProtocolError):
        client.receive(frame.encode(Frame(stream, kind, 0, payload)))


def test_too_many_calls_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ttrpc_server, "MAX_CALLS", 2)
    monkeypatch.setattr(ttrpc_client, "MAX_CALLS", 3)
    client, server = Client(), Server()
    for _ in range(3):
        client.call("s", "m", b"")
    with pytest.raises(UsageError):
        client.call("s", "m", b"")
    assert len(server.receive(client.take())) == 2
    (reply,) = client.receive(server.take())
    assert reply.code == errors.RESOURCE_EXHAUSTED


@given(st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=400)), min_size=1, max_size=6), st.data())
def test_any_split_of_the_bytes_gives_the_same_calls(calls: list[tuple[str, bytes]], draw: st.DataObject) -> None:
    client, server, replies = Client(), Server(), []
    for method, payload in calls:
        client.call("s", method, payload)
    data = client.take()
    while data:
        size = draw.draw(st.integers(1, len(data)))
        for call in server.receive(data[:size]):
            server.answer(call, call.method.encode() + call.payload)
        data = data[size:]
        answers = server.take()
        cut = draw.draw(st.integers(0, len(answers)))
        replies += client.receive(answers[:cut]) + client.receive(answers[cut:])
    assert [reply.result() for reply in replies] == [method.encode() + payload for method, payload in calls]


@given(st.binary(max_size=200))
def test_arbitrary_payloads_never_break_an_end(payload: bytes) -> None:
    server, client = Server(), Client()
    for call in server.receive(request(1, payload=payload)):
        server.unimplemented(call)
    assert frame.Decoder().feed(server.take())[0].stream == 1
    client.call("s", "m", b"")
    try:
        client.receive(frame.encode(Frame(1, RESPONSE, 0, payload)))
    except TtrpcError:
        pass
