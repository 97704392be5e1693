"""What becomes of a handoff whose worker is dead, and of ownership messages that come by way of the agents.

Everything here looks at the journal first and may be repeated at any time. It never decides anything that the table
does not say: before the token the source keeps the guest, after it the source asks until it is answered.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
from collections.abc import Callable
from typing import Protocol

import msgspec

from haulier.agent.site import Site
from haulier.chunks.store import ChunkStore
from haulier.disks.export import DiskExport
from haulier.disks.rounds import clean_up
from haulier.errors import UNDECODABLE, Cancelled, GuestError, HaulierError, PeerError
from haulier.guests.model import GuestSpec
from haulier.handoff import attempts, clients, retained
from haulier.handoff.custody import Happened, happen, record_of
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Job, Status
from haulier.handoff.ownership import SENDS, Action, Event, State, step
from haulier.handoff.residence import (
    adopt,
    adopt_container,
    copy_alive,
    copy_manifest,
    discard_copy,
    end_copy,
    guest_paths,
    images_dir,
    incoming_name,
    lease_of,
    manifest_name,
    memory_lost,
    pin_name,
    resume_original,
    retire,
    run_copy,
    spec_of,
)
from haulier.network import paths as networks

log = logging.getLogger(__name__)
PATIENCE_S = 2.0
"""For a QEMU that may be waiting for a page of its memory."""
LEFT_ALONE = signal.SIGUSR1
"""Tells a worker that the other site's worker is gone, so that it need not wait until its session gives up."""


class Messenger(Protocol):
    """Another site's agent, for ownership messages. Raises PeerError when it cannot be reached."""

    def own(self, guest: str, event: str, epoch: int, handoff: str = "") -> list[tuple[str, int]]: ...


def worker_alive(row: HandoffRow) -> bool:
    """The worker of that handoff still runs on this host."""
    return bool(row.pid) and row.worker.alive()


def recover(site: Site, journal: Journal, row: HandoffRow, messenger: Callable[[str], Messenger]) -> bool:
    """Brings a handoff without a worker to its end. False: the other site has to be asked again later."""
    networks.tidy(site.run)
    if row.role.startswith("prefetch"):
        _end_prefetch(site, journal, row)
        return True
    guest = journal.find_guest(row.guest)
    if guest is None or guest.handoff != row.id:
        if guest is None and row.role == "target":
            discard_copy(site, row.guest, row.id)
        elif guest is not None and guest.state == State.OWNER and row.role == "source" and not row.epoch:
            # It had not begun; but of a container a dump is tried before that.
            if guest.spec.get("container"):
                resume_original(site, row.guest)
            _forget(site, row)
        _record_end(journal, row, "failed", as_cancelled=True)
        return True
    state = record_of(guest).state
    if row.role == "source":
        return _recover_source(site, journal, row, state, messenger)
    return _recover_target(site, journal, row, state, messenger)


def _end_prefetch(site: Site, journal: Journal, row: HandoffRow) -> None:
    """Nobody owns anything by a prefetch: what came is kept, what was made for it is cleared away."""
    if row.role == "prefetch-source":
        qemu = adopt(site, row.guest, worker=True)
        if qemu is not None:
            try:
                clean_up(qemu.qmp)
            finally:
                qemu.close()
    with ChunkStore(site.store) as store:
        attempts.keep_chunks(store, row.guest, incoming_name(row.id))
    _forget(site, row)
    _end(site, journal, row, "failed")


def _recover_source(
    site: Site, journal: Journal, row: HandoffRow, state: State, messenger: Callable[[str], Messenger]
) -> bool:
    epoch = journal.guest(row.guest).pending
    if state in (State.GRANTED, State.SERVING):
        answers = _ask(messenger, row, Event.TOKEN, epoch)
        for event, answered in answers:
            _carry_out(site, journal, row, happen(journal, row.guest, event, answered, changes=_owner(row, event)))
        state = record_of(journal.guest(row.guest)).state
        if state is State.SERVING and not _runs(site, row.guest):
            lost = happen(journal, row.guest, Event.COPY_LOST)
            for event, named in lost.messages():
                _ask(messenger, row, event, named)
            _carry_out(site, journal, row, lost)
            _note_lost(journal, row)
            _end(site, journal, row, "failed", keep=False)
            return True
        if state in (State.GRANTED, State.SERVING):
            return False
        if state is State.OWNER:
            _forget(site, row)
        _end(site, journal, row, "done" if state is State.AWAY else "failed")
        return True
    if state is State.OFFERED:
        # First: a guest that does not run on, whatever is wrong with it, is no more in a handoff than any other.
        state = happen(journal, row.guest, Event.FAIL).after.state
    if state is State.OWNER:
        # The record was set back, now or by a worker or agent that died then: the guest perhaps not, and the other site
        # may not have been told, which would wait for two minutes.
        try:
            resume_original(site, row.guest)
        finally:
            if offered := epoch or row.epoch:
                _ask(messenger, row, Event.ABORT, offered)
        _forget(site, row)
        _end(site, journal, row, "failed")
        return True
    if state is State.AWAY:
        _retire(site, journal, row.guest, row.id)
        _end(site, journal, row, "done")
        return True
    _end(site, journal, row, "failed")
    return True


