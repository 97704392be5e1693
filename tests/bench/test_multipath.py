"""What the benchmarks of several paths make of what they measured, and that they go on where they were interrupted."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

multipath: Any = importlib.import_module("multipath")
handoffs: Any = importlib.import_module("multipath-handoff")
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="labs need root")
STEADY = {"sum": 20.0, "tcp": 10.0, "mptcp": 18.0, "striping": 19.0, "transport": {"mptcp": "striping over 2 paths"}}
DYING = {"first second": 9.0, "during": 9.0, "after": 19.0, "used again s": 2.5}
COLLAPSING = {"before": 43.0, "first second": 21.0, "during": 19.0, "after": 43.0}


def test_every_case_has_its_rows_and_what_it_is_judged_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(multipath, "steady", lambda *words, **more: STEADY)
    monkeypatch.setattr(multipath, "dying", lambda directory, how, which: DYING)
    monkeypatch.setattr(multipath, "collapsing", lambda directory, how: COLLAPSING)
    report = multipath.run(False, parts=tmp_path)
    assert len(report.rows) == 11 + 2 * 3 + 4
    verdicts = {target.name: target.ok for target in report.targets}
    assert verdicts["50+50, 40 ms, 1% loss: striping, share of the sum"]
    assert not verdicts["10+10, path 1 dies and returns: used again after, s"]
    assert not verdicts["25+20, the first falls to 3: striping, share of what remains"]
    assert "20+5, 20 ms: asked for MPTCP, got striping over 2 paths" in report.notes
    assert {str(row["when"]) for row in report.rows} == {"steady", "before", *DYING, "after"} - {"used again s"}
    # All of it was kept.
    monkeypatch.setattr(multipath, "said", lambda label, measure: pytest.fail(f"{label} was measured again"))
    assert multipath.run(False, parts=tmp_path).rows == report.rows
    assert [row["paths, Mbit/s"] for row in multipath.run(False, only=["*dies*"], parts=tmp_path).rows[::3]] == [
        "10+10, path 1 dies and returns",
        "10+10, path 2 dies and returns",
    ]


def test_handoffs_go_on_where_they_were_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[int, int, int]] = []

    def hand_over(self: Any, mbps: int, mib: int, paths: int) -> dict[str, float]:
        asked.append((mbps, mib, paths))
        if len(asked) == 4:
            raise RuntimeError("the guest did not come")
        return {"total_s": 40.0 / paths, "downtime_ms": 100.0, "wire_mb": 70.0, "second": 0.5}

    monkeypatch.setattr(handoffs.Moving, "hand_over", hand_over)
    first = handoffs.run(False, only=["50/*"], parts=tmp_path, steps=5)
    assert [row["MiB"] for row in first.rows] == [256], "one of 512 failed, one of 1024 was not reached"
    assert any("50/512, 2 of 2 paths: RuntimeError" in note for note in first.notes)
    assert "not run yet: multipath-handoff: 50/1024, 2 of 2 paths" in first.notes
    second = handoffs.run(False, only=["50/*"], parts=tmp_path)
    assert [row["one / two"] for row in second.rows] == [2.0, 2.0, 2.0] and all(target.ok for target in second.targets)
    assert asked[5:] == [(50, 512, 2), (50, 1024, 2)]
