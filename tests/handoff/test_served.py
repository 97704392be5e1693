"""What is kept of a post-copy for workers that may have to go on with it, and what the report says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from haulier.errors import Corrupt, GuestError
from haulier.handoff import served
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Filled
from haulier.memory.proxy import Broken


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal") as found:
        found.add_handoff(HandoffRow("h1", "web1", "source", "lisbon", detail={"other": 1}))
        yield found


def test_what_is_noted_is_remembered_and_the_rest_stays(journal: Journal) -> None:
    proxy: Any = SimpleNamespace(parser=SimpleNamespace(blocks={"ram0": 4096, "rom": 8192}, ids=[2]))
    served.remember(journal, "h1", proxy)
    served.note(journal, "h1", marks={"stop": 5.0})
    row = journal.handoff("h1")
    assert served.remembered(row) == Broken({"ram0": 4096, "rom": 8192}, (2,))
    assert list(served.remembered(row).blocks) == ["ram0", "rom"], "the mirror's order"
    assert row.detail["other"] == 1 and row.detail["post_copy"]["marks"] == {"stop": 5.0}


@pytest.mark.parametrize(
    "detail", [{}, {"post_copy": 5}, {"post_copy": {"blocks": {"a": 1}}}, {"post_copy": {"blocks": [], "ids": [1]}}]
)
def test_what_makes_no_sense_is_not_gone_on_with(detail: dict[str, Any]) -> None:
    with pytest.raises(Corrupt, match="h1 says nothing of its post-copy"):
        served.remembered(HandoffRow("h1", "web1", "source", "lisbon", detail=detail))


@pytest.mark.parametrize(("status", "whole"), [("completed", True), ("postcopy-paused", False), ("", False)])
def test_a_stream_that_qemu_has_closed_is_whole_or_broken(status: str, whole: bool) -> None:
    def wait(states: set[str], timeout: float, since: int) -> Any:
        if status not in states:
            raise GuestError("nothing came")
        return SimpleNamespace(data={"status": status})

    qemu: Any = SimpleNamespace(
        wait_migration=wait, query_migrate=lambda: {"error-desc": "cut"}, spec=SimpleNamespace(name="web1")
    )
    if whole:
        served.check_whole(qemu, 0)
    else:
        with pytest.raises(GuestError, match="interrupted: cut"):
            served.check_whole(qemu, 0)


def test_figures() -> None:
    urgent = SimpleNamespace(raw=8208, wire=900, referred=2)
    pump: Any = SimpleNamespace(urgent=urgent, post_copy=SimpleNamespace(requests=7, pushed=16))
    assert served.figures(pump, None, {}) == {
        "requested_pages": 7,
        "pushed_pages": 16,
        "worst_wait_ms": None,
        "mean_wait_ms": None,
        "urgent": {"raw_bytes": 8208, "wire_bytes": 900, "referred_pages": 2},
    }
    told = served.figures(pump, Filled(1, bytes(32), 9, 241.04, 133.26), {"running": 10.0, "whole": 11.5})
    assert told["requested_pages"] == 9 and told["seconds"] == 1.5
    assert (told["worst_wait_ms"], told["mean_wait_ms"]) == (241.0, 133.3)