def _recover_target(
    site: Site, journal: Journal, row: HandoffRow, state: State, messenger: Callable[[str], Messenger]
) -> bool:
    epoch = journal.guest(row.guest).pending
    if state is State.RECEIVING:
        _carry_out(site, journal, row, happen(journal, row.guest, Event.FAIL))
    elif state is State.FILLING:
        if not _fill(site, journal, row, messenger):
            return False
    elif state in (State.READY, State.POISED):
        if not copy_alive(site, row.guest):
            _carry_out(site, journal, row, happen(journal, row.guest, Event.COPY_LOST))
        else:
            for event, answered in _ask(messenger, row, Event.READY, epoch):
                handle(site, journal, row.guest, event, answered)
            if record_of(journal.guest(row.guest)).state in (State.READY, State.POISED, State.FILLING):
                return False
    state = record_of(journal.guest(row.guest)).state
    if state is State.OWNER:
        settle_arrival(site, journal, row)
        lost = bool(journal.handoff(row.id).detail.get("code"))
        _end(site, journal, row, "failed" if lost else "done", keep=False)
    else:
        # Whoever wrote the step down may have died before the copy was gone, and before the source was told, which
        # would wait for two minutes. To do so twice does no harm.
        discard_copy(site, row.guest, row.id)
        if state is State.REFUSED and (offered := epoch or row.epoch):
            _ask(messenger, row, Event.REFUSED, offered)
        _end(site, journal, row, "failed")
    return True


def _fill(site: Site, journal: Journal, row: HandoffRow, messenger: Callable[[str], Messenger]) -> bool:
    """The guest runs here before its memory is whole, and its worker is dead. False: the source starts new ones."""
    if not _runs(site, row.guest):
        happened = happen(journal, row.guest, Event.COPY_LOST)
        _note_lost(journal, row)
    elif _filled(site, row.guest):
        happened = happen(journal, row.guest, Event.FILLED)
    else:
        settle_filling(site, journal, row)
        happened = happen(journal, row.guest, Event.RETRY)
    _carry_out(site, journal, row, happened)
    for event, named in happened.messages():
        for answer, answered in _ask(messenger, row, event, named):
            told = happen(journal, row.guest, answer, answered)
            if Action.END_COPY in told.actions:
                _note_lost(journal, row)
            _carry_out(site, journal, row, told)
    return record_of(journal.guest(row.guest)).state is not State.FILLING


def _runs(site: Site, guest: str) -> bool:
    qemu = adopt(site, guest)
    if qemu is not None:
        qemu.close()
    return qemu is not None


def _filled(site: Site, guest: str) -> bool:
    """All of the memory came before the worker died."""
    qemu = adopt(site, guest, worker=True)
    if qemu is None:
        return False
    qemu.patience_s = PATIENCE_S
    try:
        return qemu.query_migrate().get("status") == "completed"
    except GuestError:
        return False  # its main loop may wait for a page
    finally:
        qemu.close()


def settle_filling(site: Site, journal: Journal, row: HandoffRow) -> None:
    """As `settle_arrival`, if that was not done, of a guest whose memory is not whole.

    Its QEMU may not answer, because it waits for a page; but then the guest runs.
    """
    guest = journal.guest(row.guest)
    if guest.manifest == manifest_name(row.guest):
        return
    qemu = adopt(site, row.guest, worker=True)
    if qemu is not None:
        qemu.patience_s = PATIENCE_S
        try:
            if qemu.status() == "paused":
                clients.coming(site, row.guest)
                run_copy(site, qemu)
        except GuestError as error:
            log.info("guest %s does not say whether it runs: %s", row.guest, error)
        finally:
            qemu.close()
        clients.arrived(site, journal, spec_of(guest), row.peer)
    _name_disk(site, journal, row)


