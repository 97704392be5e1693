"""Static modes against the adaptive one (adaptive VM handoff): the seed's "fastest speed" and "highest compression".

Streams of memory of real guests, recorded; zstd run for real; link and share of a core virtual (bench/adaptive.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import adaptive
from report import Target

from experiments import model, published
from experiments.model import Bars, Experiment, Form, Kind, Row, ratio
from haulier.compress.xz import name_of

LOADS = {Form.WHOLE: tuple(adaptive.LOADS), Form.QUICK: ("table", "mixed"), Form.LEAST: ("idle",)}
OURS = "haulier's controller"
MEAN = "mean over all scenes"
GOOD = 5
"""The best single level, as bench/adaptive.py found."""


def new() -> Experiment:
    return Experiment(
        "static-modes",
        "Static modes against the adaptive one",
        "What does choosing the compression as the link and the CPU go earn, against levels that stay as they are?",
    )


def units(form: Form) -> dict[str, Callable[[], Experiment]]:
    return {"levels": partial(levels, form)}


def levels(form: Form) -> Experiment:
    found = new()
    for cell in adaptive.cells(adaptive.streams(LOADS[form]), form != Form.WHOLE):
        ways = {
            OURS: cell.ours,
            f"fastest speed (level {min(cell.fixed)})": cell.fixed[min(cell.fixed)],
            f"highest compression ({name_of(max(cell.fixed))})": cell.fixed[max(cell.fixed)],
            f"one good level (level {GOOD})": cell.fixed[GOOD],
            "the best fixed mode of each scene, in hindsight": min(cell.fixed.values()),
            "an oracle that knows link, CPU and costs": cell.oracle,
        }
        least = min(*cell.fixed.values(), cell.oracle)
        found.rows += [
            Row(way, cell.scene, Kind.CALCULATED, {"total s": seconds, "regret": ratio(seconds, least)})
            for way, seconds in ways.items()
        ]
    return found


def finished(found: Experiment) -> Experiment:
    rows = [row for row in model.ours(found.rows) if row.setting != MEAN]
    ways = list(dict.fromkeys(row.way for row in rows))
    mean = {}
    for way in ways:
        regrets = [row.get("regret") or 0.0 for row in rows if row.way == way]
        mean[way] = sum(regrets) / len(regrets)
    steady = [Row(way, MEAN, Kind.CALCULATED, {"regret": mean[way]}) for way in ways]
    found.rows = [*rows, *steady, *published.STATIC_MODES]
    found.bars = [
        Bars(
            "time over that of the best of all fixed levels and the oracle, mean over the scenes", _bars(mean), log=True
        )
    ]
    for scene in ("5-35-5 Mbps", "25 Mbps, CPU hog"):
        shown = [(row.way, row.get("total s"), row.kind) for row in rows if row.setting == scene]
        found.bars += [Bars(f"total, seconds: {scene}", shown, log=True)] if shown else []
    found.targets = []
    if OURS in mean:
        found.targets = [Target.at_most("mean regret of the controller", mean[OURS], 1.05)]
        for way in ways:
            if "speed" in way or "highest" in way:
                value = mean[way] / mean[OURS]
                found.targets.append(Target.at_least(f"times the speed of {way}, mean", value, 1.0))
    found.notes.append(
        "the CPU time of zstd is measured, link and share of the core are virtual; medians over the recorded loads"
    )
    found.notes.append(
        "'in hindsight' is another mode in each scene, which nobody could have set: no single one is that good"
    )
    return found


def _bars(mean: dict[str, float]) -> list[tuple[str, float | None, Kind]]:
    theirs = [
        (row.way, row.get("regret"), Kind.PUBLISHED) for row in published.STATIC_MODES if row.get("regret") is not None
    ]
    return [*((way, value, Kind.CALCULATED) for way, value in mean.items()), *theirs]
