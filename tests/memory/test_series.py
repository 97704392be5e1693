"""Pages of numbers that run on: there and back for any bytes, chosen where they become smaller, and not elsewhere."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from haulier.compress import StreamCompressor
from haulier.memory import series
from haulier.units import PAGE

WORDS = PAGE // 4
RNG = np.random.default_rng(5)


def page(words: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.frombuffer(np.asarray(words).astype("<u4").tobytes(), np.uint8)


def text() -> NDArray[np.uint8]:
    words = ["".join(random.Random(n).choices("etaoinshrdlu", k=2 + n % 7)) for n in range(900)]
    return np.frombuffer(" ".join(random.Random(3).choices(words, k=2000)).encode()[:PAGE], np.uint8)


def pointers() -> NDArray[np.uint8]:
    near = RNG.integers(0, 1 << 22, 512).astype("<u8") * np.uint64(64)
    return np.frombuffer((near + np.uint64(0xFFFF_8880_0000_0000)).tobytes(), np.uint8)


SMOOTH = {
    "sums of a row of a picture": page(np.cumsum(RNG.integers(0, 256, WORDS))),
    "sums of sums": page(np.cumsum(np.cumsum(RNG.integers(0, 40, WORDS)))),
    "sums that wrap": page(np.cumsum(RNG.integers(0, 1 << 14, WORDS)) + (1 << 32) - 1000),
    "times, nearly even": page(1_700_000_000 + np.arange(WORDS) * 1000 + RNG.integers(-9, 9, WORDS)),
    "a wave": page(np.int32(1e6) + (1e6 * np.sin(np.arange(WORDS) / 40)).astype(np.int64)),
}
ROUGH = {
    "random": np.frombuffer(RNG.bytes(PAGE), np.uint8),
    "zero": np.zeros(PAGE, np.uint8),
    "text": text(),
    "pointers": pointers(),
    "small numbers in no order": page(RNG.integers(0, 200, WORDS)),
    "one number": page(np.full(WORDS, 7)),
    "flags": page(RNG.integers(0, 2, WORDS)),
}


def zstd(data: bytes) -> int:
    return len(StreamCompressor(5).compress(data))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), max_size=5))
def test_any_pages_come_back(seeds: list[bytes]) -> None:
    pages = np.frombuffer(b"".join(seed * (PAGE // 16) for seed in seeds), np.uint8).reshape(-1, PAGE)
    planes = series.pack(pages)
    assert planes.shape == (pages.size,) and series.unpack(planes).tobytes() == pages.tobytes()


@pytest.mark.parametrize("what", [*SMOOTH, *ROUGH])
def test_what_runs_on_is_chosen_and_becomes_smaller(what: str) -> None:
    pages = np.stack([(SMOOTH | ROUGH)[what]] * 3)
    rows = np.array([0, 2])
    chosen = series.smooth(pages, rows)
    assert chosen.tolist() == (rows.tolist() if what in SMOOTH else [])
    if what in SMOOTH:
        one = pages[:1]
        assert zstd(series.pack(one).tobytes()) < 0.9 * zstd(one.tobytes())
        assert series.unpack(series.pack(one)).tobytes() == one.tobytes()


def test_the_planes_are_as_the_format_says() -> None:
    words = [5, 7, 6, 0xFFFFFFFF, *[0] * 1020]
    pages = np.frombuffer(struct.pack("<2048I", *words, *[1] * 1024), np.uint8).reshape(2, PAGE)
    planes = series.pack(pages).reshape(4, 2, WORDS)
    rests, step, before = [], 0, 0
    for word in words:
        now = (word - before) % (1 << 32)
        rest = (now - step) % (1 << 32)
        rests.append(2 * rest if rest < 1 << 31 else 2 * ((1 << 32) - rest) - 1)
        before, step = word, now
    assert [sum(int(planes[weight, 0, k]) << 8 * weight for weight in range(4)) for k in range(WORDS)] == rests
    assert planes[0, 1, :4].tolist() == [2, 1, 0, 0]
