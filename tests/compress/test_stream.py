"""The streaming compressor: each batch comes out whole, and a hostile peer gets no memory."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.compress import StreamCompressor, StreamDecompressor
from haulier.compress import zstd as names
from haulier.compress.stream import level_for
from haulier.errors import Corrupt, UsageError


@given(st.lists(st.binary(max_size=3000), max_size=12), st.sampled_from([1, 3, 9]))
@settings(max_examples=40, deadline=None)
def test_each_batch_comes_out_whole(batches: list[bytes], level: int) -> None:
    into, back = StreamCompressor(level, 20), StreamDecompressor()
    for batch in batches:
        assert back.decompress(into.compress(batch), len(batch)) == batch


def test_pieces_count_as_one_batch() -> None:
    into, back = StreamCompressor(), StreamDecompressor()
    data = into.compress(b"one ", bytearray(b"two "), memoryview(b"three"))
    assert back.decompress(data, 13) == b"one two three"


def test_the_window_outlives_batches_and_reaches_far() -> None:
    noise = os.urandom(1 << 20)
    into = StreamCompressor(3, 23, long=True)
    first = into.compress(noise)
    for _ in range(4):
        into.compress(os.urandom(1 << 20))
    assert len(first) > len(noise)
    assert len(into.compress(noise)) < len(noise) // 100


def test_more_than_announced_is_refused_without_being_made() -> None:
    bomb = StreamCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    back = StreamDecompressor()
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match="1000 bytes announced"):
            back.decompress(bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_exactly_the_announced_size_is_taken() -> None:
    data = os.urandom(300_000)
    assert StreamDecompressor().decompress(StreamCompressor().compress(data), len(data)) == data


def test_a_window_larger_than_allowed_is_refused() -> None:
    data = StreamCompressor(3, 27).compress(os.urandom(1 << 18))
    with pytest.raises(Corrupt, match="zstd"):
        StreamDecompressor(24).decompress(data, 1 << 20)


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_is_corrupt_or_incomplete(noise: bytes) -> None:
    try:
        assert len(StreamDecompressor().decompress(noise, 1000)) <= 1000
    except Corrupt:
        pass


def test_a_frame_that_ends_is_refused() -> None:
    whole = names.compress(b"some bytes")
    with pytest.raises(Corrupt, match="ended"):
        StreamDecompressor().decompress(whole, 100)


def test_bytes_after_the_end_are_refused() -> None:
    back = StreamDecompressor()
    with pytest.raises(Corrupt):
        back.decompress(names.compress(b"some bytes"), 100)
    with pytest.raises(Corrupt, match="follow"):
        back.decompress(b"more", 100)


@pytest.mark.parametrize("window_log", [19, 28])
def test_window_bounds(window_log: int) -> None:
    with pytest.raises(UsageError, match="window_log"):
        StreamCompressor(3, window_log)


def test_level_bounds() -> None:
    with pytest.raises(UsageError, match="level"):
        StreamCompressor(1000)


def test_level_by_link() -> None:
    assert level_for(10e6) == level_for(50e6) == 5 and level_for(1e9) == 2


def test_what_both_ends_have_costs_little() -> None:
    known = os.urandom(30_000)
    data = known[10_000:20_000] + b"and something new"
    plain = StreamCompressor(19, 20).compress(data)
    into, back = StreamCompressor(19, 20, False, known), StreamDecompressor(27, known)
    packed = into.compress(data)
    assert len(packed) < 100 < len(plain)
    assert back.decompress(packed, len(data)) == data
    again = into.compress(known[:5000], data)
    assert back.decompress(again, 5000 + len(data)) == known[:5000] + data
    with pytest.raises(Corrupt):
        StreamDecompressor().decompress(packed, len(data))
