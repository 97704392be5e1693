"""Pages that hold numbers which run on smoothly: sums over pictures, samples, counts, times. Pure.

No compressor of bytes makes anything of them, because hardly a number comes twice. Taken as 32-bit words, of which each
goes on as the two before it let expect, what is left of a number is small; zigzag makes it positive, and the bytes of
the same weight put together leave zstd one plane of noise in place of four.

    step k      word k minus word k-1 (the words before the page are 0), modulo 2^32
    rest k      step k minus step k-1, modulo 2^32, zigzag (0, -1, 1, -2 as 0, 1, 2, 3)
    planes      the lowest byte of every rest of every page, then the next byte of every rest, and so on: four planes
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.units import PAGE

WORDS: Final = PAGE // 4
PLANES: Final = 4
APART: Final = 64
"""Words between two places at which a page is first looked at."""
SMALL: Final = 1 << 18
"""A rest that is likely to pay."""
EVERY: Final = 4
"""Of so many words one is counted, to tell what a page will become."""
GAIN: Final = 0.8
"""Of the plain bytes' entropy: below that it pays."""

_SPARED: Final = np.array([0.0, *(n * math.log2(n) for n in range(1, WORDS + 1))], np.float32)
"""Bits that a byte which comes n times is less than one that comes once."""


def smooth(pages: NDArray[np.uint8], rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Those of these rows of `pages`, u8 (n, 4096), that become smaller this way, as far as entropy tells."""
    words = pages.view(np.uint32)
    # First a few places of each page: nearly all pages go no further.
    one, two, three = (words[:, 8 + at :: APART][rows] for at in range(3))
    few = _zigzag(three - two - (two - one))
    likely: NDArray[np.intp] = rows[((few < SMALL) & (three != two)).sum(axis=1) > few.shape[1] * 3 // 4]
    if not len(likely):
        return rows[:0]
    some = pages[likely]
    packed = pack(some).reshape(PLANES, len(likely), WORDS)[:, :, ::EVERY]
    plain = some.reshape(len(likely), WORDS, PLANES)[:, ::EVERY].transpose(2, 0, 1)
    found: NDArray[np.intp] = likely[_entropy(packed) < GAIN * _entropy(plain)]
    return found


def pack(pages: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The planes, u8 (n * 4096), of pages, u8 (n, 4096)."""
    words = np.ascontiguousarray(pages).view(np.uint32)
    for _ in range(2):
        steps = words.copy()
        steps[:, 1:] -= words[:, :-1]
        words = steps
    rests = _zigzag(words).view(np.uint8)
    return np.ascontiguousarray(rests.reshape(-1, PLANES).T).reshape(-1)


def unpack(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of `pack`."""
    rests = np.ascontiguousarray(planes.reshape(PLANES, -1).T).view(np.uint32).reshape(-1, WORDS)
    words = (rests >> np.uint32(1)) ^ (np.uint32(0) - (rests & np.uint32(1)))
    for _ in range(2):
        words = np.add.accumulate(words, axis=1, dtype=np.uint32)
    return words.view(np.uint8)


def _zigzag(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    found: NDArray[np.uint32] = (words << np.uint32(1)) ^ (np.uint32(0) - (words >> np.uint32(31)))
    return found


def _entropy(planes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """For planes, u8 (4, n, m): bits (n) by how often each byte comes in each plane."""
    count, words = planes.shape[1:]
    at = np.arange(PLANES * count, dtype=np.int32).reshape(PLANES, count, 1) * np.int32(256)
    often = np.bincount((planes + at).reshape(-1), minlength=PLANES * count * 256)
    bits: NDArray[np.float32] = _SPARED[words] * PLANES - _SPARED[often].reshape(PLANES, count, 256).sum(axis=(0, 2))
    return bits
