"""The repeated experiments' pure parts: rows, extrapolation, checks against counters, parts that are kept, the page."""

from __future__ import annotations

import importlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report
import seeds
from experiments import extrapolate, live_migration, measuring, page, plots, published
from experiments.model import Bars, Check, Experiment, Form, Handoff, Kind, Row, best, from_dict, merged
from experiments.parts import Enough, Parts, chosen, joined

SETTING = "10 Mbps, 50 ms, 1024 MiB, FACES"


def row(way: str, kind: Kind = Kind.MEASURED, setting: str = SETTING, **figures: float | None) -> Row:
    return Row(way, setting, kind, {name.replace("_", " "): value for name, value in figures.items()})


KB = 1000


def told() -> dict[str, Any]:
    """A handoff's report, in what matters here: 10 MB of memory, 2 of disk, 0.3 said besides, 0.2 of frames."""
    return {
        "total_s": 9.9,
        "until_released_s": 10.0,
        "downtime_ms": 120.0,
        "wire": {
            "sent": 12_000 * KB,
            "received": 500 * KB,
            "channels": {"memory": 10_050 * KB, "disk": 2010 * KB, "control": 300 * KB},
        },
        "memory": {
            "wire_bytes": 10_000 * KB,
            "kinds": {"wire": {"literal": 9000 * KB, "meta": 1000 * KB}, "raw": {"literal": 4000, "same": 8000}},
        },
        "disk": {
            "origin": {
                "sent_bytes": 1500 * KB,
                "recipe_bytes": 300 * KB,
                "patch_bytes": 100 * KB,
                "wire_bytes": 2000 * KB,
                "chunks_at_target": 2,
                "chunks_recipe": 1,
                "chunks_patch": 0,
                "chunks_sent": 1,
            }
        },
        "phases": [
            {"name": "memory", "at": 100.0, "seconds": 9.0, "wire_bytes": 12_000 * KB},
            {"name": "token", "at": 109.0, "seconds": 1.0, "wire_bytes": 500 * KB},
            {"name": "finish", "at": 110.0, "seconds": 3.0, "wire_bytes": 0},
        ],
        "timeline": [{"at": n / 10, "wire": 10 * n, "rate_bps": 1e6, "left": 100 - n, "round": 1} for n in range(100)],
        "check": {"memory_equal": True},
    }


CROSSED = measuring.Crossing(seconds=10, bytes=12_500 * KB + 9000 * 52 + 10 * KB, packets=9000)


# -- rows


def test_repeated_rows_become_their_median() -> None:
    rows = [row("a", total_s=3.0), row("b", total_s=9.0), row("a", total_s=1.0), row("a", total_s=2.0, MB=None)]
    one, other = merged(rows)
    assert (one.way, one.runs, one.get("total s"), one.get("MB")) == ("a", 3, 2.0, None)
    assert (other.way, other.runs) == ("b", 1)
    assert one.note == "total s 1 to 3" and other.note == ""


def test_every_unit_but_the_calculated_ones_is_repeated_in_turn() -> None:
    units = {"sources": live_migration.new, "caches": live_migration.new}
    whole = seeds.repeated("slicing", units, Form.WHOLE)
    assert list(whole) == ["sources", "caches", "sources #2", "sources #3"]
    assert list(seeds.repeated("slicing", units, Form.QUICK)) == ["sources", "caches"]


def test_every_name_of_a_unit_that_runs_once_is_one() -> None:
    for name, beginnings in seeds.ONCE.items():
        units = importlib.import_module(f"experiments.{name.replace('-', '_')}").units(Form.WHOLE)
        assert all(any(unit.startswith(one) for unit in units) for one in beginnings)


def test_rows_of_other_kinds_are_never_mixed() -> None:
    assert len(merged([row("a", total_s=3.0), row("a", Kind.EXTRAPOLATED, total_s=5.0)])) == 2


def test_the_best_row_is_the_smallest_that_has_the_figure() -> None:
    rows = [row("none"), row("slow", total_s=5.0), row("fast", total_s=2.0)]
    found = best(rows, "total s")
    assert found is not None and found.way == "fast"
    assert best(rows, "MB") is None


# -- extrapolation


def test_what_is_left_takes_as_long_as_the_rate_says() -> None:
    seconds, bytes_, kind = extrapolate.total(extrapolate.Stopped(100.0, 100_000_000, 200_000_000, 50_000_000))
    assert (seconds, bytes_, kind) == (pytest.approx(350.0), pytest.approx(350e6), Kind.EXTRAPOLATED)


def test_pages_left_shrink_as_those_before_did() -> None:
    seconds, _, _ = extrapolate.total(extrapolate.Stopped(10.0, 1000, 4000, 0, per_page=0.25))
    assert seconds == pytest.approx(20.0)


def test_what_was_done_is_not_extrapolated() -> None:
    done = extrapolate.Stopped(42.0, 123, 999, 999, done=True)
    assert extrapolate.total(done) == (42.0, 123.0, Kind.MEASURED)


