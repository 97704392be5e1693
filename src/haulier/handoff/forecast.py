"""A handoff's bytes, time and downtime as arithmetic over what was sampled. Pure: numbers in, numbers out.

Time is the longer of two: what the link needs for the bytes, and what the guest's memory needs to pass through QEMU and
the codec; before and after it stands what depends on neither. What a site's own handoffs took corrects the last two
(`Pace`). What the guest dirties while a round is sent is the next round: of memory never more than the pages that it
keeps rewriting, of the disk as much as the time allows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from haulier.compress.stream import level_for
from haulier.units import MIB

FIXED_BYTES: Final = 170_000
"""Probe, offer, device state, questions and answers: what any handoff sends."""
HOPELESS: Final = 0.9
"""A round that makes more than this of itself anew: the guest outruns the link."""
LAST_S: Final = 0.1
"""A round of so little link is the last."""
MOST_ROUNDS: Final = 30
MOST_REMEMBERED: Final = 16


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """Of the whole guest, extrapolated. Bytes are wire bytes; `_error` is a standard error."""

    memory_bytes: int
    pages: dict[str, float]
    memory_wire: float
    memory_error: float = 0.0
    dirty_wire_s: float = 0.0
    """Wire bytes a second that the memory that the guest dirties would cost, each page as often as it is dirtied ..."""
    hot_wire: float = math.inf
    """... and what all pages that it keeps rewriting cost once."""
    dirty_bps: float = 0.0
    disk_chunks: float = 0.0
    disk_wire: float = 0.0
    disk_error: float = 0.0
    disk_wire_s: float = 0.0
    """Wire bytes a second of what the guest writes to its disk."""
    missing: int = 0
    """Bytes of the base that the target lacks ..."""
    missing_wire: float = 0.0
    """... and what they cost."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long what does not depend on the link takes here."""

    fixed_s: float = 1.1
    """Offer, connection, start of the target's QEMU, switchover."""
    pass_s: float = 1.5
    """A GiB of memory through QEMU and codec, of which nothing has to be sent."""
    downtime_s: float = 0.06
    """Beside round trips and bytes."""


class Took(msgspec.Struct, frozen=True, kw_only=True):
    """One past handoff, as the pace is learnt from it."""

    memory_bytes: int
    wire: int
    rate_bps: float
    rtt_s: float
    total_s: float
    downtime_s: float


def link_s(took: Took) -> float:
    """Seconds that the link needed for its bytes."""
    return took.wire * 8 / max(took.rate_bps, 1.0)


def rest_s(took: Took) -> float:
    """Seconds that it took beside those and the round trips."""
    return took.total_s - 6 * took.rtt_s - link_s(took)


def learn(past: Sequence[Took], default: Pace | None = None) -> Pace:
    """The pace by the medians of past handoffs: what is fixed from all, for those that waited for the link had nothing
    else to wait for, and the others took at least that; how fast memory passes from the others."""
    pace = default or Pace()
    if not past:
        return pace
    free = [took for took in past if link_s(took) < 0.5 * took.total_s]
    waited = [took for took in past if took not in free]
    fixed = statistics.median(map(rest_s, waited)) if waited else pace.fixed_s
    if free:
        fixed = min(fixed, statistics.median(map(rest_s, free)))
    pace = msgspec.structs.replace(pace, fixed_s=min(10.0, max(0.2, fixed)))
    if free:
        passes = [
            max(0.05, took.total_s - pace.fixed_s - 6 * took.rtt_s) / (took.memory_bytes / 1024 / MIB) for took in free
        ]
        pace = msgspec.structs.replace(pace, pass_s=statistics.median(passes))
    downs = [took.downtime_s - 2.5 * took.rtt_s for took in past]
    return msgspec.structs.replace(pace, downtime_s=min(1.0, max(0.02, statistics.median(downs))))


