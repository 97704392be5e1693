"""Sets of dense chunk ids as roaring bitmaps, with numpy at the edges.

Ids are unsigned 32-bit: 2^32 chunks of 64 KiB are 256 TiB of distinct data. The serialized form (roaring's portable
format) is only ever read back from our own database: it cannot be checked fully, so peers send fingerprints and
plain bit sets instead.
"""

from __future__ import annotations

from array import array
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap

from haulier.errors import Corrupt

Ids: TypeAlias = NDArray[np.int64]
"""Ids aligned with a request's fingerprints; UNKNOWN where the dictionary has none."""
Bits: TypeAlias = Any
"""A pyroaring.BitMap (which comes without types)."""

UNKNOWN: Final = -1
MAX_IDS: Final = 1 << 32
SLICE_BITS: Final = 20
"""A holding is stored in slices of 2^20 ids, at most 128 KiB each, so that a small change writes little."""


def empty() -> Bits:
    return BitMap()


def of_ids(ids: NDArray[Any]) -> Bits:
    """The set of the known ones among `ids`."""
    known = ids[ids >= 0].astype(np.uint32)
    # from an array.array it copies; from anything else it asks object by object
    return BitMap(array("I", known.tobytes()))


def to_ids(bits: Bits) -> NDArray[np.uint32]:
    """Ascending."""
    return np.frombuffer(bits.to_array(), dtype=np.uint32) if len(bits) else np.empty(0, dtype=np.uint32)


def union(sets: list[Bits]) -> Bits:
    return BitMap.union(*sets) if sets else BitMap()


def dump(bits: Bits) -> bytes:
    """Serialized, as small as it gets."""
    bits.run_optimize()
    return bytes(bits.serialize())


def load(data: bytes, what: str) -> Bits:
    """Corrupt if `data`, which comes from our own database, is no bitmap."""
    try:
        return BitMap.deserialize(bytes(data))
    except ValueError:
        raise Corrupt(f"the coordinator's {what} is damaged: restore its database, or let it be filled anew") from None


def slices(bits: Bits) -> list[int]:
    """Numbers of the slices in which `bits` has ids."""
    found: list[int] = []
    at: int | None = bits.min() if len(bits) else None
    while at is not None:
        number = at >> SLICE_BITS
        found.append(number)
        end = (number + 1) << SLICE_BITS
        at = bits.next_set_bit(end) if end < MAX_IDS and bits.max() >= end else None
    return found


def one_slice(bits: Bits, number: int) -> Bits:
    """The part of `bits` that lies in one slice, ids unchanged."""
    window = BitMap()
    window.add_range(number << SLICE_BITS, (number + 1) << SLICE_BITS)
    return bits & window


def members(ids: Ids, bits: Bits) -> NDArray[np.bool_]:
    """For each of `ids`, whether it is in `bits`."""
    held = to_ids(bits & of_ids(ids))
    return np.isin(ids, held.astype(np.int64), assume_unique=False)


def pack(mask: NDArray[np.bool_]) -> bytes:
    """A plain bit set for the wire, least significant bit first: bounded, and every byte string is a valid one."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack(data: bytes, count: int) -> NDArray[np.bool_]:
    """The inverse of `pack` for `count` positions. Corrupt if the length does not fit."""
    if len(data) != (count + 7) // 8:
        raise Corrupt(f"a bit set of {len(data)} bytes for {count} positions: the answer is damaged")
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count, bitorder="little").astype(np.bool_)
