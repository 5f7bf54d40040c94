"""The ttrpc frame: one table of vectors for both directions, every split of the bytes, and meaningless bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.ttrpc import frame
from shim.ttrpc.errors import OversizeError, ProtocolError
from shim.ttrpc.frame import DATA, MAX_MESSAGE, REQUEST, RESPONSE, Decoder, Frame

# The bytes are written out, so that a change of the codec on both sides still fails.
VECTORS = {
    "an empty request": (Frame(1, REQUEST, 0, b""), "00000000 00000001 01 00"),
    "a request": (Frame(3, REQUEST, 0, b"\x0a\x01x"), "00000003 00000003 01 00 0a0178"),
    "the last part of a request": (Frame(5, REQUEST, 1, b"a"), "00000001 00000005 01 01 61"),
    "a response": (Frame(1, RESPONSE, 0, b"\x12\x01y"), "00000003 00000001 02 00 120179"),
    "the highest stream": (Frame(0xFFFFFFFF, RESPONSE, 0, b"z"), "00000001 ffffffff 02 00 7a"),
    "a part of a stream": (Frame(7, DATA, 4, b""), "00000000 00000007 03 04"),
}
FRAMES = st.lists(
    st.builds(
        Frame,
        st.integers(0, 2**32 - 1),
        st.sampled_from((REQUEST, RESPONSE, DATA)),
        st.integers(0, 255),
        st.binary(max_size=300),
    ),
    max_size=5,
)


@pytest.mark.parametrize("value, text", VECTORS.values(), ids=VECTORS)
def test_vectors(value: Frame, text: str) -> None:
    data = bytes.fromhex(text)
    assert frame.encode(value) == data
    assert Decoder().feed(data) == [value]


@pytest.mark.parametrize("value, text", VECTORS.values(), ids=VECTORS)
def test_vectors_byte_by_byte(value: Frame, text: str) -> None:
    data, decoder = bytes.fromhex(text), Decoder()
    for at in range(len(data) - 1):
        assert decoder.feed(data[at : at + 1]) == []
        assert decoder.waiting == at + 1
    assert decoder.feed(data[-1:]) == [value]
    assert decoder.waiting == 0


@pytest.mark.parametrize("value, text", VECTORS.values(), ids=VECTORS)
def test_vectors_with_trailing_data(value: Frame, text: str) -> None:
    data, decoder = bytes.fromhex(text), Decoder()
    assert decoder.feed(data + data[:7]) == [value]
    assert decoder.waiting == 7
    assert decoder.feed(data[7:]) == [value]


@given(FRAMES, st.data())
def test_any_split_gives_the_same_frames(frames: list[Frame], draw: st.DataObject) -> None:
    data, decoder, found = b"".join(map(frame.encode, frames)), Decoder(), []
    while data:
        size = draw.draw(st.integers(1, len(data)))
        found += decoder.feed(data[:size])
        data = data[size:]
    assert found == frames


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_arbitrary_bytes_end_in_frames_or_one_error(pieces: list[bytes]) -> None:
    decoder = Decoder(limit=100)
    for piece in pieces:
        try:
            assert all(len(one.payload) <= 100 for one in decoder.feed(piece))
        except ProtocolError as error:
            with pytest.raises(ProtocolError) as again:
                decoder.feed(b"more")
            assert again.value is error
            return
        assert decoder.waiting <= 100 + frame.HEADER.size


@pytest.mark.parametrize("length", [MAX_MESSAGE + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_oversize_length_is_refused_from_the_header_alone(length: int) -> None:
    decoder = Decoder()
    with pytest.raises(OversizeError, match="limit"):
        decoder.feed(struct.pack(">IIBB", length, 1, REQUEST, 0))
    assert decoder.waiting == 0


def test_the_largest_message_passes_and_a_larger_one_is_not_sent() -> None:
    largest = Frame(1, REQUEST, 0, bytes(MAX_MESSAGE))
    assert Decoder().feed(frame.encode(largest)) == [largest]
    with pytest.raises(OversizeError):
        frame.encode(Frame(1, REQUEST, 0, bytes(MAX_MESSAGE + 1)))


@pytest.mark.parametrize("kind", [0, 4, 255])
def test_an_unknown_type_ends_the_connection(kind: int) -> None:
    with pytest.raises(ProtocolError, match="unknown type"):
        Decoder().feed(struct.pack(">IIBB", 0, 1, kind, 0))
