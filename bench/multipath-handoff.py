"""Whole handoffs of a VM over one path and two equal ones, in turn; its memory does not compress. Needs root.

Memory from 256 MiB to 1 GiB over paths of 50 Mbit/s, and 256 MiB over paths of 5 to 100 Mbit/s (128 MiB at 10, 64 at
5). --only takes cells, MBPS/MIB, with wildcards (50/*). With --parts FOLDER each handoff is kept there, and is not
measured again; --steps N measures so many handoffs more.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

MEMORY_MIB = 64
"""Of random contents, made anew before each handoff, so that neither site has any of it."""
RTT_MS = 20
QUICK = ((10, 64),)
CELLS = ((50, 256), (50, 512), (50, 1024), (5, 64), (10, 128), (25, 256), (100, 256))
"""Mbit/s of each path, MiB of new memory."""
GUEST_MIB, LARGE_MIB = 512, 1536
"""Of the larger one there is no snapshot: it boots."""


def one(stage: Any, source: str, target: str, paths: int, seed: int, memory_mib: int = MEMORY_MIB) -> dict[str, Any]:
    from haulier.lab.clients import Workload
    from haulier.lab.scenario import GUEST_ADDRESS

    stage.route(source)
    work = {"random_share": 1.0, "pages_per_s": 20, "hot_pages": 100, "files_per_s": 0.1, "file_kib": 16}
    workload = Workload(stage.lab, "client", GUEST_ADDRESS)
    workload.start(1)  # lets go of what it had, which would not fit beside the new
    workload.start(memory_mib, seed=seed, **work)
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
        "report": report,
    }


class Moving:
    """A guest on a pair of paths of one rate, made when it is first needed; it goes to and fro."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._mbps = 0
        self._seed = 0
        self._stage: Any = None
        self._at, self._to = "oslo", "lisbon"

    def hand_over(self, mbps: int, mib: int, paths: int) -> dict[str, Any]:
        from haulier.lab.scenario import scenario, template, wan

        print(f"== multipath-handoff: {mbps}/{mib}, {paths} of 2 paths", file=sys.stderr, flush=True)
        if self._mbps != mbps:
            self.close()
            links = [wan(f"{mbps}mbit", f"{RTT_MS / 2}ms")] * 2
            self._stage = self._open.enter_context(scenario("bench-paths", template(512), links))
            most = max(size for rate, size in (*QUICK, *CELLS) if rate == mbps)
            self._stage.start_guest(memory=f"{GUEST_MIB if most <= GUEST_MIB / 2 else LARGE_MIB}M")
            self._mbps = mbps
        self._seed += 1
        found = one(self._stage, self._at, self._to, paths, self._seed, mib)
        del found["report"]  # too long to keep
        self._at, self._to = self._to, self._at
        return found

    def close(self) -> None:
        self._mbps, self._at, self._to = 0, "oslo", "lisbon"
        self._open.close()


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Any:
    from experiments.parts import Parts, chosen
    from report import Report

    if os.geteuid() != 0:
        return Report(rows=[], notes=["labs need root: nothing was measured"])
    kept, moving = Parts(parts, steps), Moving()
    report: Any = Report(
        rows=[],
        targets=[],
        link="one or two lab links, as each row says",
        notes=[f"round trip {RTT_MS} ms; the new memory is random, the guest has {GUEST_MIB} MiB, or {LARGE_MIB}"],
    )
    with contextlib.closing(moving):
        for mbps, mib in QUICK if quick else CELLS:
            if not chosen(f"{mbps}/{mib}", only):
                continue
            found: dict[int, list[dict[str, Any]]] = {}
            for paths in (1, 2):
                name = f"multipath-handoff: {mbps}/{mib}, {paths} of 2 paths"
                done = kept.attempt(name, partial(moving.hand_over, mbps, mib, paths), report.notes)
                if done is not None:
                    found.setdefault(paths, []).append(done)
                    continue
                with contextlib.suppress(Exception):
                    moving.close()
            if len(found) == 2:
                enter(report, mbps, mib, found)
    return report


def enter(report: Any, mbps: int, mib: int, found: dict[int, list[dict[str, Any]]]) -> None:
    """A cell's row and target."""
    from report import Target

    def middle(paths: int, key: str) -> float:
        return float(median(each[key] for each in found[paths]))

    ratio = middle(1, "total_s") / middle(2, "total_s")
    report.rows.append(
        {
            "one / two": ratio,
            "paths of Mbit/s": mbps,
            "MiB": mib,
            "one path s": middle(1, "total_s"),
            "two paths s": middle(2, "total_s"),
            "downtime ms, one": middle(1, "downtime_ms"),
            "two": middle(2, "downtime_ms"),
            "MB, one": middle(1, "wire_mb"),
            "MB, two": middle(2, "wire_mb"),
            "share of the second": middle(2, "second"),
        }
    )
    if middle(1, "total_s") >= 15:
        # Of a shorter handoff most is what no link decides.
        report.targets.append(Target.at_least(f"{mbps} Mbit/s each, {mib} MiB: two paths against one", ratio, 1.9))
