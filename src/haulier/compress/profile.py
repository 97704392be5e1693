"""Measures what the levels of zstd and xz cost and yield on this host, of pages like those that handoffs send."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from haulier.compress import xz
from haulier.compress.controller import DEFAULT, Cost, Profile, Tried
from haulier.compress.stream import StreamCompressor, window
from haulier.errors import UNDECODABLE, Corrupt, UsageError

LEVELS: Final = (-5, 1, 2, 3, 5, *(xz.FIRST_LEVEL + own for own in (0, 1, 3, 4, 5, 6)))
"""Those of zstd above 5 make no fewer bytes of what the page logic leaves, and from 15 on more than xz, and slower."""
PIECE: Final = 256 * 1024
TRIAL: Final = 128 * 1024
"""Bytes that are tried: few, because the link may run dry meanwhile ..."""
TRIAL_S: Final = 0.1
"""... and CPU seconds after which no other level is."""
PATIENCE_S: Final = 0.8
"""CPU seconds for one level; what a slow level does not get to in that time is extrapolated."""


def compressor(level: int, before: bytes = b"") -> tuple[Callable[[bytes], bytes], int]:
    """What compresses batch after batch at that level, as handoffs do, and the bytes that it looks back over.

    `before`: what it has compressed already.
    """
    if xz.is_xz(level):
        return xz.Packer(level, before).pack, xz.DICTIONARY
    log, long = window(level)
    compress = StreamCompressor(level, log, long).compress
    if before:
        compress(before)
    return compress, 1 << log


def measure(sample: bytes, clock: Callable[[], float] = time.thread_time, now: float = 0.0) -> Profile:
    """The profile by `sample`, some megabytes of pages. UsageError if it is too small to tell."""
    if len(sample) < 4 * PIECE:
        raise UsageError(f"a sample of {len(sample)} bytes is too small to measure compression with")
    costs = []
    first: list[int] = []
    for level in LEVELS:
        compress, memory = compressor(level)
        compress(sample[:PIECE])  # tables are made with the first bytes
        done = wire = 0
        passed: list[int] = []
        began = clock()
        for at in range(PIECE, len(sample), PIECE):
            piece = sample[at : at + PIECE]
            wire += len(compress(piece))
            done += len(piece)
            passed.append(wire)
            if clock() - began > PATIENCE_S:
                break
        took = clock() - began
        first = first or passed
        # Where patience ended the sample may be denser than all of it is: what the first level made of both tells.
        ratio = wire / first[len(passed) - 1] * first[-1] / (len(sample) - PIECE)
        costs.append(Cost(level, done / max(1e-9, took), ratio, memory))
    return Profile(tuple(costs), DEFAULT.encode, now).frontier()


def trial(levels: Sequence[int], before: bytes, data: bytes, clock: Callable[[], float] = time.thread_time) -> Tried:
    """What the levels make of the beginning of `data`, by codecs that have seen what was sent `before`.

    The first of them always; no other is begun when all have taken TRIAL_S: the link may run dry meanwhile.
    """
    data, found = data[:TRIAL], {}
    first = clock()
    for level in levels:
        compress, _ = compressor(level, before[-TRIAL:])
        began = clock()
        wire = len(compress(data))
        found[level] = (len(data), wire, clock() - began)
        if clock() - first > TRIAL_S:
            break
    return found


def encode(profile: Profile) -> bytes:
    """As JSON."""
    return msgspec.json.format(msgspec.json.encode(profile))


def decode(data: bytes) -> Profile:
    """The profile back; Corrupt if it is none."""
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except UNDECODABLE as error:
        raise Corrupt(f"the profile of compression makes no sense ({error}): run 'haulier calibrate'") from None
    most = xz.FIRST_LEVEL + xz.LEVELS
    sound = all(cost.speed > 0 and 0 < cost.ratio < 10 and -50 <= cost.level < most for cost in profile.costs)
    if not profile.costs or not sound or profile.encode <= 0:
        raise Corrupt("the profile of compression makes no sense: run 'haulier calibrate'")
    return profile.frontier()
