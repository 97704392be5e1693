"""Slicing and caching (VM slicing paper, which only planned its evaluation): shares of chunks that the target has,
numbers of sources, cache policies; and chunks that change often held back until the end, or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cache
import multisource
from report import Target

from experiments import model
from experiments.live_migration import adopted
from experiments.measuring import checks, crossing, switched_off
from experiments.model import Bars, Experiment, Form, Kind, Row
from haulier.lab.clients import Workload
from haulier.lab.scenario import GUEST_ADDRESS, scenario, template, wan
from haulier.policy.traces import accesses, catalogue
from haulier.without import ORDER

RATES, RTTS = (40, 40, 40), (20, 50, 80)
CACHED = (0.0, 0.25, 0.5, 0.75)
WORK = {"pages_per_s": 50, "hot_pages": 500, "files_per_s": 0.5, "file_kib": 256, "random_share": 0.5}


@dataclass(frozen=True)
class Rewriting:
    """A file written anew again and again, as a small database does with its newest pages."""

    kib: int
    pause_s: float
    downtime_ms: int
    told: str

    @property
    def command(self) -> str:
        one = f"dd if=/dev/urandom of=/var/tmp/table bs={self.kib}k count=1 conv=notrunc,fsync"
        return f"(while :; do {one}; sleep {self.pause_s}; done) > /dev/null 2>&1 < /dev/null &"


SMALL = Rewriting(64, 0.4, 300, "10 Mbps, 50 ms, the same 64 KiB of a file written anew twice a second")
LARGE = Rewriting(
    256, 1.0, 1000, "10 Mbps, 50 ms, the same 256 KiB written anew once a second, 1 s of downtime allowed"
)
ORDER_ON, ORDER_OFF = "chunks that change often go last", "chunks go as they come (order off)"


def new() -> Experiment:
    return Experiment(
        "slicing",
        "Slicing and caching",
        "How do time and bytes follow the share of chunks cached, the number of sources, the policy, the order?",
    )


def units(form: Form) -> dict[str, Callable[[], Experiment]]:
    found: dict[str, Callable[[], Experiment]] = {
        Form.WHOLE: {"sources": partial(sources, (1, 2, 3), 16, CACHED)},
        Form.QUICK: {"sources": partial(sources, (1, 2, 3), 4, (0.0, 0.5))},
        Form.LEAST: {"sources": partial(sources, (1, 3), 1, (0.0,))},
    }[form]
    found["caches"] = partial(caches, form != Form.WHOLE)
    if form == Form.WHOLE:
        found |= {"order": partial(order, SMALL), "order, larger": partial(order, LARGE)}
    return found


def sources(counts: tuple[int, ...], seconds: int, cached: tuple[float, ...]) -> Experiment:
    """A set of chunks fetched from one, two and three sites that hold them; then with a part already there."""
    found = new()
    with multisource.holding(RATES, RTTS, seconds) as (made, wanted):
        for count in counts:
            names = list(multisource.SOURCES[:count])
            for share in cached if count == 3 else (0.0,):
                one = multisource.one(made, wanted, names, cached=share)
                figures = {
                    "total s": one["seconds"],
                    "MB": one["bytes"] / 1e6,
                    "Mbps": one["bytes"] * 8 / one["seconds"] / 1e6,
                    "sources": count,
                    "cached %": 100 * share,
                }
                way = f"fetch from {count} source{'s' * (count > 1)}, {100 * share:.0f} % cached"
                found.rows.append(Row(way, f"{RATES[0]} Mbps each, {RTTS[:count]} ms", Kind.MEASURED, figures))
    return found


def caches(quick: bool) -> Experiment:
    found = new()
    images = catalogue(7, images=60 if quick else 200)
    events = 800 if quick else 8000
    for share in (0.1,) if quick else (0.05, 0.1, 0.2):
        one_site = cache.one_site(images, events, share, "one site", 0.1)
        trace = [list(accesses(cache.SEEDS[0], images, events, sites=cache.SITES))]
        many = cache.fleet(images, trace, share / 2, f"{cache.SITES} sites")
        for row in [*one_site, *many]:
            setting = f"{row['trace']}, cache {row['cache']} of all images at each site"
            figures = {"fetch s": row["fetch s"], "hits %": row["hits by bytes %"], "origin GB": row["origin GB"]}
            found.rows.append(Row(f"cache policy {row['policy']}", setting, Kind.CALCULATED, figures))
    return found


def order(file: Rewriting) -> Experiment:
    """A guest that writes the same files again and again, handed over with and without holding them back."""
    found = new()
    for way, off in ((ORDER_ON, ""), (ORDER_OFF, ORDER)):
        with switched_off(off):
            found.rows += order_rows(found, way, file)
    return found


def order_rows(found: Experiment, way: str, file: Rewriting) -> list[Row]:
    rows = []
    with scenario("bench-seeds", template(512), [wan("10mbit", "25ms")]) as lab:
        lab.start_guest()
        workload = Workload(lab.lab, "client", GUEST_ADDRESS)
        workload.start(48, **WORK)
        with adopted(lab, "oslo") as qemu, qemu.guest_agent(60) as agent:
            agent.check(["/bin/sh", "-c", file.command])
        time.sleep(8)
        with crossing(lab) as crossed:
            words = ("--check", "--downtime", f"{file.downtime_ms}ms")
            report = lab.hand_over("web1", "oslo", "lisbon", *words)["report"]
        verified = lab.lisbon.facts("verify", "web1", timeout=300)
        origin = report["disk"]["origin"]
        figures = {
            "total s": report["total_s"],
            "downtime ms": report["downtime_ms"],
            "MB": crossed.bytes / 1e6,
            "disk MB": origin["wire_bytes"] / 1e6,
            "chunks held back": max(each.get("held", 0) for each in report["disk"]["rounds"]),
            "chunks sent again": origin["chunks_resent"],
        }
        rows.append(Row(way, file.told, Kind.MEASURED, figures))
        found.checks += checks(f"{way}, {file.kib} KiB", report, crossed, bool(verified["ok"]))
    return rows


def finished(found: Experiment) -> Experiment:
    rows = model.ours(found.rows)
    found.rows, found.bars, found.targets = rows, [], []
    fetched = [row for row in rows if row.way.startswith("fetch")]
    if fetched:
        found.bars.append(Bars("fetch, seconds", [(row.way, row.get("total s"), row.kind) for row in fetched]))
        three = next((row for row in fetched if row.get("sources") == 3 and not row.get("cached %")), None)
        if three is not None:
            share = (three.get("Mbps") or 0.0) / sum(RATES)
            found.targets.append(Target.at_least("three sources: share of the sum of their links", share, 0.9))
    for setting in dict.fromkeys(row.setting for row in rows if row.way.startswith("cache policy")):
        some = [(row.way, row.get("fetch s"), row.kind) for row in rows if row.setting == setting]
        found.bars.append(Bars(f"seconds of fetching: {setting}", some))
    ordered = [row for row in rows if row.way in (ORDER_ON, ORDER_OFF)]
    for setting in dict.fromkeys(row.setting for row in ordered):
        some = [(row.way, row.get("MB"), row.kind) for row in ordered if row.setting == setting]
        found.bars.append(Bars(f"order, MB on the wire: {setting}", some))
    found.notes.append("the paper has no figures: it planned this evaluation, so nothing of theirs stands beside ours")
    found.notes.append("cache policies are replayed on made-up traces (bench/cache.py says how)")
    return found
