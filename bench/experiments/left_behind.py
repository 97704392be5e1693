"""Data left behind (shared-folder paper): nothing, part, or all of the user data asked for after the move; and that
paper's table of techniques against a guest that writes faster than the link carries, as rows measured here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import convergence
import waypoints
from report import Target
from tests.support.fleet import fleet

from experiments import model
from experiments.model import Bars, Experiment, Form, Kind, Row, ratio
from haulier.handoff.measures import ALLOWABLE
from haulier.lab.scenario import template
from haulier.lab.stock import MODES

on_demand: Any = importlib.import_module("on-demand")

FULL, LEFT = "everything first (--disk full)", "left behind (--disk on-demand)"
RATE = "100mbit"
PAGES, MBPS = 1000, 10
GIVE_UP_S = 60.0
PATIENT = ("auto-converge", "best, auto-converge", "post-copy")
PATIENCE_S = 240.0
"""For those of stock QEMU that slow the guest or let it go: it takes them three minutes to send its memory once."""
TECHNIQUES = {
    "default": "QEMU, pre-copy",
    "xbzrle": "QEMU, XBZRLE",
    "best": "QEMU, multifd with zstd",
    "best, auto-converge": "QEMU, multifd with zstd, auto-converge",
    "auto-converge": "QEMU, auto-converge",
    "post-copy": "QEMU, post-copy after the first pass",
}
OUTRUN = f"guest asked to rewrite {PAGES} pages a second, {MBPS} Mbps, 40 ms"


def new() -> Experiment:
    return Experiment(
        "left-behind",
        "Data left behind, and techniques against a guest that outruns the link",
        "What does it earn not to bring what nobody asks for, and what moves a guest that never stops writing?",
    )


def scenarios(files: int) -> dict[str, tuple[int, int, float]]:
    """First and last file that is read after the move, and the pause after each; a tenth is in use before."""
    used, part = max(1, files // 10), max(1, files // 20)
    return {
        "nothing more asked for": (1, 0, 0.0),
        "a part asked for": (used + 1, used + part, 0.0),
        "all asked for": (used + 1, files, 0.2),
    }


def units(form: Form) -> dict[str, Callable[[], Experiment]]:
    if form != Form.WHOLE:
        return {"a part": partial(behind, 6 if form == Form.QUICK else 2, "a part asked for")}
    found: dict[str, Callable[[], Experiment]] = {what: partial(behind, 40, what) for what in scenarios(40)}
    found |= {f"stock {mode}": partial(stock, mode) for mode in MODES}
    found |= {f"waypoints: {setting}": partial(scattered, setting) for setting in waypoints.SETTINGS}
    for words in ((), ("--downtime", "1000ms"), *(("--allow", name) for name in ALLOWABLE)):
        found[" ".join(("haulier", *words))] = partial(ours, words)
    return found


def behind(files: int, what: str) -> Experiment:
    found, made_of = new(), template(512)
    first, last, pause = scenarios(files)[what]
    used = max(1, files // 10)
    setting = f"{files * on_demand.PIECE_MB} MB of user data, a tenth in use; {RATE}, 20 ms; {what}"
    links = [("oslo", "lisbon", RATE, "10ms")]
    with fleet(["oslo", "lisbon"], links, guests=True, prepare=lambda name, root: made_of.copy_to(root)) as made:
        for number, (way, disk) in enumerate(((FULL, "full"), (LEFT, "on-demand"))):
            guest = f"g{number}"
            on_demand.prepare_guest(made, guest, f"10.77.0.{100 + number}/24", files, used)
            one = on_demand.one(made, guest, disk, first, last, pause)
            figures = {
                "first answer s": one["answer_s"],
                "handoff s": one["handoff_s"],
                "downtime ms": one["downtime_ms"],
                "MB": one["bytes"] / 1e6,
                "left behind MB": one["left"] / 1e6,
                "all read after s": one["total_s"],
            }
            found.rows.append(Row(way, setting, Kind.MEASURED, figures))
            made["lisbon"].client.delete(f"/v1/guests/{guest}?force=1")
    return found


def technique(way: str, cell: dict[str, Any]) -> Experiment:
    found = new()
    figures = {
        "total s": cell.get("total s"),
        "whole s": cell.get("whole s"),
        "longest wait for a page ms": cell.get("page ms"),
        "downtime ms": cell.get("downtime ms"),
        "first answer ms": cell.get("first answer ms"),
        "MB": cell.get("MB"),
        "work lost": cell.get("lost"),
    }
    note = "" if cell["done"] == "yes" else f"{cell['done']}: the guest runs on at the source"
    found.rows.append(Row(way, OUTRUN, Kind.MEASURED, figures, note=note))
    return found


def stock(mode: str) -> Experiment:
    give_up_s = PATIENCE_S if mode in PATIENT else GIVE_UP_S
    return technique(TECHNIQUES[mode], convergence.stock(mode, PAGES, MBPS, give_up_s))


def ours(words: tuple[str, ...]) -> Experiment:
    return technique(" ".join(("haulier", *words)), convergence.ours(PAGES, MBPS, 3 * GIVE_UP_S, *words))


def scattered(setting: str) -> Experiment:
    """Memory through other sites, which is what haulier has for scatter-gather."""
    found = new()
    with waypoints.sites(setting) as made:
        for number, way in enumerate(waypoints.SETTINGS[setting]):
            figures = waypoints.one(made, way, number)
            found.rows.append(Row(f"haulier, memory {way}", setting, Kind.MEASURED, dict(figures)))
    return found


def finished(found: Experiment) -> Experiment:
    rows = model.ours(found.rows)
    found.bars, found.targets = [], []
    for setting in waypoints.SETTINGS:
        spread = [row for row in rows if row.setting == setting]
        if spread:
            found.bars.append(Bars(f"total, seconds: {setting}", [(r.way, r.get("total s"), r.kind) for r in spread]))
    for setting in dict.fromkeys(row.setting for row in rows if row.setting not in (OUTRUN, *waypoints.SETTINGS)):
        full, left = (next((r for r in rows if r.setting == setting and r.way == way), None) for way in (FULL, LEFT))
        if full is None or left is None:
            continue
        found.bars.append(Bars(f"MB: {setting}", [(row.way, row.get("MB"), row.kind) for row in (full, left)]))
        answers = [(row.way, row.get("first answer s"), row.kind) for row in (full, left)]
        found.bars.append(Bars(f"first answer, seconds: {setting}", answers))
        value = ratio(left.get("first answer s"), full.get("first answer s"))
        found.targets.append(Target.at_most(f"{setting}: first answer, left behind over full", value or 9.0, 1.0))
    outrun = [row for row in rows if row.setting == OUTRUN]
    if outrun:
        found.bars.append(Bars(f"total, seconds: {OUTRUN}", [(r.way, r.get("total s"), r.kind) for r in outrun]))
        found.bars.append(
            Bars(f"downtime, ms: {OUTRUN}", [(row.way, row.get("downtime ms"), row.kind) for row in outrun], log=True)
        )
    missing = []
    if "post-copy" not in ALLOWABLE:
        missing.append(Row("haulier, post-copy", OUTRUN, Kind.NOT_BUILT, {}))
    found.rows = rows + missing
    found.notes.append("'total': until it runs at the target; 'whole': until all of its memory is there, by post-copy")
    found.notes.append("'work lost' is the share of the guest's usual work that it did not get done meanwhile")
    found.notes.append(
        f"of a technique that was given up (stock QEMU's after {GIVE_UP_S:g} s, those that slow the guest or let it go "
        f"after {PATIENCE_S:g}), 'total' is the time until that"
    )
    return found
