"""What the convergence benchmark makes of its rows, and which it takes for known without measuring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convergence
import pytest

from haulier.errors import GuestError


def row(how: str, done: str, total: float | None, pages: int = 50) -> dict[str, Any]:
    return {"how": how, "pages/s": pages, "Mbps": 10, "done": done, "total s": total, "intact": "yes"}


def test_the_ratio_is_over_haulier_with_the_least_that_gets_it_there() -> None:
    plain, slowed, _ = convergence.OURS
    rows = [
        row(plain, "refused", 60.0),
        row(slowed, "yes", 20.0),
        row("stock best", "given up", 100.0),
        row("stock xbzrle", "no: nor at 50 pages/s", None),
        row("stock best", "yes", 30.0, pages=300),
    ]
    found = [each["total, of haulier's"] for each in convergence.compared(rows)]
    assert found == [None, 1.0, 5.0, None, None]


def test_a_refusal_is_no_fault_where_nothing_is_allowed() -> None:
    plain, slowed, _ = convergence.OURS
    good = convergence.targets([row(plain, "refused", 60.0), row(slowed, "yes", 20.0)])
    assert all(target.ok for target in good)
    assert not convergence.targets([row(slowed, "refused", 60.0)])[0].ok
    assert not convergence.targets([row(slowed, "yes", 60.0) | {"intact": "NO"}])[1].ok
    assert convergence.targets([row("stock best", "yes", 1.0)]) == []


def test_what_was_given_up_is_not_tried_with_a_faster_guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []

    def cell(way: str, pages: int, mbps: int, give_up_s: float) -> dict[str, Any]:
        ran.append((way, pages))
        if way == "stock xbzrle":
            raise GuestError("it fell over")
        return row(way, "given up" if way == "stock best" else "yes", 1.0, pages)

    monkeypatch.setattr(convergence, "cell", cell)
    ways = ["stock best/10", "haulier/10", "stock xbzrle/10/50"]
    report = convergence.run(False, ways, tmp_path, steps=3)
    assert ran == [("haulier", 50), ("stock xbzrle", 50), ("stock best", 50)]
    assert [each["done"] for each in report.rows] == ["yes", "given up", *["no: nor at 50 pages/s"] * 3]
    assert any("it fell over" in note for note in report.notes)
    assert [note for note in report.notes if note.startswith("not run yet")]
    both = convergence.run(False, ["haulier/10/50", "haulier --allow post-copy/10/50"], tmp_path)
    assert [each["done"] for each in both.rows] == ["yes", "as without"] and all(target.ok for target in both.targets)
    again = convergence.run(False, ways[:2], tmp_path)
    assert ran[3:] == [("haulier", pages) for pages in convergence.DIRTY[1:]] and len(again.rows) == 8
