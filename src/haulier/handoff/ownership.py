"""Who owns a guest: the one table that both sites follow.

The rules in prose
------------------
Each site keeps one record per guest, durable before it takes effect. A guest may run only where the record says
``OWNER`` or ``OFFERED``. To hand it over the owner reserves the next epoch (``OFFERED``), the target collects a copy
that stays stopped (``RECEIVING``), makes it durable, and votes (``READY``). Only then does the source stop being the
one who may run it: it writes ``GRANTED`` to its own journal and sends the token. The target that gets the token
writes ``OWNER`` and runs. Until the source hears ``TOOK`` or ``REFUSED`` it repeats the token, and never runs the
guest, not even after a power cut.

The target may refuse at any time before the token reaches it, because a refusal is as durable as a vote: the source
that is told so owns the guest again, under a fresh epoch. So neither side ever waits for the other in order to be
*safe*, only in order to be *certain*; and a target that lost its copy in a power cut cannot strand the guest.

Why an epoch is never used twice: the owner alone hands out epochs, each above all it has seen, and the right to hand
out the next one passes with the token (or comes back with the refusal).

Post-copy of memory: the copy's disk is complete and durable, and a QEMU waits for device state (``POISED``). That is
the vote; the token is as binding as ever. Whoever takes it owns the guest and runs it while its memory still comes from
the source (``FILLING``), and the source, which is told so, keeps its stopped QEMU as a server of pages and nothing else
(``SERVING``). ``TOOK`` says that nothing is needed of the source any more, and only then is the original retired. If
the source's QEMU dies in that stage it says ``GONE``: what the guest had in memory is lost, and its disk, which is the
target's, is as it was after its last write.

Everything that decides lives in `TABLE`; `step` only looks things up in it. The table is explored exhaustively by
``tests/handoff/test_ownership.py``: every order of loss, duplication, delay, crash and restart, to a stated depth.
This is a commit protocol in the manner of Gray's two-phase commit with presumed abort; what differs is that the
participant may take its vote back while the decision has not reached it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from haulier.errors import HandoffFailed


class State(enum.StrEnum):
    """What a site's journal says about one guest."""

    ABSENT = "absent"
    """Not here, and no copy under way."""
    OWNER = "owner"
    """May run here."""
    OFFERED = "offered"
    """May run here; the next epoch is reserved for a handoff under way."""
    GRANTED = "granted"
    """The token is written: never runs here unless the target refuses."""
    AWAY = "away"
    """The target has confirmed; what is left here is only useful for the way back."""
    RECEIVING = "receiving"
    """A copy is being built here; it stays stopped."""
    READY = "ready"
    """The copy is complete and durable, and waits for the token."""
    REFUSED = "refused"
    """This epoch will never run here."""
    POISED = "poised"
    """As READY, but memory is still to come after the token."""
    FILLING = "filling"
    """May run here; its memory still comes from where it was."""
    SERVING = "serving"
    """The target runs the guest and fetches memory from the stopped QEMU here, which never runs again."""


MAY_RUN = frozenset({State.OWNER, State.OFFERED, State.FILLING})
"""States in which this site, and no other, may run the guest."""
UNDER_WAY = frozenset(
    {State.OFFERED, State.GRANTED, State.RECEIVING, State.READY, State.POISED, State.FILLING, State.SERVING}
)
"""States that a handoff has to lead out of again."""


class Event(enum.StrEnum):
    """What can happen: decisions of this site, then messages of the other (each names an epoch)."""

    BEGIN = "begin"
    """The owner starts a handoff."""
    COMPLETE = "complete"
    """The target's copy is complete and durable, and not running."""
    POISE = "poise"
    """The target's disk is complete and durable, its QEMU waits for device state, and memory may follow after that."""
    FILLED = "filled"
    """All of the memory is here."""
    GRANT = "grant"
    """The source decides to pass the token (only with the guest stopped, and after READY)."""
    FAIL = "fail"
    """Cancelled, worker dead, link gone, anything wrong before the token."""
    COPY_LOST = "copy-lost"
    """The QEMU that this site's state speaks of is gone (it, or its host, died)."""
    RETRY = "retry"
    """Restarted, or nothing heard for a while: say again what is open."""

    OFFER = "offer"
    READY = "ready"
    TOKEN = "token"
    TOOK = "took"
    REFUSED = "refused"
    ABORT = "abort"
    FILLING = "filling"
    """The target runs the guest, and still needs the source's memory."""
    GONE = "gone"
    """The source's memory is lost."""


