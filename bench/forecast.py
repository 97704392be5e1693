"""What `haulier plan` says and what the handoff then takes, for guests of several loads at several link rates.

Each cell: everything that was kept at both sites is dropped (every other cell keeps it, for a way back), the plan is
made, and the guest handed over. The ratio is what came over what was forecast: 1.00 is a forecast that came true.

--only takes cells, LOAD[/MBPS], each part with wildcards. With --parts FOLDER what ended is kept there and not measured
again; --steps N measures so many cells (each there and back) more. A site learns how long things take from its own
handoffs: after an interruption it begins that anew.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from experiments.parts import Parts, chosen  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.lab.clients import Workload  # noqa: E402
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, scenario, template, wan  # noqa: E402

LOADS: dict[str, dict[str, Any]] = {
    "idle": {"memory_mib": 16, "pages_per_s": 0, "hot_pages": 1, "files_per_s": 0, "file_kib": 64},
    "memory": {"memory_mib": 64, "pages_per_s": 150, "hot_pages": 400, "files_per_s": 0, "file_kib": 64},
    "files": {"memory_mib": 24, "pages_per_s": 20, "hot_pages": 100, "files_per_s": 2, "file_kib": 256},
}
RATES = (5, 10, 20, 50, 100)
RTT_S = 0.04


def one(found: Scenario, source: str, load: str, mbps: float, fresh: bool) -> dict[str, Any]:
    target = found.other(source).name
    if fresh:
        for site in found.sites.values():
            site.haulier("gc", "--all", timeout=300)
    began = time.monotonic()
    plan = found.sites[source].facts("plan", "web1", "--to", target, timeout=300)
    planned_s = time.monotonic() - began
    report = found.hand_over("web1", source, target)["report"]
    wire = report["wire"]["sent"] + report["wire"]["received"]
    return {
        "bytes ratio": wire / plan["bytes"]["total"],
        "time ratio": report["total_s"] / plan["seconds"]["likely"],
        "downtime ratio": report["downtime_ms"] / plan["downtime_ms"]["likely"],
        "load": load,
        "Mbps": mbps,
        "kept": "no" if fresh else "yes",
        "plan MB": plan["bytes"]["total"] / 1e6,
        "MB": wire / 1e6,
        "plan s": plan["seconds"]["likely"],
        "s": report["total_s"],
        "plan ms": plan["downtime_ms"]["likely"],
        "ms": report["downtime_ms"],
        "in interval": "yes" if plan["seconds"]["low"] <= report["total_s"] <= plan["seconds"]["high"] else "no",
        "made in s": planned_s,
    }


def there_and_back(found: Scenario, load: str, mbps: float) -> list[dict[str, Any]]:
    """A cell with nothing kept and, back, one with what that left."""
    work = LOADS[load]
    Workload(found.lab, "client", GUEST_ADDRESS).start(**work)
    for link in found.lab.links_between("oslo", "lisbon"):
        found.lab.link(link).set(rate_bps=mbps * 1e6)
    rows = []
    for source, fresh in (("oslo", True), ("lisbon", False)):
        rows.append(one(found, source, load, mbps, fresh))
        print(f"{time.strftime('%H:%M:%S')} {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def measured(cells: Sequence[tuple[str, int]], parts: Parts, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of the cells; what failed is in the notes, and has the next cells begin in a lab of their own."""
    due = list(cells)
    while due:
        if parts.kept(part(*due[0])) is not None:
            yield from parts.kept(part(*due.pop(0)))
            continue
        if parts.spent:
            notes.append(f"not run yet: {part(*due.pop(0))}")
            continue
        with scenario("bench-forecast", template(512), [wan("20mbit", f"{RTT_S / 2 * 1000:g}ms")]) as found:
            found.start_guest()
            while due:
                load, mbps = due.pop(0)
                rows = parts.attempt(part(load, mbps), partial(there_and_back, found, load, mbps), notes)
                if rows is None and not parts.spent:
                    break
                yield from rows or ()


def part(load: str, mbps: int) -> str:
    return f"forecast: {load}/{mbps}"


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Report:
    loads, rates = (("memory",), (10, 50)) if quick and not only else (tuple(LOADS), RATES)
    cells = [(load, mbps) for load in loads for mbps in rates if chosen(f"{load}/{mbps}", only)]
    notes: list[str] = []
    rows = list(measured(cells, Parts(parts, steps), notes))
    return Report(rows, targets(rows), f"{min(rates)} to {max(rates)} Mbps, {RTT_S * 1000:g} ms there and back", notes)


def targets(rows: list[dict[str, Any]]) -> list[Target]:
    if not rows:
        return []
    off = {key: [abs(row[f"{key} ratio"] - 1) for row in rows] for key in ("bytes", "time", "downtime")}
    return [
        Target.at_most("median error of bytes, share", statistics.median(off["bytes"]), 0.15),
        Target.at_most("median error of time, share", statistics.median(off["time"]), 0.15),
        Target.at_most("median error of downtime, share", statistics.median(off["downtime"]), 0.5),
        Target.at_most("longest plan, s", max(row["made in s"] for row in rows), 5.0),
    ]
