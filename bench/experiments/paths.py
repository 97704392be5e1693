"""Bandwidth and memory over one path and two, and the client's throughput after the move (migration over MPTCP)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from report import Target

from experiments import model, published
from experiments.measuring import checks, crossing, lacking
from experiments.model import Bars, Experiment, Form, Kind, Row, ratio

connection: Any = importlib.import_module("connection")
handoffs: Any = importlib.import_module("multipath-handoff")

RATES = (5, 10, 25, 50)
MEMORY = (16, 64, 160)
"""MiB of random contents in a guest of 512, new to both sites."""
WAYS = {1: "haulier, one path", 2: "haulier, two paths"}


def new() -> Experiment:
    return Experiment(
        "paths",
        "Bandwidth and memory over one path and two",
        "What does a second path earn at which bandwidth and memory, and what has the guest's client after the move?",
    )


def units(form: Form) -> dict[str, Callable[[], Experiment]]:
    if form != Form.WHOLE:
        return {"sweep 25 Mbps": partial(sweep, 25, (32,) if form == Form.QUICK else (8,), 1)}
    found: dict[str, Callable[[], Experiment]] = {
        f"sweep {rate} Mbps": partial(sweep, rate, MEMORY if rate >= 10 else MEMORY[:2], 1) for rate in RATES
    }
    return found | {"client": client}


def setting(rate: float, memory: float) -> str:
    return f"{rate:g} Mbps a path, {handoffs.RTT_MS} ms, {memory:g} MiB new"


def sweep(rate: int, memory: tuple[int, ...], runs: int) -> Experiment:
    from haulier.lab.scenario import scenario, template, wan

    found, seed, (at, to) = new(), 1, ("oslo", "lisbon")
    with scenario("bench-seeds", template(512), [wan(f"{rate}mbit", f"{handoffs.RTT_MS / 2}ms")] * 2) as stage:
        stage.start_guest()
        for mib in memory:
            for paths in [1, 2] * runs:
                seed += 1
                with crossing(stage) as crossed:
                    one = handoffs.one(stage, at, to, paths, seed, mib)
                found.checks += checks(f"{setting(rate, mib)}, {WAYS[paths]}", one["report"], crossed, None)
                figures = {"total s": one["total_s"], "downtime ms": one["downtime_ms"], "MB": one["wire_mb"]}
                figures |= {"share of the second path": one["second"], "Mbps": rate, "MiB": mib}
                found.rows.append(Row(WAYS[paths], setting(rate, mib), Kind.MEASURED, figures))
                at, to = to, at
    return found


def client() -> Experiment:
    """What one client sees: bench/connection.py, its rows as they are."""
    found = new()
    report = connection.run(True)
    lacking(found, report)
    for row in report.rows:
        figures = {"Mbps before": row["Mbit/s before"], "Mbps after": row["after"], "gap s": row["gap s"]}
        figures |= {"after/before": row["after / before"], "downtime ms": 1000 * row["downtime s"]}
        found.rows.append(Row(f"client: {row['policy']}", "client 10 ms from either site", Kind.MEASURED, figures))
    return found


def finished(found: Experiment) -> Experiment:
    rows = model.ours(found.rows)
    found.rows = [*rows, *published.PATHS]
    found.bars, found.targets = [], []
    settings = list(dict.fromkeys(row.setting for row in rows if row.way in WAYS.values()))
    speed = []
    for where in settings:
        one, two = (next((r for r in rows if r.setting == where and r.way == way), None) for way in WAYS.values())
        if one is None or two is None:
            continue
        found.bars.append(
            Bars(f"total, seconds: {where}", [(row.way, row.get("total s"), row.kind) for row in (one, two)])
        )
        value = ratio(one.get("total s"), two.get("total s"))
        speed.append((where, value, Kind.MEASURED))
        if value is not None and (one.get("total s") or 0) >= 15:
            found.targets.append(Target.at_least(f"{where}: one path's time over two paths'", value, 1.9))
    for way in WAYS.values():
        swept = [(row.setting, row.get("total s"), row.kind) for row in rows if row.way == way]
        found.bars += [Bars(f"RAM x bandwidth, {way}: total, seconds", swept, log=True)] if swept else []
    if speed:
        theirs = [(row.way, row.get("one two"), row.kind) for row in published.PATHS if row.get("one two")]
        found.bars.insert(0, Bars("one path's time over two paths'", [*speed, *theirs]))
    found.notes.append(
        "the aim of 1.9 is for handoffs of at least 15 s on one path: shorter ones are mostly what no link decides"
    )
    if not any(row.way.startswith("client") for row in rows):
        found.rows.append(Row("client's throughput after the move", "", Kind.NOT_RUN, {}, note="bench/run connection"))
    return found