MESSAGES = frozenset(
    {Event.OFFER, Event.READY, Event.TOKEN, Event.TOOK, Event.REFUSED, Event.ABORT, Event.FILLING, Event.GONE}
)


class When(enum.StrEnum):
    """How the epoch of a message relates to the record."""

    PENDING = "pending"
    """It is the epoch that is under way here."""
    NEWER = "newer"
    """It is above every epoch that this site has seen."""
    HELD = "held"
    """It is the epoch under which this site owns the guest; where a state has no row for it, TAKEN's applies."""
    TAKEN = "taken"
    """Not above the highest epoch that this site ever took."""
    OLD = "old"
    """Anything else: a duplicate, a late one, or one that was refused."""
    ANY = "any"


class Action(enum.StrEnum):
    """What the edge does after the new record is durable, in this order."""

    SEND_OFFER = "send offer"
    SEND_READY = "send ready"
    SEND_TOKEN = "send token"
    SEND_TOOK = "send took"
    SEND_REFUSED = "send refused"
    SEND_ABORT = "send abort"
    SEND_FILLING = "send filling"
    SEND_GONE = "send gone"
    RUN_COPY = "run the copy"
    RESUME = "resume the original"
    DISCARD_COPY = "discard the copy"
    RETIRE = "retire the original"
    END_COPY = "end the copy"
    """It runs, or waits, without a memory that can ever be whole: its disk stays."""


SENDS = {
    Action.SEND_OFFER: Event.OFFER,
    Action.SEND_READY: Event.READY,
    Action.SEND_TOKEN: Event.TOKEN,
    Action.SEND_TOOK: Event.TOOK,
    Action.SEND_REFUSED: Event.REFUSED,
    Action.SEND_ABORT: Event.ABORT,
    Action.SEND_FILLING: Event.FILLING,
    Action.SEND_GONE: Event.GONE,
}


class Epochs(enum.StrEnum):
    """What a row does to the numbers of the record."""

    KEEP = "keep"
    RESERVE = "reserve"
    """pending := last + 1, last := last + 1"""
    ADOPT = "adopt"
    """pending := the message's epoch, last := it"""
    TAKE = "take"
    """epoch := pending, taken := pending, pending := 0"""
    DROP = "drop"
    """pending := 0"""
    LOSE = "lose"
    """epoch := 0, pending := 0"""
    RENEW = "renew"
    """epoch := taken := last := last + 1, pending := 0 (the granted epoch is burnt)"""


