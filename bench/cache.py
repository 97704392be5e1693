"""Cache policies on made-up traces (haulier/policy/traces.py says how): one site, and twenty that cooperate.

Every miss is fetched from the nearest site that holds it, else from the origin, whatever the policy: they differ only
in what a site keeps. Fetch seconds are bytes over the rate of that link. The ratio is fetch seconds against LRU's;
beside it stand the seconds without those that nobody could save: the first time that a thing is wanted anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from report import Report, Target

from haulier.policy.belady import optimum
from haulier.policy.coordinated import Coordinated
from haulier.policy.model import COORDINATED_NAME, NAMES
from haulier.policy.replay import Access, Outcome, local_policy, replay, replay_fleet
from haulier.policy.traces import Catalogue, accesses, catalogue

LOCAL = tuple(name for name in NAMES if name != Coordinated.name)
SITES = 20
METRO = 4
METRO_MBPS = 200.0
WIDE_MBPS = 40.0
ORIGIN_MBPS = 20.0
HALF_LIFE = 1000.0
"""Of demand, in events of the whole fleet."""
SEEDS = (11, 12, 13)


def per_byte(mbps: float) -> float:
    return 8 / (mbps * 1e6)


def costs() -> tuple[list[list[float]], list[float]]:
    """Metros of four sites at 200 Mbps; 40 Mbps between metros; 20 Mbps to the origin."""
    table = [
        [per_byte(METRO_MBPS if r // METRO == s // METRO else WIDE_MBPS) for s in range(SITES)] for r in range(SITES)
    ]
    return table, [per_byte(ORIGIN_MBPS)] * SITES


def first_times(trace: Sequence[Access]) -> float:
    """Seconds to bring what is wanted for the first time from the origin."""
    return per_byte(ORIGIN_MBPS) * sum({access.key: access.size for access in trace}.values())


def row(
    trace: str, share: float, name: str, found: Outcome, base: float, must: float, took: float
) -> dict[str, object]:
    return {
        "fetch s / LRU's": found.seconds / base if base else None,
        "trace": trace,
        "cache": f"{100 * share:.0f} %",
        "policy": name,
        "hits by bytes %": 100 * found.byte_ratio,
        "fetch s": found.seconds,
        "avoidable s": found.seconds - must,
        "GB": found.bytes / 1e9,
        "origin GB": found.origin_bytes / 1e9 if found.origin_bytes else None,
        "us an access": 1e6 * took / max(found.accesses, 1),
    }


def one_site(images: Catalogue, events: int, share: float, label: str, scans: float) -> list[dict[str, object]]:
    trace = list(accesses(SEEDS[0], images, events, scans=scans))
    keys = [(a.key, a.size, per_byte(ORIGIN_MBPS) * a.size) for a in trace]
    capacity = int(images.bytes * share)
    found: list[tuple[str, Outcome, float]] = []
    for name in LOCAL:
        began = time.perf_counter()
        found.append((name, replay(local_policy(name, capacity), capacity, keys), time.perf_counter() - began))
    began = time.perf_counter()
    bound = Outcome()
    hits = optimum([a.key for a in trace], [a.size for a in trace], capacity)
    for (_, size, cost), hit in zip(keys, hits, strict=True):
        bound.count(size, hit, cost)
    found.append(("belady (knows the future)", bound, time.perf_counter() - began))
    must = first_times(trace)
    return [row(label, share, name, outcome, found[0][1].seconds, must, took) for name, outcome, took in found]


def fleet(images: Catalogue, traces: Sequence[list[Access]], share: float, label: str) -> list[dict[str, object]]:
    table, origin = costs()
    capacities = [int(images.bytes * share)] * SITES
    rows, base, must = [], 0.0, sum(map(first_times, traces))
    for name in NAMES:
        began, total = time.perf_counter(), Outcome()
        for trace in traces:
            found = replay_fleet(name, capacities, table, origin, HALF_LIFE, trace)
            for each in ("accesses", "hits", "bytes", "hit_bytes", "seconds", "origin_bytes"):
                setattr(total, each, getattr(total, each) + getattr(found, each))
        base = base or total.seconds
        rows.append(row(label, share, name, total, base, must, time.perf_counter() - began))
    return rows


def run(quick: bool) -> Report:
    images = catalogue(7, images=100 if quick else 200)
    events, seeds = (2000, SEEDS[:1]) if quick else (8000, SEEDS)
    rows: list[dict[str, object]] = []
    for share in (0.1,) if quick else (0.05, 0.1, 0.2):
        rows += one_site(images, events, share, "one site, 10 % scans", 0.1)
    rows += one_site(images, events, 0.1, "one site, 30 % scans", 0.3)
    targets = []
    fleet_events = events * (2 if quick else 1)
    for share in (0.05,) if quick else (0.02, 0.05, 0.1):
        traces = [list(accesses(seed, images, fleet_events, sites=SITES)) for seed in seeds]
        found = fleet(images, traces, share, f"{SITES} sites")
        rows += found
        seconds = {str(r["policy"]): float(str(r["fetch s"])) for r in found}
        best = min(LOCAL, key=seconds.__getitem__)
        gain = 100 * (1 - seconds[COORDINATED_NAME] / seconds[best])
        name = f"coordinated saves % of fetch seconds against {best}, the best local policy, cache {100 * share:.0f} %"
        targets.append(Target(name, gain, 0.0, gain > 0))
    notes = [
        f"images: {len(images.images)}, {images.bytes / 1e9:.0f} GB in all; the cache is a share of that, at each site",
        f"metros of {METRO} sites at {METRO_MBPS:.0f} Mbps, {WIDE_MBPS:.0f} Mbps between them, "
        f"{ORIGIN_MBPS:.0f} Mbps to the origin; seeds {', '.join(map(str, seeds))}",
        "Belady's is the optimum for equal sizes; here sizes differ by up to 3.3, so it is a bound but for a little",
    ]
    return Report(rows, targets, link="none: replayed", notes=notes)
