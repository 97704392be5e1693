"""Cells of the table of containers and virtual machines: how they are named, and that those that are kept count."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from experiments.parts import chosen

from haulier.errors import UsageError

containers: Any = importlib.import_module("containers")
CELL = ("runc", "memory", 100, "yes")


@pytest.mark.parametrize(
    "pattern", ["runc/memory/100/yes", "runc/memory", "runc", "*/memory/100", "*/*/*/yes", "r*/m*"]
)
def test_a_cell_is_named_by_its_parts_from_the_left(pattern: str) -> None:
    assert chosen("/".join(map(str, CELL)), [pattern])


@pytest.mark.parametrize("pattern", ["vm", "runc/memory/10", "memory/100", "runc/*/*/no", "runc/mem"])
def test_other_names_are_those_of_other_cells(pattern: str) -> None:
    assert not chosen("/".join(map(str, CELL)), [pattern])


def test_a_name_that_no_cell_has_is_refused() -> None:
    with pytest.raises(UsageError, match="runc/memory/100/yes"):
        containers.run(False, only=["memory/100"])


def test_cells_that_are_kept_are_not_measured_again(tmp_path: Path) -> None:
    one = {"total": 2.0, "mb": 1.0, "down": 250.0, "gap": 400.0, "marks": {}}
    rows = [containers.row(*CELL, one, {"total": 4.0, "mb": 5.0, "down": 1000.0, "gap": None})]
    (tmp_path / "containers-runc-memory-100-yes.json").write_text(json.dumps(rows))
    report = containers.run_cells([CELL], tmp_path)
    assert report.rows == rows
    assert {target.name: target.ok for target in report.targets} == {
        "longest downtime ms": True,
        "longest gap of a client ms": True,
        "least bytes ratio, first trip": True,
        "least time ratio, first trip": True,
    }
