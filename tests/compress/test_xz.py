"""xz's batches: there and back, none larger than announced, and nothing else taken for one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.compress import xz
from haulier.errors import Corrupt, UsageError


@given(st.lists(st.binary(max_size=3000), max_size=5), st.integers(0, 6))
def test_there_and_back(parts: list[bytes], preset: int) -> None:
    plain = b"".join(parts)
    assert xz.unpack(xz.pack(xz.FIRST_LEVEL + preset, *parts), len(plain)) == plain


def test_more_than_was_announced_is_refused_before_it_is_made() -> None:
    bomb = xz.pack(xz.FIRST_LEVEL, bytes(64 << 20))
    assert len(bomb) < 64 << 10
    with pytest.raises(Corrupt, match="more than the 1000 bytes"):
        xz.unpack(bomb, 1000)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    chosen = random.Random(1).randbytes(500)
    good = xz.pack(xz.FIRST_LEVEL, chosen)
    for data in (noise, good[:-1], good[: len(good) // 2], good + noise + b"x"):
        try:
            assert len(xz.unpack(data, 1000)) <= 1000 and data == noise
        except Corrupt:
            continue


@pytest.mark.parametrize("level", [19, 30])
def test_levels_of_others_are_refused(level: int) -> None:
    with pytest.raises(UsageError, match="none of xz's"):
        xz.pack(level, b"abc")


def test_levels_have_names() -> None:
    assert xz.name_of(5) == "zstd level 5" and xz.name_of(24) == "xz preset 4"
    assert xz.is_xz(20) and not xz.is_xz(19)
