"""How a source's worker ends: what it could not bring to its end stays under way, for the agent to go on with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from haulier.agent.site import Site
from haulier.errors import GuestError
from haulier.handoff import worker
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Job
from haulier.handoff.ownership import State
from tests.handoff.hosts import GUEST, HANDOFF, SPEC
from tests.support.agents import make_site

JOB = Job(handoff=HANDOFF, role="source", guest=GUEST, peer="lisbon")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path / "o", "oslo")


@pytest.fixture
def journal(site: Site) -> Iterator[Journal]:
    with Journal(site.journal) as journal:
        journal.advance(GUEST, "absent", "owner", epoch=3, taken=3, handoff=HANDOFF, spec=msgspec.to_builtins(SPEC))
        journal.add_handoff(HandoffRow(HANDOFF, GUEST, "source", "lisbon", detail={"cancel": True}))
        yield journal


@pytest.mark.parametrize(
    ("state", "over"),
    [(State.OWNER, True), (State.OFFERED, False), (State.GRANTED, False), (State.SERVING, False), (State.AWAY, False)],
)
def test_a_handoff_is_over_only_where_the_guest_is_again(
    site: Site, journal: Journal, monkeypatch: pytest.MonkeyPatch, state: State, over: bool
) -> None:
    def ends(*_: Any) -> Any:
        def run() -> None:
            journal.advance(GUEST, "owner", state.value)
            raise GuestError("its disk is full")

        return SimpleNamespace(run=run, report={}, left_alone=threading.Event())

    monkeypatch.setattr(worker, "VmSource", ends)
    monkeypatch.setattr(worker, "peer_of", lambda *_: None)
    site.handoff_root(HANDOFF).mkdir(parents=True)
    assert worker._run_source(site, journal, JOB, threading.Event()) == GuestError.exit_code
    row = journal.handoff(HANDOFF)
    assert (row.state == "ended") is over
    # What is certain to have failed says why, also when it is the agent that notes its end.
    known = state in (State.OWNER, State.OFFERED)
    assert row.detail.get("error", "") == ("its disk is full" if known else "") and row.detail["cancel"]
    told = msgspec.json.decode((site.handoff_root(HANDOFF) / "report.json").read_bytes())
    assert told["outcome"] == ("failed" if over else "undecided")
