"""What each repeated experiment makes of its rows: ratios, aims, and what was not built said so."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from experiments import measuring
from experiments.model import Experiment, Form, Kind, Row, from_dict
from report import Report

import containers

NAMES = ("live_migration", "static_modes", "paths", "layers", "left_behind", "slicing", "ablation")


def module(name: str) -> Any:
    return importlib.import_module(f"experiments.{name}")


def made(name: str, *rows: Row) -> Experiment:
    found: Experiment = module(name).new()
    found.rows += rows
    return module(name).finished(found)  # type: ignore[no-any-return]


def row(way: str, setting: str, kind: Kind = Kind.MEASURED, **figures: float) -> Row:
    return Row(way, setting, kind, {name.replace("_", " "): value for name, value in figures.items()})


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_has_units_and_something_to_say_of_nothing(name: str) -> None:
    found = {form: module(name).units(form) for form in Form}
    assert all(units and all(callable(unit) for unit in units.values()) for units in found.values())
    assert len(found[Form.LEAST]) <= len(found[Form.QUICK]) <= len(found[Form.WHOLE])
    empty = made(name)
    assert empty.name.replace("-", "_") == name and empty.title and empty.question.endswith("?")
    assert not [target for target in empty.targets if target.ok]


@pytest.mark.parametrize("name", NAMES)
def test_finishing_again_neither_loses_nor_doubles_rows(name: str) -> None:
    once = made(name, row("a", "somewhere", regret=1.0, total_s=1.0))
    again = module(name).finished(from_dict(once.as_dict()))
    assert again.rows == once.rows and again.bars == once.bars


def test_the_controller_is_judged_by_its_mean_regret() -> None:
    controller, fast = "haulier's controller", "fastest speed (level -5)"
    rows = [
        row(way, scene, Kind.CALCULATED, total_s=10 * regret, regret=regret)
        for way, regrets in {controller: (1.0, 1.04), fast: (2.0, 1.0)}.items()
        for scene, regret in zip(("5-35-5 Mbps", "5 Mbps, 1 core"), regrets, strict=True)
    ]
    found = made("static_modes", *rows)
    judged = {target.name: target for target in found.targets}
    assert judged["mean regret of the controller"].value == pytest.approx(1.02)
    assert judged[f"times the speed of {fast}, mean"].value == pytest.approx(1.5 / 1.02)
    assert any("5-35-5" in picture.title for picture in found.bars)


def test_two_paths_are_judged_where_the_link_decides() -> None:
    paths = module("paths")
    rows = [
        row(paths.WAYS[count], paths.setting(rate, 64), total_s=seconds)
        for rate, times in {10: (60.0, 30.0), 50: (6.0, 5.0)}.items()
        for count, seconds in zip((1, 2), times, strict=True)
    ]
    found = made("paths", *rows)
    assert [(target.value, target.ok) for target in found.targets] == [(2.0, True)]
    assert found.bars[0].bars[-1][2] == Kind.PUBLISHED
    assert any(each.kind == Kind.NOT_RUN for each in found.rows)


def test_a_container_is_judged_against_the_published_method() -> None:
    layers = module("layers")
    where = "game, 100 Mbps, layer at target: yes"
    found = made(
        "layers",
        row(layers.OURS, where, total_s=2.0, downtime_ms=300.0, MB=1.0),
        row(layers.THEIRS, where, total_s=3.0, downtime_ms=2500.0, MB=2.0),
    )
    assert [(target.value, target.ok) for target in found.targets] == [(300.0, True), (1.5, True)]


def test_what_is_left_behind_is_judged_by_the_first_answer() -> None:
    behind = module("left_behind")
    found = made(
        "left_behind",
        row(behind.FULL, "x", first_answer_s=10.0, MB=100.0),
        row(behind.LEFT, "x", first_answer_s=4.0, MB=30.0),
    )
    assert [(target.value, target.ok) for target in found.targets] == [(0.4, True)]


def test_memory_through_other_sites_is_shown_and_not_taken_for_data_left_behind() -> None:
    behind = module("left_behind")
    setting = next(iter(behind.waypoints.SETTINGS))
    rows = [row("haulier, memory directly", setting, total_s=9.0), row("haulier, memory through", setting, total_s=5.0)]
    found = made("left_behind", *rows)
    assert found.targets == []
    (bars,) = found.bars
    assert setting in bars.title and [value for _, value, _ in bars.bars] == [9.0, 5.0]


def test_three_sources_are_judged_by_the_sum_of_their_links() -> None:
    slicing = module("slicing")
    rows = [row(f"fetch from {n} sources", "x", total_s=9.0 / n, Mbps=38.0 * n, sources=n) for n in (1, 2, 3)]
    found = made("slicing", *rows)
    assert found.targets[0].value == pytest.approx(3 * 38 / sum(slicing.RATES)) and found.targets[0].ok


def test_an_ablation_is_a_share_of_all_parts() -> None:
    found = made("ablation", row("all parts", "x", MB=10.0), row("without the base", "x", MB=25.0))
    shares = {each.way: each.get("of all parts' bytes") for each in found.rows if each.kind == Kind.MEASURED}
    assert shares == {"all parts": 1.0, "without the base": 2.5}


def test_what_failed_of_a_benchmark_that_goes_on_is_a_failed_check() -> None:
    found = module("layers").new()
    report = Report([], notes=["how it was measured", "failed: runc/game/10/yes: HaulierError: no route"])
    measuring.lacking(found, report)
    assert found.notes == ["failed: runc/game/10/yes: HaulierError: no route"]
    assert [(check.name, check.ok) for check in found.checks] == [("runc/game/10/yes: HaulierError: no route", False)]


def test_layers_are_measured_a_lab_at_a_time() -> None:
    units = module("layers").units(Form.WHOLE)
    cells = [cell for run in units.values() for cell in run.args[0]]
    assert len(set(cells)) == len(cells) == 36
    for run in units.values():
        assert len({containers.lab_of(cell) for cell in run.args[0]}) == 1
    assert ("runc", "memory", 10, "no") not in cells
