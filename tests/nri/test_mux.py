"""NRI's multiplexer: vectors, splits, interleaving, and lengths beyond the limit."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.nri import mux
from shim.nri.mux import MAX_FRAME_IN, MAX_FRAME_OUT, MuxDecoder, MuxError

VECTORS = {
    "connection 1": (1, b"abc", "00000001 00000003 616263"),
    "connection 2": (2, b"\0", "00000002 00000001 00"),
    "a high connection": (0xFFFFFFFE, b"x", "fffffffe 00000001 78"),
}


def joined(pieces: list[tuple[int, bytes]]) -> dict[int, bytes]:
    streams: dict[int, bytes] = {}
    for connection, piece in pieces:
        streams[connection] = streams.get(connection, b"") + piece
    return streams


@pytest.mark.parametrize("connection, data, text", VECTORS.values(), ids=VECTORS)
def test_vectors(connection: int, data: bytes, text: str) -> None:
    wire = bytes.fromhex(text)
    assert mux.encode(connection, data) == wire
    assert MuxDecoder().feed(wire) == [(connection, data)]
    decoder = MuxDecoder()
    assert joined([piece for at in range(len(wire)) for piece in decoder.feed(wire[at : at + 1])]) == {connection: data}
    decoder = MuxDecoder()
    assert decoder.feed(wire + wire[:5]) == [(connection, data)]
    assert decoder.feed(wire[5:]) == [(connection, data)]


def test_empty_data_gives_no_frame_and_an_empty_frame_no_data() -> None:
    assert mux.encode(1, b"") == b""
    assert MuxDecoder().feed(struct.pack(">II", 1, 0) + mux.encode(2, b"x")) == [(2, b"x")]


@given(st.lists(st.tuples(st.sampled_from((1, 2, 9)), st.binary(max_size=9000)), max_size=4), st.data())
def test_interleaved_connections_whatever_the_splits(parts: list[tuple[int, bytes]], draw: st.DataObject) -> None:
    wire = b"".join(mux.encode(connection, data) for connection, data in parts)
    decoder, found = MuxDecoder(), []
    while wire:
        size = draw.draw(st.integers(1, len(wire)))
        found += decoder.feed(wire[:size])
        wire = wire[size:]
    assert joined(found) == {connection: data for connection, data in joined(parts).items() if data}


@pytest.mark.parametrize("size", [MAX_FRAME_OUT - 8, MAX_FRAME_OUT - 7, 20_000, 100_000])
def test_no_sent_frame_exceeds_the_runtimes_limit(size: int) -> None:
    wire, at = mux.encode(1, bytes(size)), 0
    while at < len(wire):
        length = struct.unpack_from(">II", wire, at)[1] + 8
        assert 8 < length <= MAX_FRAME_OUT
        at += length
    assert joined(MuxDecoder().feed(wire)) == {1: bytes(size)}


@pytest.mark.parametrize("length", [MAX_FRAME_IN + 1, 0xFFFFFFFF])
def test_an_oversize_length_is_refused_from_the_header_alone(length: int) -> None:
    decoder = MuxDecoder()
    with pytest.raises(MuxError, match="limit") as error:
        decoder.feed(struct.pack(">II", 1, length))
    with pytest.raises(MuxError) as again:
        decoder.feed(b"x")
    assert again.value is error.value


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_arbitrary_bytes_give_data_or_one_error(pieces: list[bytes]) -> None:
    decoder, given_bytes, found = MuxDecoder(), 0, 0
    for piece in pieces:
        given_bytes += len(piece)
        try:
            found += sum(len(data) for _, data in decoder.feed(piece))
        except MuxError:
            return
    assert found <= given_bytes
