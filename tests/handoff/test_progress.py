"""status.json and the phases of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from haulier.handoff import progress as module
from haulier.handoff.messages import Status
from haulier.handoff.progress import Progress, write_report


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def progress(tmp_path: Path, clock: Clock) -> Progress:
    return Progress(tmp_path, Status(handoff="h1", role="source", guest="web1", source="oslo", target="lisbon"))


def read(tmp_path: Path) -> dict[str, Any]:
    raw = (tmp_path / "status.json").read_bytes()
    msgspec.json.decode(raw, type=Status)
    return dict(json.loads(raw))


def test_status_is_there_from_the_beginning_and_never_half_written(progress: Progress, tmp_path: Path) -> None:
    assert read(tmp_path)["phase"] == "start"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_phase_is_told_at_once_and_other_news_now_and_then(progress: Progress, tmp_path: Path, clock: Clock) -> None:
    progress.phase("disk", "sending")
    assert (read(tmp_path)["phase"], read(tmp_path)["message"]) == ("disk", "sending")
    progress.status.rate_bps = 5e6
    progress.write()
    assert read(tmp_path)["rate_bps"] == 0.0, "not more often than needed"
    clock.now += 1
    progress.write()
    assert read(tmp_path)["rate_bps"] == 5e6
    assert read(tmp_path)["updated"] == 1001.0


def test_phases_add_up(progress: Progress, clock: Clock) -> None:
    for name, seconds, wire in (("disk", 2.0, 100), ("memory", 3.5, 900), ("switchover", 0.25, 7)):
        progress.phase(name)
        clock.now += seconds
        progress.status.wire_bytes += wire
    done = progress.finish()
    assert [(p["name"], p["seconds"], p["wire_bytes"]) for p in done] == [
        ("disk", 2.0, 100),
        ("memory", 3.5, 900),
        ("switchover", 0.25, 7),
    ]
    clock.now += 50
    assert progress.finish() == done, "finishing twice changes nothing"
    assert all(set(p) == {"name", "at", "seconds", "wire_bytes"} for p in done)


def test_progress_never_goes_back_and_the_end_is_not_promised(progress: Progress, clock: Clock) -> None:
    status = progress.status
    progress.left(0, 0)
    assert (status.progress, status.eta_s) == (0.0, -1.0)
    status.wire_bytes, status.rate_bps = 3_000_000, 8e6
    progress.left(500_000, 500_000)
    assert status.progress == pytest.approx(0.75)
    assert status.eta_s == pytest.approx(1.0)
    progress.left(0, 9_000_000)
    assert status.progress == pytest.approx(0.75)
    progress.left(0, 0)
    assert status.progress == 0.99


def test_the_report_is_json_for_people_too(tmp_path: Path) -> None:
    write_report(tmp_path, {"outcome": "done", "phases": [{"name": "disk", "seconds": 1.5}]})
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text)["phases"][0]["seconds"] == 1.5
    assert text.count("\n") > 3
