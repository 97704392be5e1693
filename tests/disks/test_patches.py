"""Patches on a chunk."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.disks.patches import apply_patch, make_patch
from haulier.errors import Corrupt
from haulier.units import BLOCK, CHUNK

OLD = b"".join(random.Random(n).randbytes(BLOCK) if n % 3 else bytes(BLOCK) for n in range(16))


@given(st.lists(st.tuples(st.integers(0, CHUNK - 1), st.binary(min_size=1, max_size=5000)), max_size=6))
def test_a_patch_gives_the_new_chunk(writes: list[tuple[int, bytes]]) -> None:
    new = bytearray(OLD)
    for at, data in writes:
        new[at : at + len(data)] = data[: CHUNK - at]
    patch = make_patch(OLD, bytes(new))
    if patch is not None:
        assert apply_patch(OLD, patch.data) == bytes(new)


def test_a_small_change_is_a_light_patch() -> None:
    new = bytearray(OLD)
    new[5000:5010] = b"0123456789"
    patch = make_patch(OLD, bytes(new))
    assert patch is not None
    assert len(patch.data) == 16 + BLOCK
    assert patch.weight <= 40
    assert patch.data.count(0) > BLOCK - 20


def test_nothing_in_common_is_no_patch() -> None:
    assert make_patch(OLD, os.urandom(CHUNK)) is None


@given(st.binary(max_size=64))
def test_nonsense_is_corrupt(patch: bytes) -> None:
    try:
        assert len(apply_patch(OLD, patch)) == CHUNK
    except Corrupt:
        return


def test_lengths_are_checked() -> None:
    with pytest.raises(Corrupt):
        apply_patch(OLD, bytes([3]) * 16 + bytes(BLOCK))
    with pytest.raises(Corrupt):
        apply_patch(OLD[:-1], bytes(16))
