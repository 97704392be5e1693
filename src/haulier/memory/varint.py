"""Columns of small integers as LEB128 varints, all at once in numpy; signed differences in zigzag form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt

MAX_BYTES: Final = 5
_FEW: Final = 96
"""Below so many values a plain loop is faster than numpy's dozen calls."""
LIMIT: Final = 1 << (7 * MAX_BYTES)
"""Values are below this: 35 bits, enough for the page indexes of 16 TiB of memory with a sign."""


def encode(values: NDArray[np.uint64]) -> bytes:
    """The values, each below LIMIT, as varints."""
    if len(values) < _FEW:
        return encode_few(values.tolist())
    lengths = np.ones(len(values), np.int64)
    for shift in range(7, 7 * MAX_BYTES, 7):
        lengths += values >= np.uint64(1 << shift)
    longest = int(lengths.max())
    if longest == 1:
        return values.astype(np.uint8).tobytes()
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    for k in range(longest):
        here = lengths > k
        part = (values[here] >> np.uint64(7 * k)) & np.uint64(0x7F)
        part |= np.where(lengths[here] > k + 1, np.uint64(0x80), np.uint64(0))
        out[starts[here] + k] = part
    return out.tobytes()


def encode_few(values: Sequence[int]) -> bytes:
    """The same for a handful of values."""
    out = bytearray()
    for value in values:
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def decode(data: bytes | memoryview) -> NDArray[np.uint64]:
    """All values in `data`; Corrupt unless it ends where a value ends and none is longer than MAX_BYTES."""
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        return np.zeros(0, np.uint64)
    ends = np.flatnonzero(raw < 0x80)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise Corrupt("a column of numbers ends in the middle of one")
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
    lengths = ends - starts + 1
    longest = int(lengths.max())
    if longest > MAX_BYTES:
        raise Corrupt(f"a column of numbers holds one of {longest} bytes")
    values = (raw[starts] & 0x7F).astype(np.uint64)
    for k in range(1, longest):
        here = lengths > k
        values[here] |= (raw[starts[here] + k] & np.uint8(0x7F)).astype(np.uint64) << np.uint64(7 * k)
    return values


def zigzag(values: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Signed to unsigned, small stays small: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return ((values << 1) ^ (values >> 63)).view(np.uint64)


def unzigzag(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The inverse of zigzag."""
    return (values >> np.uint64(1)).view(np.int64) ^ -(values & np.uint64(1)).view(np.int64)


def encode_deltas(values: NDArray[np.int64]) -> bytes:
    """Each value as its difference from the one before (the first: from 0)."""
    if not len(values):
        return b""
    return encode(zigzag(np.diff(values, prepend=np.int64(0))))


def decode_deltas(data: bytes | memoryview) -> NDArray[np.int64]:
    """The inverse of encode_deltas. Differences are below 2**34 and columns short, so the sum cannot overflow."""
    return np.cumsum(unzigzag(decode(data)))


def encode_indexes(indexes: NDArray[np.int64]) -> bytes:
    """Page indexes as runs: (difference from the end of the run before, length - 1) for each."""
    if not len(indexes):
        return b""
    last = np.flatnonzero(indexes[1:] - indexes[:-1] != 1)
    starts = np.empty(len(last) + 1, np.int64)
    ends = np.empty(len(last) + 1, np.int64)
    starts[0], starts[1:] = indexes[0], indexes[last + 1]
    ends[-1], ends[:-1] = indexes[-1], indexes[last]
    pairs = np.empty((len(starts), 2), np.int64)
    pairs[:, 1] = ends - starts
    starts[1:] -= ends[:-1] + 1
    pairs[:, 0] = zigzag(starts).view(np.int64)
    return encode(pairs.reshape(-1).view(np.uint64))


def decode_indexes(data: bytes | memoryview, count: int, limit: int) -> NDArray[np.int64]:
    """Exactly `count` indexes, each below `limit`; Corrupt otherwise."""
    values = decode(data)
    if len(values) % 2:
        raise Corrupt("a column of page indexes ends in the middle of a run")
    if not len(values):
        if count:
            raise Corrupt(f"a column of page indexes is empty where {count} were announced")
        return np.zeros(0, np.int64)
    pairs = values.reshape(-1, 2)
    lengths = pairs[:, 1].astype(np.int64) + 1
    # Each is at least 1, so none exceeds the sum; and a column is far too short for the sum to overflow.
    if int(lengths.sum()) != count:
        raise Corrupt(f"a column of page indexes does not hold the {count} announced")
    gaps = unzigzag(np.ascontiguousarray(pairs[:, 0]))
    starts = np.cumsum(gaps + np.concatenate((np.zeros(1, np.int64), lengths[:-1])))
    if int(starts.min()) < 0 or int((starts + lengths).max()) > limit:
        raise Corrupt(f"a page index lies outside the guest's {limit} pages")
    within = np.arange(count, dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + within
