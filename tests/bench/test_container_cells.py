"""Cells of the table of containers and virtual machines: how they are named, and that those that are kept count."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from experiments.parts import chosen

from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import UsageError
from haulier.lab.scenario import Template
from haulier.units import CHUNK

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


def test_virtual_machines_without_their_application_have_rows(tmp_path: Path) -> None:
    cell = ("vm", "faces", 100, "no")
    one = {"total": 2.0, "mb": 1.0, "down": 250.0, "gap": 400.0, "marks": {}}
    (tmp_path / "containers-vm-faces-100-no.json").write_text(json.dumps([containers.row(*cell, one, one)]))
    report = containers.run(False, ["vm/faces/100/no"], tmp_path)
    assert [(row["kind"], row["application"], row["layer at target"]) for row in report.rows] == [("vm", "faces", "no")]


def test_each_application_that_a_target_lacks_has_a_lab_of_its_own() -> None:
    def lab_of(cell: str) -> Any:
        kind, app, mbps, at = cell.split("/")
        return containers.lab_of((kind, app, int(mbps), at))

    assert lab_of("vm/game/100/no") != lab_of("vm/faces/100/no")
    assert lab_of("vm/game/100/no") != lab_of("vm/none/100/no") != lab_of("vm/none/100/yes")
    assert lab_of("vm/game/100/yes") == lab_of("vm/faces/100/yes") != lab_of("vm/faces/50/yes")
    assert lab_of("runc/game/100/no") == lab_of("runc/faces/100/no")


def test_a_target_without_the_application_has_the_base_which_the_source_has_too(tmp_path: Path) -> None:
    for name, images in {"app": {"services-faces": b"a"}, "base": {"debian": b"b"}}.items():
        with ChunkStore(tmp_path / name / "store") as store:
            for image, letter in images.items():
                store.save_manifest(f"image/{image}", Manifest(CHUNK, store.put(letter * CHUNK)), {"source": image})
        (tmp_path / name / "golden").mkdir()
    golden: Any = None
    made = containers.BaseOnly(tmp_path / "app", golden, Template(tmp_path / "base", golden))
    for site in ("oslo", "lisbon"):
        made.copy_to(tmp_path / site)
    held = {}
    for site in ("oslo", "lisbon"):
        with ChunkStore(tmp_path / site / "store", create=False) as store:
            held[site] = store.manifest_names("image/")
            assert store.get(store.load_manifest("image/debian").fingerprints) == b"b" * CHUNK
            assert store.manifest_meta("image/debian") == {"source": "debian"}
    assert held == {"oslo": ["image/debian", "image/services-faces"], "lisbon": ["image/debian"]}
