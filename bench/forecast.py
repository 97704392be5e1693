"""What `haulier plan` says and what the handoff then takes, for guests of several loads at several link rates.

Each cell: everything that was kept at both sites is dropped (every other cell keeps it, for a way back), the plan is
made, and the guest handed over. The ratio is what came over what was forecast: 1.00 is a forecast that came true.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

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


def run(quick: bool) -> Report:
    rows: list[dict[str, Any]] = []
    rates = (10, 50) if quick else RATES
    loads = {"memory": LOADS["memory"]} if quick else LOADS
    with scenario("bench-forecast", template(512), [wan("20mbit", f"{RTT_S / 2 * 1000:g}ms")]) as found:
        found.start_guest()
        workload = Workload(found.lab, "client", GUEST_ADDRESS)
        source = "oslo"
        for load, work in loads.items():
            workload.start(work["memory_mib"], **{key: value for key, value in work.items() if key != "memory_mib"})
            for mbps in rates:
                for link in found.lab.links_between("oslo", "lisbon"):
                    found.lab.link(link).set(rate_bps=mbps * 1e6)
                for fresh in (True, False):
                    rows.append(one(found, source, load, mbps, fresh))
                    print(rows[-1], file=sys.stderr, flush=True)
                    source = found.other(source).name
    off = {key: [abs(row[f"{key} ratio"] - 1) for row in rows] for key in ("bytes", "time")}
    return Report(
        rows,
        [
            Target.at_most("median error of bytes, share", statistics.median(off["bytes"]), 0.15),
            Target.at_most("median error of time, share", statistics.median(off["time"]), 0.15),
            Target.at_most("longest plan, s", max(row["made in s"] for row in rows), 5.0),
        ],
        link=f"{min(rates)} to {max(rates)} Mbps, {RTT_S * 1000:g} ms there and back",
    )