def test_without_a_rate_there_is_nothing_to_say() -> None:
    with pytest.raises(ValueError, match="no rate"):
        extrapolate.total(extrapolate.Stopped(10.0, 0, 1, 1))
    with pytest.raises(ValueError, match="no rate"):
        extrapolate.whole_disk(1, 0.0, 1.0)


def test_no_share_is_the_disk_and_then_the_incremental_run() -> None:
    disk = row(live_migration.NO_SHARE_FULL, Kind.EXTRAPOLATED, disk_MB=1000.0, mirrored_Mbps=8.0)
    found = live_migration.with_memory(disk, row("default", total_s=300.0, MB=400.0))
    assert (found.get("total s"), found.get("MB")) == (pytest.approx(1300.0), pytest.approx(1400.0))


def test_what_came_after_the_first_pass_is_what_was_dirtied() -> None:
    report = told()
    report["timeline"][60]["round"] = 2
    assert live_migration.again(report) == 12_500 * KB - 600
    assert live_migration.again({**report, "timeline": []}) == 12_500 * KB


# -- checks


def test_bytes_by_origin_are_all_that_the_interfaces_counted() -> None:
    origins = measuring.origins(told(), CROSSED.bytes, CROSSED.packets)
    assert sum(origins.values()) == CROSSED.bytes
    assert origins["session: frames"] == 200 * KB and origins["packet headers"] == 9000 * 52
    assert origins["disk: references"] == 100 * KB and origins["control: control"] == 300 * KB
    assert origins["agents' talk"] == 10 * KB


def test_figures_that_agree_pass_all_checks() -> None:
    checks = measuring.checks("x", told(), CROSSED, True)
    assert len(checks) == 5 and all(check.ok for check in checks)


@pytest.mark.parametrize(
    ("spoil", "which"),
    [
        (lambda told: told["wire"].update(sent=10_000 * KB), "interface counters"),
        (lambda told: told["memory"]["kinds"]["wire"].update(literal=7000 * KB), "by origin"),
        (lambda told: told["phases"][0].update(seconds=5.0), "phases"),
        (lambda told: told["check"].update(memory_equal=False), "memory differs"),
    ],
)
def test_figures_that_disagree_are_found(spoil: Any, which: str) -> None:
    found = told()
    spoil(found)
    assert which in " ".join(check.name for check in measuring.checks("x", found, CROSSED, True) if not check.ok)


def test_a_disk_that_differs_is_found() -> None:
    assert [c.name for c in measuring.checks("x", told(), CROSSED, False) if not c.ok] == ["x: disk differs"]


# -- experiment 1 from its rows


def experiment() -> Experiment:
    found = live_migration.new()
    found.rows = [
        row(live_migration.INCREMENTAL + "default settings", Kind.EXTRAPOLATED, total_s=400.0, MB=450.0),
        row(live_migration.INCREMENTAL + "multifd, zstd", total_s=100.0, downtime_ms=900.0, MB=120.0),
        row(live_migration.NO_SHARE_FULL, Kind.EXTRAPOLATED, disk_MB=8590.0, mirrored_Mbps=9.5),
        *(row(live_migration.OURS, total_s=s, downtime_ms=200.0, MB=20.0) for s in (19.0, 20.0, 30.0)),
        row(live_migration.BACK, total_s=5.0, downtime_ms=150.0, MB=2.0),
    ]
    found.handoffs = [measuring.handoff("a <handoff>", told(), CROSSED.bytes, CROSSED.packets)]
    found.checks = measuring.checks("x", told(), CROSSED, True)
    return live_migration.finished(found)


def test_aims_are_judged_from_medians() -> None:
    targets = {target.name.removeprefix(f"{SETTING}: "): target for target in experiment().targets}
    assert targets["times the speed of QEMU, incremental, default settings"].value == pytest.approx(20.0)
    strongest = targets["times the speed of the strongest, QEMU, incremental, multifd, zstd"]
    assert strongest.value == pytest.approx(5.0) and strongest.ok
    assert targets[f"times the speed of {live_migration.NO_SHARE_FULL}"].ok
    assert targets["downtime ms"].ok and targets[f"{live_migration.BACK}, s"].ok


def test_the_papers_figures_stand_beside_and_are_never_judged() -> None:
    found = experiment()
    theirs = [each for each in found.rows if each.kind == Kind.PUBLISHED]
    assert theirs == published.LIVE_MIGRATION
    assert not any("paper" in target.name for target in found.targets)
    bars = next(each for each in found.bars if each.log)
    assert {kind for label, _, kind in bars.bars if label.startswith("paper")} == {Kind.PUBLISHED}


def test_finishing_twice_changes_nothing() -> None:
    once = experiment()
    notes = list(once.notes)
    again = live_migration.finished(from_dict(once.as_dict()))
    assert again.rows == once.rows and again.targets == once.targets and again.notes[: len(notes)] == notes


# -- JSON, parts