@dataclass(frozen=True, slots=True)
class Record:
    """One guest at one site. Numbers are epochs; 0 is none."""

    state: State = State.ABSENT
    epoch: int = 0
    """The epoch under which this site owns the guest."""
    pending: int = 0
    """The epoch of the handoff under way."""
    last: int = 0
    """The highest epoch ever seen here."""
    taken: int = 0
    """The highest epoch ever owned here. It outlives the ownership: a token that is repeated because TOOK was lost
    must be answered with TOOK even after the guest has moved on to a third site."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    state: State
    event: Event
    when: When
    to: State
    epochs: Epochs = Epochs.KEEP
    actions: tuple[Action, ...] = ()


S, E, W, N, A = State, Event, When, Epochs, Action

TABLE: tuple[Row, ...] = (
    # --- source -----------------------------------------------------------------------------------------------------
    Row(S.OWNER, E.BEGIN, W.ANY, S.OFFERED, N.RESERVE, (A.SEND_OFFER,)),
    Row(S.OFFERED, E.READY, W.PENDING, S.OFFERED),
    Row(S.OFFERED, E.GRANT, W.ANY, S.GRANTED, N.KEEP, (A.SEND_TOKEN,)),
    Row(S.OFFERED, E.FAIL, W.ANY, S.OWNER, N.DROP, (A.RESUME, A.SEND_ABORT)),
    Row(S.OFFERED, E.REFUSED, W.PENDING, S.OWNER, N.DROP, (A.RESUME,)),
    Row(S.GRANTED, E.READY, W.PENDING, S.GRANTED, N.KEEP, (A.SEND_TOKEN,)),
    Row(S.GRANTED, E.RETRY, W.ANY, S.GRANTED, N.KEEP, (A.SEND_TOKEN,)),
    Row(S.GRANTED, E.TOOK, W.PENDING, S.AWAY, N.LOSE, (A.RETIRE,)),
    Row(S.GRANTED, E.REFUSED, W.PENDING, S.OWNER, N.RENEW, (A.RESUME,)),
    # Only one who took the token can offer anything above it: the offer stands for the lost TOOK.
    Row(S.GRANTED, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT, (A.RETIRE,)),
    Row(S.GRANTED, E.FILLING, W.PENDING, S.SERVING),
    Row(S.SERVING, E.RETRY, W.ANY, S.SERVING, N.KEEP, (A.SEND_TOKEN,)),
    Row(S.SERVING, E.TOOK, W.PENDING, S.AWAY, N.LOSE, (A.RETIRE,)),
    Row(S.SERVING, E.COPY_LOST, W.ANY, S.AWAY, N.LOSE, (A.SEND_GONE, A.RETIRE)),
    Row(S.SERVING, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT, (A.RETIRE,)),
    # --- target -----------------------------------------------------------------------------------------------------
    Row(S.ABSENT, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT),
    Row(S.AWAY, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT),
    Row(S.REFUSED, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT),
    Row(S.RECEIVING, E.COMPLETE, W.ANY, S.READY, N.KEEP, (A.SEND_READY,)),
    Row(S.RECEIVING, E.FAIL, W.ANY, S.REFUSED, N.DROP, (A.DISCARD_COPY, A.SEND_REFUSED)),
    Row(S.RECEIVING, E.COPY_LOST, W.ANY, S.REFUSED, N.DROP, (A.DISCARD_COPY, A.SEND_REFUSED)),
    Row(S.RECEIVING, E.ABORT, W.PENDING, S.ABSENT, N.DROP, (A.DISCARD_COPY,)),
    # The owner offers anew: the earlier attempt is over, whatever became of its ABORT.
    Row(S.RECEIVING, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT, (A.DISCARD_COPY,)),
    Row(S.READY, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT, (A.DISCARD_COPY,)),
    Row(S.READY, E.TOKEN, W.PENDING, S.OWNER, N.TAKE, (A.RUN_COPY, A.SEND_TOOK)),
    Row(S.READY, E.ABORT, W.PENDING, S.ABSENT, N.DROP, (A.DISCARD_COPY,)),
    Row(S.READY, E.RETRY, W.ANY, S.READY, N.KEEP, (A.SEND_READY,)),
    Row(S.READY, E.FAIL, W.ANY, S.REFUSED, N.DROP, (A.DISCARD_COPY, A.SEND_REFUSED)),
    Row(S.READY, E.COPY_LOST, W.ANY, S.REFUSED, N.DROP, (A.DISCARD_COPY, A.SEND_REFUSED)),
    Row(S.RECEIVING, E.POISE, W.ANY, S.POISED, N.KEEP, (A.SEND_READY,)),
    Row(S.POISED, E.OFFER, W.NEWER, S.RECEIVING, N.ADOPT, (A.DISCARD_COPY,)),
    Row(S.POISED, E.TOKEN, W.PENDING, S.FILLING, N.TAKE, (A.RUN_COPY, A.SEND_FILLING)),
    Row(S.POISED, E.ABORT, W.PENDING, S.ABSENT, N.DROP, (A.DISCARD_COPY,)),
    Row(S.POISED, E.RETRY, W.ANY, S.POISED, N.KEEP, (A.SEND_READY,)),
    Row(S.POISED, E.FAIL, W.ANY, S.REFUSED, N.DROP, (A.DISCARD_COPY, A.SEND_REFUSED)),
    Row(S.POISED, E.COPY_LOST, W.ANY, S.REFUSED, N.DROP, (A.DISCARD_COPY, A.SEND_REFUSED)),
    Row(S.FILLING, E.FILLED, W.ANY, S.OWNER, N.KEEP, (A.SEND_TOOK,)),
    Row(S.FILLING, E.RETRY, W.ANY, S.FILLING, N.KEEP, (A.SEND_FILLING,)),
    Row(S.FILLING, E.TOKEN, W.HELD, S.FILLING, N.KEEP, (A.SEND_FILLING,)),
    Row(S.FILLING, E.COPY_LOST, W.ANY, S.OWNER, N.KEEP, (A.END_COPY, A.SEND_TOOK)),
    Row(S.FILLING, E.GONE, W.HELD, S.OWNER, N.KEEP, (A.END_COPY,)),
    # --- either, whatever the state ---------------------------------------------------------------------------------
    # A vote for an offer that is no longer on: that target must not wait for ever.
    *(Row(state, E.READY, W.OLD, state, N.KEEP, (A.SEND_ABORT,)) for state in S),
    *(Row(state, E.READY, W.TAKEN, state, N.KEEP, (A.SEND_ABORT,)) for state in S),
    # The token arrived twice because TOOK was lost.
    *(Row(state, E.TOKEN, W.TAKEN, state, N.KEEP, (A.SEND_TOOK,)) for state in S),
    # A token for a copy that is not there any more goes back. Such an epoch can never be adopted again.
    *(Row(state, E.TOKEN, W.OLD, state, N.KEEP, (A.SEND_REFUSED,)) for state in S),
    # Somebody waits for memory that is not here any more.
    *(Row(state, E.FILLING, W.OLD, state, N.KEEP, (A.SEND_GONE,)) for state in S),
)

_INDEX = {(row.state, row.event, row.when): row for row in TABLE}


def when(record: Record, epoch: int) -> When:
    """How `epoch` of a message relates to `record`."""
    if epoch > record.last:
        return When.NEWER
    if epoch == record.pending:
        return When.PENDING
    if epoch and epoch == record.epoch:
        return When.HELD
    return When.TAKEN if epoch <= record.taken else When.OLD


def find(record: Record, event: Event, epoch: int = 0) -> Row | None:
    """The row that applies, or None: then nothing happens (a late or repeated message)."""
    row = _INDEX.get((record.state, event, When.ANY))
    if row is None and event in MESSAGES:
        how = when(record, epoch)
        row = _INDEX.get((record.state, event, how))
        if row is None and how is When.HELD:
            row = _INDEX.get((record.state, event, When.TAKEN))
    return row


def apply(record: Record, row: Row, epoch: int = 0) -> Record:
    """The record after `row`; `epoch` is the message's."""
    now = replace(record, state=row.to)
    if row.epochs is Epochs.RESERVE:
        return replace(now, pending=record.last + 1, last=record.last + 1)
    if row.epochs is Epochs.ADOPT:
        return replace(now, epoch=0, pending=epoch, last=epoch)
    if row.epochs is Epochs.TAKE:
        return replace(now, epoch=record.pending, taken=record.pending, pending=0)
    if row.epochs is Epochs.DROP:
        return replace(now, pending=0)
    if row.epochs is Epochs.LOSE:
        return replace(now, epoch=0, pending=0)
    if row.epochs is Epochs.RENEW:
        fresh = record.last + 1
        return replace(now, epoch=fresh, last=fresh, taken=fresh, pending=0)
    return now


def step(record: Record, event: Event, epoch: int = 0) -> tuple[Record, tuple[Action, ...]]:
    """The record after `event` and what to do once it is durable. Unknown combinations change nothing."""
    row = find(record, event, epoch)
    if row is None:
        return record, ()
    return apply(record, row, epoch), row.actions


def must(record: Record, event: Event, epoch: int = 0) -> tuple[Record, tuple[Action, ...]]:
    """Like `step`, for a decision of this site: HandoffFailed where the table has no row for it."""
    row = find(record, event, epoch)
    if row is None:
        raise HandoffFailed(
            f"the guest is '{record.state}' here (epoch {record.epoch}), so '{event}' is not possible; "
            "see 'haulier status' for what is under way"
        )
    return apply(record, row, epoch), row.actions


def reply_epoch(before: Record, after: Record, action: Action, epoch: int) -> int:
    """The epoch that a message sent by `action` names."""
    if action in (
        Action.SEND_ABORT,
        Action.SEND_REFUSED,
        Action.SEND_TOOK,
        Action.SEND_FILLING,
        Action.SEND_GONE,
    ):
        return epoch or before.pending or before.epoch
    return after.pending