def _note_lost(journal: Journal, row: HandoffRow) -> None:
    detail = journal.handoff(row.id).detail
    error = {"error": memory_lost(row.guest), "code": GuestError.exit_code}
    journal.update_handoff(row.id, detail={**detail, **error})


def settle_arrival(site: Site, journal: Journal, row: HandoffRow) -> None:
    """The guest is owned here: runs the copy if it waits, and gives its disk's manifest the lasting name.

    Until it has that name, a guest that runs may still be without network, and its clients where it came from.
    """
    guest = journal.guest(row.guest)
    settled = guest.manifest == manifest_name(row.guest)
    if not settled:
        clients.coming(site, row.guest)
    qemu = adopt(site, row.guest, worker=True)
    if qemu is not None:
        try:
            if qemu.status() == "paused":
                run_copy(site, qemu)
        finally:
            qemu.close()
    container = adopt_container(site, row.guest)
    if container is not None and (not settled or container.status() == "paused"):
        container.cont()
        container.settle()
    if not settled and (qemu is not None or container is not None):
        clients.arrived(site, journal, spec_of(guest), row.peer)
    _name_disk(site, journal, row)


def _name_disk(site: Site, journal: Journal, row: HandoffRow) -> None:
    guest = journal.guest(row.guest)
    name, incoming = manifest_name(row.guest), incoming_name(row.id)
    with ChunkStore(site.store) as store:
        if incoming in store.manifest_names(incoming):
            copy_manifest(store, incoming, name)
            journal.advance(row.guest, guest.state, guest.state, manifest=name)
            # An export that has died is started with the journal's name; one that lives may hold the incoming one.
            with contextlib.suppress(HaulierError, OSError):
                DiskExport.attach(guest_paths(site, row.guest).nbd_ctl).swap(name)
            store.drop_manifest(incoming)
        store.drop_lease(lease_of(row.id))


def handle(
    site: Site, journal: Journal, guest: str, event: Event, epoch: int, source: str = ""
) -> list[tuple[str, int]]:
    """A message of the ownership table that came by way of the agents; what to answer.

    While a worker of this site deals with that guest, steps are its own, and only what needs none is answered; but it
    is told that the other site's worker is gone, for that is why its agent speaks.
    """
    row = journal.find_guest(guest)
    record = record_of(row)
    handoff = journal.find_handoff(row.handoff) if row is not None and row.handoff else None
    if source and (handoff is None or handoff.peer != source):
        # It may ask after a handoff of its own that is over, but what is under way here is between two others.
        then, actions = step(record, event, epoch)
        if row is None or then != record or not SENDS.keys() >= set(actions):
            log.warning("site %s sent %s about guest %s, whose handoff is not with it", source, event, guest)
            return []
        return [(e.value, n) for e, n in Happened(record, then, actions, row, epoch).messages()]
    if handoff is not None and handoff.state != "ended" and worker_alive(handoff):
        if event is not Event.TOOK and epoch in (record.pending, record.epoch):
            log.info("the worker of handoff %s at the other site is gone: its agent says %s", handoff.id, event)
            handoff.worker.signal(LEFT_ALONE)
        then, actions = step(record, event, epoch)
        if then != record or row is None:
            return []
        return [(e.value, n) for e, n in Happened(record, then, actions, row, epoch).messages()]
    told: list[tuple[str, int]] = []
    if record.state in (State.READY, State.POISED) and event is Event.TOKEN and not copy_alive(site, guest):
        lost = happen(journal, guest, Event.COPY_LOST)
        _carry_out(site, journal, handoff, lost)
        told += [(e.value, n) for e, n in lost.messages()]
    happened = happen(journal, guest, event, epoch, changes=_owner(handoff, event, site))
    _carry_out(site, journal, handoff, happened)
    if handoff is not None and handoff.state != "ended" and happened.after != record:
        after = happened.after.state
        if Action.END_COPY in happened.actions:
            _note_lost(journal, handoff)
            settle_arrival(site, journal, handoff)
            _end(site, journal, handoff, "failed", keep=False)
        elif after is State.OWNER and handoff.role == "target":
            settle_arrival(site, journal, handoff)
            _end(site, journal, handoff, "done")
        elif after in {State.ABSENT, State.REFUSED, State.OWNER}:
            if after is State.OWNER:
                _forget(site, handoff)
            _end(site, journal, handoff, "failed")
        elif after is State.AWAY:
            _end(site, journal, handoff, "done")
    return told + [(e.value, n) for e, n in happened.messages()]


