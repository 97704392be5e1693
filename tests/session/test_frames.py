"""Frames: any split gives the same frames; nonsense is refused without holding it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.errors import Corrupt
from haulier.session.frames import END, HEADER, MAX_CONTROL, MAX_PAYLOAD, Frame, FrameReader, Kind, encode

data_frames = st.builds(
    Frame,
    st.just(int(Kind.DATA)),
    st.integers(0, 15),
    st.sampled_from([0, END]),
    st.integers(0, 2**64 - 1),
    st.one_of(st.binary(max_size=200), st.integers(0, MAX_PAYLOAD).map(bytes)),
)
control_frames = st.builds(
    Frame,
    st.sampled_from([int(k) for k in Kind if k not in (Kind.DATA, Kind.BYE)]),
    st.integers(0, 15),
    st.just(0),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=MAX_CONTROL),
)


def pack(frame: Frame) -> bytes:
    return encode(*frame)


@given(st.lists(st.one_of(data_frames, control_frames), max_size=12), st.data())
def test_any_split_gives_the_same_frames(frames: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(map(pack, frames))
    reader = FrameReader()
    found: list[Frame] = []
    while stream:
        size = data.draw(st.integers(1, min(len(stream), 100_000)))
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert found == frames


def test_a_header_is_laid_out_as_documented() -> None:
    assert encode(Kind.DATA, 3, END, 7, b"ab") == bytes([5, 3, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7]) + b"ab"
    assert HEADER.size == 16
    assert MAX_PAYLOAD + 16 == 65536


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("!BBHIQ", Kind.DATA, 16, 0, 0, 0),
        struct.pack("!BBHIQ", Kind.DATA, 0, 2, 0, 0),
        struct.pack("!BBHIQ", Kind.DATA, 0, 0, MAX_PAYLOAD + 1, 0),
        struct.pack("!BBHIQ", 0, 0, 0, 0, 0),
        struct.pack("!BBHIQ", 11, 0, 0, 0, 0),
        struct.pack("!BBHIQ", Kind.PING, 0, 2, 0, 0),
        struct.pack("!BBHIQ", Kind.BYE, 0, 2, 0, 0),
        struct.pack("!BBHIQ", Kind.HELLO, 0, 0, MAX_CONTROL + 1, 0),
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_nonsense_is_refused_at_its_header(header: bytes) -> None:
    with pytest.raises(Corrupt, match="check that"):
        FrameReader().feed(header)


@given(st.binary(max_size=300))
def test_any_bytes_give_frames_or_corrupt(garbage: bytes) -> None:
    try:
        FrameReader().feed(garbage)
    except Corrupt:
        pass


def test_the_buffer_never_grows() -> None:
    reader = FrameReader()
    before = len(reader._buffer)
    whole = encode(Kind.DATA, 1, END, 1, bytes(MAX_PAYLOAD))
    for _ in range(20):
        assert len(reader.feed(whole * 3 + whole[:1000])) == 3
        assert len(reader.feed(whole[1000:])) == 1
    assert len(reader._buffer) == before
