"""What a target's worker makes of a token that finds its copy dead, or that it cannot act on to the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from haulier.errors import Corrupt, GuestError
from haulier.handoff import target, vm_target
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Accept, Job, Own, PrepareMemory
from haulier.handoff.ownership import Event, State
from haulier.handoff.source import SourceHandoff
from haulier.handoff.vm_source import VmSource
from haulier.handoff.vm_target import VmTarget
from tests.handoff.hosts import GUEST, HANDOFF, OFFER
from tests.support.agents import make_site

JOB = Job(handoff=HANDOFF, role="target", guest=GUEST, peer="oslo", offer=OFFER)
TOKEN = Own(Event.TOKEN.value, 4)


class Voted(VmTarget):
    """One whose copy waits for the token; `said` is what the source was told."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.said: list[tuple[str, int]] = []
        self.copy = SimpleNamespace(alive=lambda: True, close=lambda: None)
        self._qemu, self._voted = self.copy, True  # type: ignore[assignment]
        self.control = SimpleNamespace(  # type: ignore[assignment]
            own=lambda event, epoch: self.said.append((str(event), epoch)),
            send=lambda message: self.said.append((type(message).__name__, 0)),
        )


@pytest.fixture
def voted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Voted]:
    site = make_site(tmp_path / "l", "lisbon")
    site.handoff_root(HANDOFF).mkdir(parents=True)
    with Journal(site.journal) as journal:
        facts = {"pending": 4, "last_epoch": 4, "handoff": HANDOFF, "spec": OFFER.spec, "owner": "oslo"}
        journal.advance(GUEST, "absent", State.READY.value, **facts)
        detail = {"residual": "held"}
        journal.add_handoff(HandoffRow(HANDOFF, GUEST, "target", "oslo", epoch=4, detail=detail))
        monkeypatch.setattr(target, "discard_copy", lambda *_: None)
        yield Voted(site, journal, JOB, threading.Event())


def test_memory_is_sealed_before_the_vote_that_says_what_it_is(voted: Voted) -> None:
    voted.journal.advance(GUEST, State.READY.value, State.RECEIVING.value)
    voted._voted, voted._loaded_at, voted.copy.status = False, 1.0, lambda: "paused"
    voted._receiver = SimpleNamespace(final=True, manifest=SimpleNamespace(digest=b"disk"))  # type: ignore[assignment]
    sealed: list[int] = []

    def digest() -> bytes:
        assert sealed, "later batches would be in it, and in the guest"
        return b"memory"

    proxy = SimpleNamespace(raw_bytes=7, digest=digest)
    voted._sink = SimpleNamespace(seal=lambda: sealed.append(len(voted.said)), proxy=proxy)  # type: ignore[assignment]
    voted._maybe_arrived()
    assert sealed == [0] and [word for word, _ in voted.said] == ["Arrived", "ready"]
    assert state_of(voted) == State.READY


def state_of(found: Voted) -> str:
    return found.journal.guest(GUEST).state


def test_a_token_for_a_copy_that_has_died_goes_back(voted: Voted) -> None:
    voted.copy.alive = lambda: False
    assert voted._owned(TOKEN)
    assert state_of(voted) == State.REFUSED
    assert voted.said == [("refused", 4)] and voted.outcome == "failed"


def broken(*_: Any) -> Any:
    raise GuestError("QEMU did not do it")


def full(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "why"),
    [("vm_target.run_copy", broken), ("target.copy_manifest", full)],
    ids=["it does not run", "its disk has no name"],
)
def test_a_guest_that_was_taken_and_not_settled_is_the_agents(
    voted: Voted, monkeypatch: pytest.MonkeyPatch, where: str, why: Callable[..., Any]
) -> None:
    monkeypatch.setattr(vm_target, "run_copy", lambda *_: 12.5)
    monkeypatch.setattr(target.clients, "arrived", lambda *_: None)
    monkeypatch.setattr(f"haulier.handoff.{where}", why)
    voted._receiver = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises((GuestError, OSError)) as caught:
        voted._owned(TOKEN)
    voted._fail(caught.value)
    assert voted.outcome == "undecided"
    assert state_of(voted) == State.OWNER
    assert not any(word in ("Failed", "refused") for word, _ in voted.said), "it is not the source's any more"


@pytest.mark.parametrize("gone", ["over", "broken", "by its agent's word"])
def test_device_state_of_a_source_that_is_gone_is_not_waited_for_without_end(
    voted: Voted, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    monkeypatch.setattr(vm_target, "ALONE_S", 0.05)
    closed: list[bool] = []
    session = SimpleNamespace(error=GuestError("cut") if gone == "broken" else None, over=gone == "over")
    voted.control.session = session  # type: ignore[misc]
    voted._sink = SimpleNamespace(close=lambda: closed.append(True))  # type: ignore[assignment]
    voted.copy.status = lambda: "inmigrate"
    if gone == "by its agent's word":
        voted.left_alone.set()
    assert not voted._device_state()
    assert closed
    voted.copy.status = lambda: "paused"
    assert voted._device_state(), "it had come all the same"


def test_what_has_failed_before_the_token_keeps_its_notes(voted: Voted) -> None:
    voted._fail(GuestError("boom"))
    assert state_of(voted) == State.REFUSED
    assert voted.journal.handoff(HANDOFF).detail == {"residual": "held", "error": "boom"}


def test_the_source_names_the_picture_that_was_agreed_on_or_none(voted: Voted) -> None:
    """Any other may be of another guest, or no picture at all."""
    made: list[str] = []
    said = [PrepareMemory(""), PrepareMemory("golden:" + "cd" * 32)]
    voted.control.next = lambda timeout: said.pop(0)  # type: ignore[method-assign]
    voted._prepare_memory = lambda news: made.append(news.memory_base)  # type: ignore[method-assign]
    session: Any = SimpleNamespace(wire_bytes=lambda: (0, 0), rate_bps=lambda: 0.0, rtt_s=lambda: 0.0)
    with pytest.raises(Corrupt, match="was not offered"):
        voted._work(session)
    assert made == [""]


def test_the_target_names_a_picture_that_was_offered_or_none() -> None:
    accept = Accept(port=1, bulk=(), manifest=False, golden=False, memory_base="golden:" + "cd" * 32)
    source: Any = SimpleNamespace(job=JOB)
    with pytest.raises(Corrupt, match="was not offered"):
        SourceHandoff._connect(source, OFFER, accept)


def test_a_golden_snapshot_is_looked_at_when_something_did_not_match_and_only_then(
    voted: Voted, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(target.retained, "suspect", lambda site, store, picture: looked.append(picture))
    voted.job = msgspec.structs.replace(JOB, memory_base="golden:" + "cd" * 32)
    voted.progress.status.memory_base = "golden:" + "ef" * 32
    voted._fail(GuestError("boom"))
    assert looked == []
    voted._fail(Corrupt("a batch rebuilds to other bytes"))
    source: Any = SimpleNamespace(site=voted.site, job=JOB, progress=voted.progress, _store=None)
    VmSource._keep_attempt(source, Corrupt("the other site says so"))
    assert looked == ["golden:" + "cd" * 32, "golden:" + "ef" * 32]
