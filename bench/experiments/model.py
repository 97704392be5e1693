"""The one shape in which every experiment tells what it found. Pure.

A row is one way of doing a thing in one setting: figures by name, each name ending in its unit ("total s", "MB",
"downtime ms"). Its kind says where the figures come from, so that nobody takes a paper's figure for one of ours.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from report import Target

RUNS = 3
"""Of every way in every setting, in the whole form."""


class Form(enum.StrEnum):
    """How much of the experiments is run."""

    WHOLE = "whole"
    QUICK = "quick"
    """Each experiment in its small form: under ten minutes in all."""
    LEAST = "least"
    """The smallest part of each that still has something to check: under three minutes in all."""


class Kind(enum.StrEnum):
    """Where a row's figures come from."""

    MEASURED = "measured"
    EXTRAPOLATED = "extrapolated"
    """Measured until given up, and from there on by what was left and the measured rate; a lower bound."""
    CALCULATED = "calculated"
    """Replayed or simulated, with no link and no guest."""
    PUBLISHED = "published"
    """Theirs: of a paper, on its authors' machines."""
    NOT_BUILT = "not built yet"
    NOT_RUN = "not run"


Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Row:
    """`way`: who does it and how. `setting`: link, guest, load. `runs`: whose median it is."""

    way: str
    setting: str
    kind: Kind
    figures: Figures
    runs: int = 1
    note: str = ""

    def get(self, name: str) -> float | None:
        return self.figures.get(name)


@dataclass(frozen=True)
class Check:
    """One thing in which figures must agree with each other. `limit` in the unit of `value`; at most that is right."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Handoff:
    """One handoff over time, for its plot. Seconds from its beginning; bytes on the wire.

    `points`: {"at", "wire", "rate_bps", "left"}. `origins`: bytes of wire by what they carried. `raw`: bytes of the
    guest by how they were found at the target.
    """

    title: str
    total_s: float
    downtime_ms: float
    phases: Sequence[Mapping[str, Any]]
    points: Sequence[Mapping[str, float]]
    origins: Mapping[str, float]
    raw: Mapping[str, float]


@dataclass(frozen=True)
class Bars:
    """A picture: bars with labels; `shares` in one unit, named in the title. None = nothing to draw, only said."""

    title: str
    bars: Sequence[tuple[str, float | None, Kind]]
    log: bool = False


@dataclass
class Experiment:
    """One experiment's findings. `question` is what it answers, in a sentence."""

    name: str
    title: str
    question: str
    rows: list[Row] = field(default_factory=list)
    handoffs: list[Handoff] = field(default_factory=list)
    bars: list[Bars] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` is its inverse."""
        found = asdict(self)
        for check, made in zip(self.checks, found["checks"], strict=True):
            made["ok"] = check.ok
        return found


def from_dict(found: Mapping[str, Any]) -> Experiment:
    """The inverse of `Experiment.as_dict`."""
    return Experiment(
        name=found["name"],
        title=found["title"],
        question=found["question"],
        rows=[Row(**{**row, "kind": Kind(row["kind"])}) for row in found["rows"]],
        handoffs=[Handoff(**one) for one in found["handoffs"]],
        bars=[
            Bars(one["title"], [(label, value, Kind(kind)) for label, value, kind in one["bars"]], one["log"])
            for one in found["bars"]
        ],
        checks=[Check(one["name"], one["value"], one["limit"]) for one in found["checks"]],
        targets=[Target(**one) for one in found["targets"]],
        notes=list(found["notes"]),
        seconds=found["seconds"],
    )


def merged(rows: Iterable[Row]) -> list[Row]:
    """Repeated rows (same way, setting and kind) as one each: the median of every figure, in order of appearance, and
    in the note from where to where the first that differs went."""
    groups: dict[tuple[str, str, Kind], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.way, row.setting, row.kind), []).append(row)
    found = []
    for (way, setting, kind), same in groups.items():
        names = dict.fromkeys(name for row in same for name in row.figures)
        figures = {name: middle(row.get(name) for row in same) for name in names}
        notes = "; ".join(dict.fromkeys(filter(None, [*(row.note for row in same), spread(same)])))
        found.append(Row(way, setting, kind, figures, sum(row.runs for row in same), notes))
    return found


def spread(same: Sequence[Row]) -> str:
    """Least and greatest of the first figure that differs between measured rows; nothing of a single one."""
    for name in same[0].figures if same[0].kind in (Kind.MEASURED, Kind.EXTRAPOLATED) else ():
        known = [value for row in same if (value := row.get(name)) is not None]
        if known and min(known) < max(known):
            return f"{name} {min(known):.4g} to {max(known):.4g}"
    return ""


def ours(rows: Iterable[Row]) -> list[Row]:
    """Those with figures of this run, repeated ones as one each (`merged`)."""
    return merged(row for row in rows if row.kind in (Kind.MEASURED, Kind.EXTRAPOLATED, Kind.CALCULATED))


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are there."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def best(rows: Iterable[Row], figure: str, wanted: Callable[[Row], bool] = lambda row: True) -> Row | None:
    """The row with the smallest such figure."""
    fit = [row for row in rows if wanted(row) and row.get(figure) is not None]
    return min(fit, key=lambda row: row.get(figure) or 0.0, default=None)


def ratio(one: float | None, other: float | None) -> float | None:
    """`one` over `other`, if both are there."""
    return one / other if one is not None and other else None