def _owner(row: HandoffRow | None, event: Event, site: Site | None = None) -> dict[str, str]:
    if event in (Event.TOOK, Event.FILLING) and row is not None:
        return {"owner": row.peer, "wanted": ""}
    if event is Event.TOKEN and site is not None:
        return {"owner": site.name, "wanted": "running"}
    return {}


def _carry_out(site: Site, journal: Journal, row: HandoffRow | None, happened: Happened) -> None:
    """The physical part of a step; messages are the caller's."""
    guest = happened.row.name
    handoff = row.id if row is not None else happened.row.handoff
    for action in happened.actions:
        if action is Action.RESUME:
            if not resume_original(site, guest) and row is not None:
                text = f"guest {guest!r} does not run here any more: boot it with 'haulier guest start {guest}'"
                journal.update_handoff(row.id, detail={**journal.handoff(row.id).detail, "error": text})
        elif action is Action.DISCARD_COPY:
            discard_copy(site, guest, handoff)
        elif action is Action.END_COPY:
            end_copy(site, guest)
        elif action is Action.RETIRE:
            _retire(site, journal, guest, handoff)
        elif action is Action.RUN_COPY and row is not None:
            settle_arrival(site, journal, row)


def _retire(site: Site, journal: Journal, guest: str, handoff: str) -> None:
    retire(site, guest, handoff)
    journal.advance(guest, "away", "away", manifest="")


def _ask(messenger: Callable[[str], Messenger], row: HandoffRow, event: Event, epoch: int) -> list[tuple[Event, int]]:
    try:
        return [(Event(e), n) for e, n in messenger(row.peer).own(row.guest, event.value, epoch, row.id)]
    except (PeerError, HaulierError, ValueError) as error:
        log.info("site %s does not answer about guest %s: %s", row.peer, row.guest, error)
        return []


def _forget(site: Site, row: HandoffRow) -> None:
    shutil.rmtree(images_dir(site, row.id), ignore_errors=True)
    with ChunkStore(site.store) as store:
        with contextlib.suppress(HaulierError):
            store.drop_manifest(incoming_name(row.id))
        with contextlib.suppress(HaulierError):
            store.drop_manifest(pin_name(row.guest, row.id))
        store.drop_lease(lease_of(row.id))


def _keep_attempt(site: Site, journal: Journal, row: HandoffRow) -> None:
    """What a worker that died has sent or received so far serves the next attempt."""
    guest = journal.find_guest(row.guest)
    with contextlib.suppress(HaulierError, OSError, *UNDECODABLE):
        directory = site.handoff_root(row.id)
        job = msgspec.json.decode((directory / "job.json").read_bytes(), type=Job)
        if job.offer is not None:
            spec = msgspec.convert(job.offer.spec, GuestSpec)
        elif guest is not None:
            spec = spec_of(guest)
        else:
            return
        if spec.container is not None:
            return
        status = msgspec.json.decode((directory / "status.json").read_bytes(), type=Status)
        base = retained.open_base(site, row.guest, spec.uuid, status.memory_base)
        kind = "prefetch" if row.role.startswith("prefetch") else "cut"
        meta = attempts.Attempt(handoff=row.id, guest=row.guest, uuid=spec.uuid, peer=row.peer, kind=kind)
        attempts.keep(site, meta, site.mirror(row.id), base)


def _end(site: Site, journal: Journal, row: HandoffRow, outcome: str, *, keep: bool = True) -> None:
    # What a worker or an agent that was killed was just writing.
    directory = site.handoff_root(row.id)
    for unfinished in (directory / "status.new", *directory.glob(".*")):
        unfinished.unlink(missing_ok=True)
    if outcome == "failed" and keep:
        _keep_attempt(site, journal, row)
    site.mirror(row.id).unlink(missing_ok=True)
    shutil.rmtree(images_dir(site, row.id), ignore_errors=True)
    _record_end(journal, row, outcome, as_cancelled=keep)


def _record_end(journal: Journal, row: HandoffRow, outcome: str, *, as_cancelled: bool) -> None:
    """In one write, for who waits for the end reads the outcome at once."""
    detail = dict(journal.handoff(row.id).detail)
    detail.setdefault("recovered", True)
    if as_cancelled and outcome == "failed" and detail.get("cancel"):
        # A worker that is hit before it can heed the signal just dies: it was meant to.
        outcome = "cancelled"
        detail["error"] = f"handoff of {row.guest!r} cancelled; the guest runs on at its source"
        detail["code"] = Cancelled.exit_code
    journal.end_handoff(row.id, outcome, detail=detail)
