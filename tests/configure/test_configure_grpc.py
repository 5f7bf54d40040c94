"""The bytes of one gRPC call: RFC 7541's own examples, answers whole and byte by byte, damaged ones, and messages against the real library."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.configure import grpc


@pytest.mark.parametrize(("code", "text"), [  # RFC 7541, C.4 and C.6
    ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"), ("a8eb10649cbf", "no-cache"), ("25a849e95ba97d7f", "custom-key"), ("25a849e95bb8e8b4bf", "custom-value"),
    ("6402", "302"), ("aec3771a4b", "private"), ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
    ("9d29ad171863c78f0b97c8e9ae82ae43d3", "https://www.example.com"),
])
def test_the_examples_of_the_standard(code: str, text: str) -> None:
    assert grpc.huffman(bytes.fromhex(code)) == text.encode()
    for short in range(1, len(code) // 2):
        try:
            assert text.encode().startswith(grpc.huffman(bytes.fromhex(code)[:short]))
        except grpc.Broken:
            pass


@pytest.mark.parametrize("code", ["00", "ffffffff", "fffffffc"])
def test_strings_that_are_none(code: str) -> None:
    with pytest.raises(grpc.Broken):
        grpc.huffman(bytes.fromhex(code))


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def field(name: str, value: str) -> bytes:
    return b"\x40" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


HEADERS = b"\x20\x88" + field("content-type", "application/grpc")  # a table of no size, status 200
MESSAGE = b"\0\0\0\0\x05hello"
GOOD = frame(4, 0, 0, b"") + frame(6, 0, 0, b"12345678") + frame(8, 0, 0, b"\0\0\1\0") + frame(1, 4, 1, HEADERS) + frame(0, 0, 1, MESSAGE[:3]) + \
    frame(0, 8, 1, b"\x02" + MESSAGE[3:] + b"\0\0") + frame(0, 0, 3, b"another call's") + frame(1, 5, 1, field("grpc-status", "0"))
REFUSED = frame(1, 5, 1, HEADERS + field("grpc-status", "2") + field("grpc-message", "no runtime for %22x%22 %E2%80%A6"))
SPLIT = frame(1, 1, 1, HEADERS[:5]) + frame(9, 0, 1, HEADERS[5:]) + frame(9, 4, 1, field("grpc-status", "13"))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(("data", "status", "words", "reply"), [
    (GOOD, 0, "", frame(4, 1, 0, b"") + frame(6, 1, 0, b"12345678")), (REFUSED, 2, 'no runtime for "x" …', b""), (SPLIT, 13, "", b"")])
def test_answers(data: bytes, status: int, words: str, reply: bytes, size: int) -> None:
    answer = grpc.Answer()
    said = b"".join(answer.feed(data[at:at + size]) for at in range(0, len(data), size))
    assert answer.done and (answer.status, answer.words, said) == (status, words, reply)
    if not status:
        assert answer.message() == b"hello"
    else:
        with pytest.raises(grpc.Broken):
            answer.message()


@pytest.mark.parametrize("data", [
    frame(7, 0, 0, b"\0\0\0\0\0\0\0\x02bye"), frame(3, 0, 1, b"\0\0\0\x08"), b"\xff\xff\xff\0\0\0\0\0\1", frame(1, 5, 1, b"\x40\x7f"), frame(1, 5, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
    frame(1, 5, 1, field("grpc-status", "no number"))])
def test_answers_that_are_none(data: bytes) -> None:
    with pytest.raises(grpc.Broken):
        grpc.Answer().feed(data)


@given(st.binary(max_size=200), st.integers(0, len(GOOD)))
def test_any_bytes(data: bytes, at: int) -> None:
    """An answer, a wait, or Broken; nothing else."""
    for text in (data, GOOD[:at] + data + GOOD[at:], data + REFUSED):
        answer = grpc.Answer()
        try:
            answer.feed(text)
            if answer.done:
                grpc.decode(answer.message())
        except grpc.Broken:
            pass


def test_messages_against_the_library() -> None:
    pb = pytest.importorskip("cri_api.v1.api_pb2")
    long = "x" * 300
    data = grpc.encode([(1, [(1, "name"), (2, "uid"), (4, 70000)]), (7, [(1, "a"), (2, long)]), (7, [(1, "b"), (2, "ü")]), (8, [(2, [(1, [(1, 2)])])])])
    config = pb.PodSandboxConfig.FromString(data)
    assert (config.metadata.name, config.metadata.attempt, dict(config.annotations)) == ("name", 70000, {"a": long, "b": "ü"})
    assert config.linux.security_context.namespace_options.network == pb.NODE
    answer = pb.ExecSyncResponse(stdout=b"out\0", exit_code=3)
    assert grpc.decode(answer.SerializeToString()) == {1: [b"out\0"], 3: [3]}
    with pytest.raises(grpc.Broken):
        grpc.decode(data[:-1])


def test_a_request_is_what_a_server_reads() -> None:
    """Its headers, by our own reader: names and values as they are, nothing in a table."""
    data = grpc.request("/runtime.v1.RuntimeService/Version", b"abc")
    assert data.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    at, frames = 24, []
    while at < len(data):
        length = int.from_bytes(data[at:at + 3], "big")
        frames.append((data[at + 3], data[at + 4], data[at + 9:at + 9 + length]))
        at += 9 + length
    assert [kind for kind, _, _ in frames] == [4, 8, 1, 0]
    assert dict(grpc.unpack(frames[2][2]))[":path"] == "/runtime.v1.RuntimeService/Version"
    assert frames[3] == (0, 1, b"\0\0\0\0\x03abc")
