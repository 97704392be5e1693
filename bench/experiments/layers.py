"""Three layers (base, application, instance) of containers and virtual machines, the application's found at the target
or not (three-layer handoff)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from report import Target

import containers
from experiments import model, published
from experiments.measuring import lacking
from experiments.model import Bars, Experiment, Form, Kind, Row, ratio

OURS, THEIRS = "haulier", "rsync, dump, rsync, restore (the published method)"
APPS = ("none", "game", "memory", "video", "faces")
RATES = (100, 10)
PREFIX = {containers.RUNC: "", containers.VM: "VM with "}
"""What names of units and settings begin with, by the kind of guest."""


def new() -> Experiment:
    return Experiment(
        "layers",
        "Three layers, five applications",
        "What does a handoff take when the target has the application, or only the base, by haulier and by rsync?",
    )


def units(form: Form) -> dict[str, Callable[[], Experiment]]:
    if form != Form.WHOLE:
        return {"game 100": partial(cells, [(containers.RUNC, "game", 100, containers.FOUND)])}
    # What takes minutes at 10 Mbps whatever is done (110 MB of random bytes) is left to the faster link.
    ats = (containers.FOUND, containers.ABSENT)
    wanted = [(kind, app, rate, at) for kind in PREFIX for rate in RATES for app in APPS for at in ats]
    # Those of one lab together: it takes as long to set up as a cell to measure.
    labs: dict[str, list[containers.Cell]] = {}
    for kind, app, rate, at in wanted:
        if rate == RATES[0] or app not in ("memory", "video") or at == containers.FOUND:
            one = app if kind == containers.VM and at == containers.ABSENT else "all"
            labs.setdefault(f"{PREFIX[kind]}{one} {rate} {at}", []).append((kind, app, rate, at))
    return {name: partial(cells, together) for name, together in labs.items()}


def cells(wanted: list[containers.Cell]) -> Experiment:
    found = new()
    report = containers.run_cells(wanted)
    lacking(found, report)
    for row in report.rows:
        prefix = PREFIX[str(row["kind"])]
        setting = f"{prefix}{row['application']}, {row['Mbit/s']} Mbps, layer at target: {row['layer at target']}"
        for way, name in ((OURS, "haulier"), (THEIRS, "rsync")):
            figures = {
                "total s": row[f"{name} s"],
                "downtime ms": row[f"{name} ms down"],
                "client's gap ms": row[f"{name} ms gap"],
                "MB": row[f"{name} MB"],
            }
            if way == OURS or row["layer at target"] != containers.BACK:
                found.rows.append(Row(way, setting, Kind.MEASURED, figures))
    return found


def finished(found: Experiment) -> Experiment:
    rows = model.ours(found.rows)
    found.rows = [*rows, Row("VMs: RAM x bandwidth", "see 'Bandwidth and memory'", Kind.NOT_RUN, {}), *published.LAYERS]
    found.bars, found.targets = [], []
    settings = list(dict.fromkeys(row.setting for row in rows))
    for unit, figure in (("total, seconds", "total s"), ("downtime, ms", "downtime ms"), ("MB on the wire", "MB")):
        bars = [(f"{row.setting}: {row.way[:7]}", row.get(figure), row.kind) for row in rows]
        found.bars += [Bars(unit, bars, log=True)] if bars else []
    for where in settings:
        ours, theirs = (next((r for r in rows if r.setting == where and r.way == way), None) for way in (OURS, THEIRS))
        if ours is None:
            continue
        found.targets.append(Target.at_most(f"{where}: downtime ms", ours.get("downtime ms") or 0.0, 500.0))
        if theirs is not None:
            times = ratio(theirs.get("total s"), ours.get("total s"))
            found.targets.append(Target.at_least(f"{where}: rsync's time over haulier's", times or 0.0, 1.0))
    found.notes += containers.NOTES
    return found
