"""Explores the ownership table: every order of loss, duplication, delay, crash and restart, to a stated depth.

The network is a set of all messages ever sent: any of them may be delivered at any time, any number of times, or
never. That covers loss, duplication, delay and reordering at once, and keeps the search finite. Crashes of agents and
workers lose nothing but what was about to be done after the journal write: so each transition is explored with all
prefixes of its actions carried out. A crash of a host also stops what ran there and loses a stopped copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from haulier.errors import HandoffFailed
from haulier.handoff import ownership
from haulier.handoff.ownership import MAY_RUN, MESSAGES, SENDS, TABLE, Action, Event, Record, Row, State, must, step


@dataclass(frozen=True, slots=True)
class Site:
    record: Record
    peer: int = -1
    runs: bool = False
    copy: bool = False
    """There is a stopped copy that could be run."""
    pages: bool = False
    """There is a stopped original that could give its memory."""


Message = tuple[Event, int, int, int]  # kind, epoch, from, to
World = tuple[tuple[Site, ...], frozenset[Message], frozenset[int]]


def start(sites: int) -> World:
    owner = Site(Record(State.OWNER, epoch=1, last=1, taken=1), runs=True)
    return (owner, *(Site(Record()) for _ in range(sites - 1))), frozenset(), frozenset({1})


def carry_out(
    site: Site, me: int, peer: int, actions: tuple[Action, ...], epoch: int, before: Record
) -> tuple[Site, set[Message]]:
    sent: set[Message] = set()
    for action in actions:
        if action in SENDS:
            sent.add((SENDS[action], ownership.reply_epoch(before, site.record, action, epoch), me, peer))
        elif action is Action.RUN_COPY:
            assert site.copy, "ran a copy that was not there"
            site = replace(site, runs=True, copy=False)
        elif action is Action.RESUME:
            site = replace(site, runs=True, pages=False)
        elif action is Action.DISCARD_COPY:
            site = replace(site, copy=False)
        elif action is Action.RETIRE:
            site = replace(site, runs=False, pages=False)
        elif action is Action.END_COPY:
            site = replace(site, runs=False, copy=False)
    return site, sent


def successors(world: World, top: int, *, calm: bool = False, crashes: bool = True) -> Iterator[World]:
    """All worlds one event away. `calm`: no new handoffs, failures or crashes (for the liveness check)."""
    sites, soup, used = world

    def happen(me: int, event: Event, epoch: int, peer: int, site: Site) -> Iterator[World]:
        record, actions = step(site.record, event, epoch)
        if record == site.record and not actions:
            return
        taken = used
        if record.epoch != site.record.epoch and record.epoch:
            assert record.epoch not in used, f"epoch {record.epoch} owned twice"
            taken = used | {record.epoch}
        needed = any(there.record.state is State.FILLING and there.peer == me and there.runs for there in sites)
        if Action.RETIRE in actions and event is not Event.COPY_LOST and site.pages:
            assert not needed, "threw memory away that is still needed"
        moved = replace(site, record=record)
        if event is Event.OFFER:
            moved = replace(moved, peer=peer)
        # A crash may come after any prefix of the actions: the record is durable, the rest did not happen.
        for done in range(len(actions), -1, -1) if crashes and not calm else (len(actions),):
            after, sent = carry_out(moved, me, peer, actions[:done], epoch, site.record)
            yield (*sites[:me], after, *sites[me + 1 :]), soup | sent, taken

    for me, site in enumerate(sites):
        state = site.record.state
        if state is State.OFFERED and (Event.READY, site.record.pending, site.peer, me) in soup:
            # The engine grants only with the guest stopped: stopping comes first.
            yield from happen(me, Event.GRANT, 0, site.peer, replace(site, runs=False, pages=True))
        if state is State.RECEIVING:
            yield from happen(me, Event.COMPLETE, 0, site.peer, replace(site, copy=True))
            yield from happen(me, Event.POISE, 0, site.peer, replace(site, copy=True))
        if not (state in (State.READY, State.POISED) and not site.copy):
            yield from happen(me, Event.RETRY, 0, site.peer, site)
        if state in (State.RECEIVING, State.READY, State.POISED) and not site.copy:
            yield from happen(me, Event.COPY_LOST, 0, site.peer, site)
        if state is State.SERVING and not site.pages:
            yield from happen(me, Event.COPY_LOST, 0, site.peer, site)
        if state is State.FILLING and not site.runs:
            if site.copy:  # the record was written, the copy not yet told
                yield (*sites[:me], replace(site, runs=True, copy=False), *sites[me + 1 :]), soup, used
            else:
                yield from happen(me, Event.COPY_LOST, 0, site.peer, site)
        if state is State.FILLING and site.runs and sites[site.peer].pages:
            yield from happen(me, Event.FILLED, 0, site.peer, site)
        # What recovery does after a crash: an owner that does not run may be started again.
        if state is State.OWNER and not site.runs:
            yield (*sites[:me], replace(site, runs=True), *sites[me + 1 :]), soup, used
        if state is State.OFFERED:
            yield from happen(me, Event.FAIL, 0, site.peer, site)
        for kind, epoch, sender, to in soup:
            if to != me:
                continue
            # A handoff's messages come from the site that this one deals with; others only get stock answers.
            if (
                kind is Event.TOKEN
                and state in (State.READY, State.POISED)
                and not site.copy
                and epoch == site.record.pending
            ):
                continue  # the edge looks for the copy first and reports COPY_LOST
            yield from happen(me, kind, epoch, sender, site)
        if calm:
            continue
        if state is State.OWNER and site.record.last < top:
            for peer in range(len(sites)):
                if peer != me:
                    yield from happen(me, Event.BEGIN, 0, peer, replace(site, peer=peer))
        if state in (State.RECEIVING, State.READY, State.POISED):
            yield from happen(me, Event.FAIL, 0, site.peer, site)
        if crashes and (site.runs or site.copy or site.pages):  # the host goes down
            down = replace(site, runs=False, copy=False, pages=False)
            yield (*sites[:me], down, *sites[me + 1 :]), soup, used


def check(world: World) -> None:
    sites, _, _ = world
    assert sum(site.runs for site in sites) <= 1, "two runners"
    assert sum(site.record.state in MAY_RUN for site in sites) <= 1, "two owners"
    for site in sites:
        assert not site.runs or site.record.state in MAY_RUN, "runs where it may not"


def explore(sites: int, top: int, *, crashes: bool = True) -> dict[World, None]:
    first = start(sites)
    seen: dict[World, None] = {first: None}
    todo = deque([first])
    while todo:
        for after in successors(todo.popleft(), top, crashes=crashes):
            if after not in seen:
                check(after)
                seen[after] = None
                todo.append(after)
    return seen


def settled(world: World) -> bool:
    return sum(site.record.state is State.OWNER and site.runs for site in world[0]) == 1


@pytest.mark.parametrize(("sites", "top", "least"), [(2, 4, 5_000), (3, 3, 5_000)])
def test_never_two_owners_nor_an_epoch_twice(sites: int, top: int, least: int) -> None:
    seen = explore(sites, top)
    assert len(seen) > least, "the search did not go anywhere"
    states = {site.record.state for world in seen for site in world[0]}
    assert states == set(State)


@pytest.mark.parametrize(("sites", "top"), [(2, 3), (3, 2)])
def test_never_a_guest_that_nobody_may_run(sites: int, top: int) -> None:
    """From every reachable world, delivery and retries alone lead to one owner that runs it."""
    seen = explore(sites, top)
    back: dict[World, list[World]] = {}
    todo = deque(seen)
    known = set(seen)
    while todo:
        world = todo.popleft()
        for after in successors(world, top, calm=True):
            back.setdefault(after, []).append(world)
            if after not in known:
                known.add(after)
                todo.append(after)
    good = {world for world in known if settled(world)}
    todo = deque(good)
    while todo:
        for before in back.get(todo.popleft(), ()):
            if before not in good:
                good.add(before)
                todo.append(before)
    stuck = [world for world in known if world not in good]
    assert not stuck, f"{len(stuck)} of {len(known)} worlds are stuck, such as {stuck[0]}"


def test_a_broken_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search has teeth: a source that resumes after granting makes two owners."""
    bad = Row(State.GRANTED, Event.RETRY, ownership.When.ANY, State.OWNER, ownership.Epochs.RENEW, (Action.RESUME,))
    monkeypatch.setitem(ownership._INDEX, (bad.state, bad.event, bad.when), bad)
    with pytest.raises(AssertionError, match="two"):
        explore(2, 3)