def dirtied(found: Sampled, seconds: float) -> tuple[float, float]:
    """Wire bytes of memory and of the disk that the guest makes anew in that time."""
    memory = found.dirty_wire_s * seconds
    if memory and math.isfinite(found.hot_wire):
        # Of pages that are rewritten at random, so many have been by then.
        memory = found.hot_wire * -math.expm1(-memory / found.hot_wire) if found.hot_wire > 0 else 0.0
    return memory, found.disk_wire_s * seconds


def rounds(found: Sampled, first_s: float, link: float) -> tuple[float, float]:
    """Wire bytes of memory and disk in all rounds after the first, which takes `first_s`; `link` in bytes a second."""
    memory = disk = 0.0
    seconds = first_s
    for _ in range(MOST_ROUNDS):
        some, more = dirtied(found, seconds)
        memory, disk = memory + some, disk + more
        seconds = (some + more) / link
        if seconds < LAST_S:
            break
    # However often a page is dirtied, a handoff that ends sends it a few times only.
    return min(memory, found.memory_bytes * 0.5), min(disk, found.memory_bytes * 0.5)


def make(found: Sampled, rate_bps: float, rtt_s: float, pace: Pace | None = None, level: int = 0) -> dict[str, Any]:
    """The forecast as JSON values: {"bytes", "seconds", "downtime_ms", "converges", "mode", ...}.

    `level`: what memory was sampled with.
    """
    pace = pace or Pace()
    disk = found.disk_wire + found.missing_wire
    first = found.memory_wire
    scan = pace.pass_s * found.memory_bytes / 1024 / MIB
    link = rate_bps / 8
    # What is small enough to travel while the guest stands still does not have to become less.
    converges = (found.dirty_wire_s + found.disk_wire_s) / link < HOPELESS or found.hot_wire / link < LAST_S
    again, anew = rounds(found, pace.fixed_s + max(scan, (disk + first) / link), link)
    disk += anew
    wire = FIXED_BYTES + disk + first + again
    seconds = pace.fixed_s + 6 * rtt_s + max(scan, wire / link)
    downtime = 2.5 * rtt_s + pace.downtime_s
    spread = (2.0 * (found.memory_error**2 + found.disk_error**2) ** 0.5 + 0.5 * (again + anew)) / wire
    return {
        "bytes": {
            "total": round(wire),
            "disk": round(disk),
            "memory": round(first + again),
            "again": round(again),
            "fixed": FIXED_BYTES,
            "memory_pages": {kind: round(count) for kind, count in found.pages.items()},
            "disk_chunks": round(found.disk_chunks),
            "missing_at_target": found.missing,
            "low": round(wire * max(0.0, 1 - spread - 0.05)),
            "high": round(wire * (1 + spread + 0.05)),
        },
        "seconds": interval(seconds, min(0.9, 0.15 + spread)),
        "downtime_ms": interval(downtime * 1000, 0.5),
        "converges": converges,
        "limit": "link" if wire / link > scan else "processing",
        "rate_bps": rate_bps,
        "rtt_s": rtt_s,
        "dirty_bps": found.dirty_bps,
        "mode": {"level": level or level_for(rate_bps), "blocks": True, "xor": True},
    }


def interval(value: float, spread: float) -> dict[str, float]:
    """{"low", "likely", "high"}: `value` and so much of it less and more."""
    return {"low": round(value * (1 - spread), 2), "likely": round(value, 2), "high": round(value * (1 + spread), 2)}


def compare(forecast: dict[str, Any], wire: int, seconds: float, downtime_ms: float) -> dict[str, float]:
    """What happened over what was forecast: 1.0 is a forecast that came true."""
    return {
        "bytes": round(wire / max(1, forecast["bytes"]["total"]), 4),
        "seconds": round(seconds / max(0.01, forecast["seconds"]["likely"]), 4),
        "downtime": round(downtime_ms / max(0.01, forecast["downtime_ms"]["likely"]), 4),
    }
