"""Whole handoffs of a VM over one path and two equal ones, alternating; its memory does not compress. Needs root."""

from __future__ import annotations

import os
from statistics import median
from typing import Any

MEMORY_MIB = 64
"""Of random contents, made anew before each handoff, so that neither site has any of it."""
RTT_MS = 20


def one(stage: Any, source: str, target: str, paths: int, seed: int, memory_mib: int = MEMORY_MIB) -> dict[str, Any]:
    from haulier.lab.clients import Workload
    from haulier.lab.scenario import GUEST_ADDRESS

    stage.route(source)
    work = {"random_share": 1.0, "pages_per_s": 20, "hot_pages": 100, "files_per_s": 0.1, "file_kib": 16}
    Workload(stage.lab, "client", GUEST_ADDRESS).start(memory_mib, seed=seed, **work)
    links = stage.lab.links_between("oslo", "lisbon")
    before = [sum(stage.lab.wire_bytes(link)) for link in links]
    stage.lab.link(links[1]).set(up=paths == 2)
    try:
        report = stage.hand_over("web1", source, target)["report"]
    finally:
        stage.lab.link(links[1]).set(up=True)
    crossed = [sum(stage.lab.wire_bytes(link)) - was for link, was in zip(links, before, strict=True)]
    return {
        "total_s": report["total_s"],
        "downtime_ms": report["downtime_ms"],
        "wire_mb": sum(crossed) / 1e6,
        "second": crossed[1] / sum(crossed),
    }


def run(quick: bool) -> Any:
    from report import Report, Target

    from haulier.lab.scenario import scenario, template, wan

    rows: list[dict[str, object]] = []
    targets: list[Target] = []
    if os.geteuid() != 0:
        return Report(rows=rows, notes=["labs need root: nothing was measured"])
    rates = (10,) if quick else (5, 10, 25, 50)
    rounds = 1 if quick else 3
    made = template(512)
    seed = 1
    for rate in rates:
        with scenario("bench-paths", made, [wan(f"{rate}mbit", f"{RTT_MS / 2}ms")] * 2) as stage:
            stage.start_guest()
            found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
            at, to = "oslo", "lisbon"
            for _ in range(rounds):
                for paths in (1, 2):
                    seed += 1
                    found[paths].append(one(stage, at, to, paths, seed))
                    at, to = to, at
        times = {paths: median(each["total_s"] for each in found[paths]) for paths in (1, 2)}
        rows.append(
            {
                "one / two": times[1] / times[2],
                "paths of Mbit/s": rate,
                "one path s": times[1],
                "two paths s": times[2],
                "downtime ms, one": median(each["downtime_ms"] for each in found[1]),
                "two": median(each["downtime_ms"] for each in found[2]),
                "MB, one": median(each["wire_mb"] for each in found[1]),
                "MB, two": median(each["wire_mb"] for each in found[2]),
                "share of the second": median(each["second"] for each in found[2]),
            }
        )
        targets.append(Target.at_least(f"{rate} Mbit/s each: two paths against one", times[1] / times[2], 1.9))
    notes = [f"512 MB of memory, {MEMORY_MIB} MiB of it random and new to both sites; round trip {RTT_MS} ms"]
    return Report(rows=rows, targets=targets, link="one or two lab links, as each row says", notes=notes)