def test_a_refusal_of_a_taken_epoch_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting which epochs were taken is only wrong with three sites; the search over three finds it."""
    for state in State:
        row = Row(state, Event.TOKEN, ownership.When.TAKEN, state, ownership.Epochs.KEEP, (Action.SEND_REFUSED,))
        monkeypatch.setitem(ownership._INDEX, (state, Event.TOKEN, ownership.When.TAKEN), row)
    with pytest.raises(AssertionError):
        explore(3, 4, crashes=False)


def test_an_original_that_is_retired_too_early_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that says TOOK at once, as after pre-copy, loses the memory that it has not fetched."""
    how = ownership.When.PENDING
    actions = (Action.RUN_COPY, Action.SEND_TOOK)
    row = Row(State.POISED, Event.TOKEN, how, State.FILLING, ownership.Epochs.TAKE, actions)
    monkeypatch.setitem(ownership._INDEX, (State.POISED, Event.TOKEN, how), row)
    with pytest.raises(AssertionError, match="still needed"):
        explore(2, 3)


def test_a_filling_guest_is_told_when_its_memory_is_lost() -> None:
    serving = Record(State.SERVING, epoch=1, pending=2, last=2, taken=1)
    away, actions = step(serving, Event.COPY_LOST)
    assert away.state is State.AWAY and actions == (Action.SEND_GONE, Action.RETIRE)
    filling = Record(State.FILLING, epoch=2, last=2, taken=2)
    assert step(filling, Event.RETRY) == (filling, (Action.SEND_FILLING,))
    assert step(away, Event.FILLING, 2) == (away, (Action.SEND_GONE,))
    owner, actions = step(filling, Event.GONE, 2)
    assert owner.state is State.OWNER and actions == (Action.END_COPY,)
    assert step(owner, Event.GONE, 2) == (owner, ()), "late"
    later = Record(State.FILLING, epoch=4, last=4, taken=4)
    assert step(later, Event.GONE, 2) == (later, ()), "of an earlier stay"


def test_the_table_has_one_row_for_each_case() -> None:
    keys = [(row.state, row.event, row.when) for row in TABLE]
    assert len(keys) == len(set(keys))
    for row in TABLE:
        assert (row.when is ownership.When.ANY) == (row.event not in MESSAGES)


def test_decisions_that_the_table_does_not_know_are_refused() -> None:
    with pytest.raises(HandoffFailed, match="away"):
        must(Record(State.AWAY, last=3), Event.BEGIN)
    with pytest.raises(HandoffFailed):
        must(Record(State.OWNER, 1, 0, 1, 1), Event.GRANT)


def test_late_messages_change_nothing() -> None:
    owner = Record(State.OWNER, epoch=3, last=3, taken=3)
    assert step(owner, Event.ABORT, 3) == (owner, ())
    assert step(owner, Event.OFFER, 9) == (owner, ())
    assert step(owner, Event.TOKEN, 3) == (owner, (Action.SEND_TOOK,))


@pytest.mark.full
@pytest.mark.parametrize(("sites", "top"), [(2, 5), (3, 4)])
@pytest.mark.timeout(900)
def test_never_two_owners_deeper(sites: int, top: int) -> None:
    assert len(explore(sites, top)) > 500_000
