"""The published experiments repeated side by side: bench/run seeds [--quick | --least] [--only NAME] [--html FILE]."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from experiments import page as pages  # noqa: E402
from experiments.model import RUNS, Check, Experiment, Form  # noqa: E402
from experiments.parts import Enough, Parts, joined  # noqa: E402
from report import Report  # noqa: E402

NAMES = (
    "live-migration",
    "static-modes",
    "paths",
    "layers",
    "left-behind",
    "slicing",
    "ablation",
)


ONCE = {"static-modes": ("levels",), "slicing": ("caches",)}
"""Units, by what their names begin with, that are not repeated: they are calculated."""


@dataclass(frozen=True)
class Experiments(Report):
    """All that ran; their rows are the table's too, with their figures in one column each experiment shares."""

    experiments: Sequence[Experiment] = field(default_factory=list)

    def more(self) -> dict[str, object]:
        """What the JSON has beside every benchmark's keys."""
        return {
            "experiments": [each.as_dict() for each in self.experiments],
            "command": " ".join(["bench/run", *sys.argv[1:]]),
        }


def run(
    quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0, least: bool = False
) -> Experiments:
    """Runs the experiments named (all, if none is). A unit that fails says so in its notes and has a failed check.

    `least`: less than `quick`, the smallest part of each that has something to check. With `parts` what ended is kept
    there, and taken from there the next time; `steps`: units that may run this time.
    """
    unknown = set(only) - set(NAMES)
    if unknown:
        sys.exit(f"no experiment {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    kept = Parts(parts, steps)
    form = Form.LEAST if least else Form.QUICK if quick else Form.WHOLE
    return report([one(name, form, kept) for name in NAMES if not only or name in only])


def one(name: str, form: Form, parts: Parts) -> Experiment:
    module = importlib.import_module(f"experiments.{name.replace('-', '_')}")
    found: Experiment = module.new()
    left: list[str] = []
    size = "" if form == Form.WHOLE else f" {form}"
    for unit, run in repeated(name, module.units(form), form).items():
        try:
            joined(found, [parts.do(f"{name}{size}: {unit}", partial(timed, name, unit, run))])
        except Enough:
            left.append(unit)
        except Exception as error:
            traceback.print_exc()
            found.notes.append(f"{unit} failed: {type(error).__name__}: {error}")
            found.checks.append(Check(f"{unit}: ran to its end", 1.0, 0.0))
    if left:
        found.notes.append(f"not run yet: {'; '.join(left)}")
    finished: Experiment = module.finished(found)
    return finished


def repeated(
    name: str, units: Mapping[str, Callable[[], Experiment]], form: Form
) -> dict[str, Callable[[], Experiment]]:
    """All units, and in the whole form all of them again as "UNIT #2" and "#3": in turn, so that the ways of
    doing a thing alternate. Rows of the same way in the same setting become their median (`model.merged`)."""
    found = dict(units)
    for number in range(2, RUNS + 1) if form == Form.WHOLE else ():
        found |= {
            f"{unit} #{number}": partial(without_pictures, run)
            for unit, run in units.items()
            if not unit.startswith(ONCE.get(name, ()))
        }
    return found


def without_pictures(run: Callable[[], Experiment]) -> Experiment:
    """A repetition's rows, checks and notes: the page shows the time lines of the first run."""
    return replace(run(), handoffs=[], bars=[])


def timed(name: str, unit: str, run: Callable[[], Experiment]) -> Experiment:
    print(f"== {name}: {unit}", file=sys.stderr, flush=True)
    began = time.monotonic()
    found = run()
    found.seconds = time.monotonic() - began
    return found


def report(experiments: Sequence[Experiment]) -> Experiments:
    rows = [
        {"experiment": each.name, "way": row.way, "setting": row.setting, "kind": row.kind.value}
        | {"figures": ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items() if value is not None)}
        for each in experiments
        for row in each.rows
    ]
    return Experiments(
        rows=rows,
        targets=[target for each in experiments for target in each.targets],
        link="as each row says",
        notes=[
            *(f"{each.name}: {note}" for each in experiments for note in each.notes),
            *(
                f"{each.name}: INCONSISTENT: {check.name}: {check.value:.3g}, at most {check.limit:g}"
                for each in experiments
                for check in each.checks
                if not check.ok
            ),
        ],
        experiments=experiments,
    )


page = pages.page
