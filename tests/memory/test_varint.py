"""Columns of integers: round trips, and refusals that cost no memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.errors import Corrupt
from haulier.memory import varint

values = st.lists(st.one_of(st.integers(0, 300), st.integers(0, varint.LIMIT - 1)), max_size=300)


@given(values)
def test_round_trip(numbers: list[int]) -> None:
    data = varint.encode(np.array(numbers, np.uint64))
    assert data == varint.encode_few(numbers)
    assert varint.decode(data).tolist() == numbers


@given(st.lists(st.integers(-(1 << 33), (1 << 33) - 1), max_size=200))
def test_deltas_round_trip(numbers: list[int]) -> None:
    small = np.cumsum(np.array(numbers, np.int64) // 200)
    assert varint.decode_deltas(varint.encode_deltas(small)).tolist() == small.tolist()


@given(st.lists(st.integers(-(1 << 62), (1 << 62) - 1)))
def test_zigzag_round_trip(numbers: list[int]) -> None:
    array = np.array(numbers, np.int64)
    assert varint.unzigzag(varint.zigzag(array)).tolist() == numbers


def test_zigzag_keeps_small_small() -> None:
    assert varint.zigzag(np.array([0, -1, 1, -2, 2])).tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.tuples(st.integers(0, 1 << 32), st.integers(1, 40)), max_size=150))
def test_indexes_round_trip(runs: list[tuple[int, int]]) -> None:
    indexes = np.array([start + k for start, count in runs for k in range(count)], np.int64)
    data = varint.encode_indexes(indexes)
    assert varint.decode_indexes(data, len(indexes), (1 << 32) + 100).tolist() == indexes.tolist()


def test_consecutive_indexes_cost_nothing() -> None:
    assert len(varint.encode_indexes(np.arange(1000, 101_000))) <= 6


@pytest.mark.parametrize("data", [b"\x80", b"\x01\xff", b"\x80\x80\x80\x80\x80\x01"])
def test_broken_columns(data: bytes) -> None:
    with pytest.raises(Corrupt):
        varint.decode(data)


@pytest.mark.parametrize(
    ("pairs", "count", "limit"),
    [
        ([0], 1, 10),  # half a run
        ([], 1, 10),  # too few
        ([0, 0], 0, 10),  # too many
        ([0, (1 << 35) - 1], 5, 10),  # a run longer than the batch: no memory is taken for it
        ([0, 4], 4, 10),
        ([20, 0], 1, 10),  # beyond the guest
        ([18, 1], 2, 10),  # its end is
        ([1, 0], 1, 10),  # before its start
    ],
)
def test_broken_indexes(pairs: list[int], count: int, limit: int) -> None:
    with pytest.raises(Corrupt):
        varint.decode_indexes(varint.encode_few(pairs), count, limit)


@given(st.binary(max_size=100), st.integers(0, 50), st.integers(1, 1000))
def test_noise(data: bytes, count: int, limit: int) -> None:
    try:
        indexes = varint.decode_indexes(data, count, limit)
    except Corrupt:
        return
    assert len(indexes) == count and all(0 <= index < limit for index in indexes.tolist())