def test_json_there_and_back() -> None:
    found = experiment()
    again = from_dict(json.loads(json.dumps(found.as_dict())))
    assert again.rows == found.rows and again.checks == found.checks and again.targets == found.targets
    assert [handoff.points for handoff in again.handoffs] == [list(each.points) for each in found.handoffs]


def test_what_was_kept_is_not_run_again(tmp_path: Path) -> None:
    ran: list[str] = []

    def unit(name: str) -> Experiment:
        ran.append(name)
        return Experiment("x", "x", "x", rows=[row(name, total_s=1.0)])

    first = Parts(tmp_path, steps=1)
    assert first.do("a", lambda: unit("a")).rows[0].way == "a"
    with pytest.raises(Enough):
        first.do("b", lambda: unit("b"))
    second = Parts(tmp_path)
    whole = joined(Experiment("x", "x", "x"), [second.do(name, lambda name=name: unit(name)) for name in "ab"])
    assert ran == ["a", "b"] and [each.way for each in whole.rows] == ["a", "b"]


def test_what_failed_is_not_kept(tmp_path: Path) -> None:
    def fails() -> list[dict[str, str]]:
        raise OSError("no")

    parts = Parts(tmp_path)
    with pytest.raises(OSError):
        parts.facts("cell", fails)
    assert parts.kept("cell") is None
    assert parts.facts("cell", lambda: [{"a": "b"}]) == [{"a": "b"}] == Parts(tmp_path).facts("cell", fails)


def test_a_run_goes_on_after_what_failed_and_says_so(tmp_path: Path) -> None:
    parts, notes = Parts(tmp_path, steps=2), list[str]()

    def fails() -> None:
        raise OSError("no link")

    assert parts.attempt("first", fails, notes) is None and not parts.spent
    assert parts.attempt("second", lambda: [2], notes) == [2] and parts.spent
    assert parts.attempt("third", lambda: [3], notes) is None
    assert parts.attempt("second", fails, notes) == [2]
    assert notes == ["failed: first: OSError: no link", "not run yet: third"]


def test_a_pattern_may_leave_out_the_end_of_a_name() -> None:
    assert chosen("stock best/50/2500", ()) and chosen("stock best/50/2500", ["x", "stock*/50"])
    assert chosen("stock best/50/2500", ["*/*/2500"]) and not chosen("stock best/50/2500", ["stock best/10", "*/*/300"])


def test_names_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    assert parts.path("a b") != parts.path("a-b")


# -- the page


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects what is said and what would be fetched."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "xlink:href", "data", "srcset")]
        self.fetched += [value or "" for name, value in attrs if name == "href" and not (value or "").startswith("#")]
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def document(experiments: list[Experiment]) -> dict[str, Any]:
    made = report.as_json("seeds", report.Report([]))
    return made | {"experiments": [each.as_dict() for each in experiments], "command": "bench/run seeds"}


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    found.close()
    assert not found.open
    return found


def test_the_page_is_whole_and_fetches_nothing() -> None:
    text = page.page(document([experiment()]))
    found = parsed(text)
    assert not found.fetched and "http" not in text and "@import" not in text
    said = " ".join(found.text)
    assert "a <handoff>" in said and "(theirs)" in said and "or more" in said and "bench/run seeds" in said


def test_every_figure_of_a_row_is_on_the_page() -> None:
    found = experiment()
    said = parsed(page.page(document([found]))).text
    for each in found.rows:
        for value in each.figures.values():
            assert value is None or plots.number(value) in said


def test_what_was_not_built_says_so() -> None:
    missing = Experiment("x", "X", "?", rows=[Row("scatter-gather", "", Kind.NOT_BUILT, {})])
    assert "not built yet" in " ".join(parsed(page.page(document([missing]))).text)


def test_figures_that_disagree_are_said_at_the_top() -> None:
    wrong = Experiment("x", "X", "?", rows=[row("a", total_s=1.0)], checks=[Check("bytes", 0.5, 0.03)])
    said = " ".join(parsed(page.page(document([wrong]))).text)
    assert "1 inconsistent figures" in said and "DISAGREE" in said


def test_bars_keep_their_proportions() -> None:
    text = plots.bars(Bars("x", [("a", 10.0, Kind.MEASURED), ("b", 5.0, Kind.PUBLISHED), ("c", None, Kind.NOT_RUN)]))
    widths = [float(part.split('"')[0]) for part in text.split('width="')[2:] if 'fill="#' in part.split("/>")[0]]
    assert widths[-2] / widths[-1] == pytest.approx(2.0, rel=0.01)
    assert "not run" in text


def test_pictures_of_nothing_are_pictures() -> None:
    parsed(plots.bars(Bars("x", [], log=True)))
    parsed(plots.handoff(Handoff("x", 0.0, 0.0, [], [], {}, {})))


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, ""), (0.0, "0.00"), (0.0123, "0.012"), (3.14159, "3.14"), (27.18, "27.2"), (7620.0, "7 620")],
)
def test_numbers_have_three_digits(value: float | None, said: str) -> None:
    assert plots.number(value) == said
