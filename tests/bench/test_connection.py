"""What is made of moves that a client has seen: medians, the worst, the aims; and units that are kept."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

connection: Any = importlib.import_module("connection")
ROW = {row.name: row for row in connection.ROWS}


def seen(**figures: Any) -> dict[str, Any]:
    """One move as `connection.one` tells of it."""
    found = {
        "downtime_s": 0.1,
        "gap_s": 0.2,
        "longest_echo_s": 0.3,
        "full_after_s": 1.0,
        "before": 94.0,
        "during": 50.0,
    }
    found |= {"after": 94.0, "echo_before_ms": 17.0, "echo_during_ms": 20.0, "echo_after_ms": 17.0, "tunnels": 0}
    return {**found, "alive": True, "errors": [], "clients": {}, "number": 0, **figures}


def missed(found: dict[Any, list[dict[str, Any]]]) -> list[str]:
    return [target.name for target in connection.targets(found) if not target.ok]


def test_a_row_has_medians_and_the_worst() -> None:
    moves = [seen(), seen(gap_s=0.21, full_after_s=3.0, after=50.0), seen(gap_s=0.5, alive=False, series={"at": []})]
    row = connection.summary(ROW["mptcp-ahead"], moves)
    assert (row["gap s"], row["worst gap"], row["moves"], row["alive"]) == (0.21, 0.5, 3, 2)
    assert (row["full again s"], row["worst full again"], row["worst after"]) == (1.0, 3.0, 50.0)
    assert row["series"] == {"at": []}


def test_each_aim_is_missed_by_what_misses_it() -> None:
    good = {ROW["mptcp-ahead"]: [seen(), seen()], ROW["keep-5"]: [seen(after=4.7, full_after_s=float("inf"))]}
    assert missed(good) == []
    for figures, expected in (
        ({"alive": False}, "moves whose connections lived"),
        ({"gap_s": 0.5}, "gap beyond the downtime, worst, s"),
        ({"full_after_s": 2.1}, "full throughput again, worst, s"),
        ({"tunnels": 1}, "tunnels left"),
    ):
        one_bad = {**good, ROW["mptcp-ahead"]: [seen(), seen(), seen(**figures)]}
        assert missed(one_bad) == [f"mptcp, ahead: {expected}"], figures
    slow = {**good, ROW["mptcp-ahead"]: [seen(after=60.0, echo_after_ms=40.0)]}
    assert missed(slow) == [
        "mptcp, ahead: echo after / before, both by direct paths",
        "mptcp, ahead: throughput after, against keep, tunnel 5 Mbit/s",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="labs need root")
def test_what_was_measured_is_not_measured_again_and_a_failure_costs_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def move(self: Any, name: str, row: Any, count: int) -> list[dict[str, Any]]:
        asked.append(name)
        if len(asked) == 2:
            raise RuntimeError("the guest did not come")
        return [seen() for _ in range(count)]

    monkeypatch.setattr(connection.Moving, "move", move)
    first = connection.run(False, only=["hook"], parts=tmp_path)
    assert [row["moves"] for row in first.rows] == [10]
    assert "failed: connection: hook 2: RuntimeError: the guest did not come" in first.notes
    again = connection.run(False, only=["hook"], parts=tmp_path, steps=1)
    assert [row["moves"] for row in again.rows] == [20]
    assert asked == ["connection: hook 1", "connection: hook 2", "connection: hook 2"]
