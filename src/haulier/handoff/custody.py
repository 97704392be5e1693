"""The ownership table applied to the journal: one durable step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from haulier.errors import HandoffFailed
from haulier.handoff.journal import GuestRow, Journal
from haulier.handoff.ownership import SENDS, Action, Event, Record, State, must, reply_epoch, step


@dataclass(frozen=True, slots=True)
class Happened:
    """A step that is durable. `actions` are still to be carried out, in order."""

    before: Record
    after: Record
    actions: tuple[Action, ...]
    row: GuestRow
    epoch: int

    @property
    def changed(self) -> bool:
        return self.before != self.after

    def messages(self) -> list[tuple[Event, int]]:
        """What to tell the other site."""
        return [
            (SENDS[action], reply_epoch(self.before, self.after, action, self.epoch))
            for action in self.actions
            if action in SENDS
        ]


def record_of(row: GuestRow | None) -> Record:
    """The table's view of a journal row; no row is ABSENT."""
    if row is None:
        return Record()
    return Record(State(row.state), row.epoch, row.pending, row.last_epoch, row.taken)


def happen(
    journal: Journal,
    guest: str,
    event: Event,
    epoch: int = 0,
    *,
    decided: bool = False,
    handoff: str = "",
    changes: Mapping[str, Any] | None = None,
) -> Happened:
    """Takes the step that the table has for `event`, durably, with `changes` of other columns in the same transaction.

    `decided`: the event is this site's own decision, and HandoffFailed is raised where the table has no row for it.
    Otherwise an event that does not apply changes nothing (a late or repeated message). `handoff`: the event is of that
    handoff, and does not apply to a guest that is in another one by now.
    """
    with journal.transaction():
        row = journal.find_guest(guest)
        before = record_of(row)
        if handoff and row is not None and row.handoff != handoff:
            if decided:
                raise HandoffFailed(f"handoff {handoff} of guest {guest!r} is over: {row.handoff} came after it")
            return Happened(before, before, (), row, epoch)
        after, actions = (must if decided else step)(before, event, epoch)
        if after != before:
            row = journal.advance(
                guest,
                before.state.value,
                after.state.value,
                epoch=after.epoch,
                pending=after.pending,
                last_epoch=after.last,
                taken=after.taken,
                **(changes or {}),
            )
    return Happened(before, after, actions, row or GuestRow(name=guest), epoch)
