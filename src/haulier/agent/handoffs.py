"""Handoffs as the agent sees them: begun, watched, cancelled, and taken up again when a worker dies."""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.agent import layers, prefetching
from haulier.agent.core import SETTLING_S, Core, ownership_of
from haulier.agent.site import check_name, check_transport
from haulier.errors import Conflict, HaulierError, PeerError, UnknownThing, UsageError
from haulier.handoff import recovery, spawning, worker
from haulier.handoff.custody import record_of
from haulier.handoff.journal import HandoffRow, new_handoff_id
from haulier.handoff.measures import ALLOWABLE, POST_COPY
from haulier.handoff.messages import Job, Options, Resumption
from haulier.handoff.ownership import MESSAGES, Event, State

log = logging.getLogger(__name__)

MAX_EPOCH: Final = 1 << 62
MOST_WAYPOINTS: Final = 4
_MAX_FILE: Final = 16 << 20
_PATIENCE_S: Final = 3.0
"""A worker that was just begun, or has just ended, is left alone for so long before its handoff is taken up."""
ARRIVED_S: Final = 5.0
_POLL_S: Final = 0.02
_RETRY_S: Final = (1.0, 2.0, 5.0, 10.0, 30.0)


class StartRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Hand `guest` to the site `to`."""

    guest: str
    to: str
    options: Options = Options()


class OwnershipMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    guest: str
    event: str
    epoch: int
    handoff: str = ""


class Handoffs:
    """All handoffs of which this site has a record, as source or target."""

    def __init__(self, core: Core, may_leave: Callable[[str, str], None] = lambda guest, to: None) -> None:
        """`may_leave(guest, to)` raises what stands against a handoff because of data at a third site."""
        self.core = core
        self._may_leave = may_leave
        self.site = core.site
        self.journal = core.journal
        self._tries: dict[str, tuple[int, float]] = {}
        self._threads: list[threading.Thread] = []
        self.beside: Callable[[Callable[[], None]], None] = self._in_a_thread
        """Runs a recovery beside the others: one that waits for a site that is away must not hold them up."""

    # -- seen ----------------------------------------------------------------------------------------------------

    def list(self, guest: str = "", limit: int = 100) -> list[dict[str, Any]]:
        """Newest first."""
        return [self._describe(row) for row in self.journal.handoffs(guest=guest or None)[:limit]]

    def show(self, name: str) -> dict[str, Any]:
        """A handoff by its id, or the newest of a guest by the guest's name. With its report, if there is one."""
        row = self.journal.find_handoff(name)
        if row is None:
            mine = self.journal.handoffs(guest=name)
            if not mine:
                raise UnknownThing(f"no handoff and no guest {name[:60]!r} at this site: 'haulier status' shows all")
            row = mine[0]
        facts = self._describe(row)
        facts["report"] = _read(self.site.handoff_root(row.id) / "report.json")
        return facts

    def _describe(self, row: HandoffRow) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "id": row.id,
            "guest": row.guest,
            "role": row.role.removeprefix("prefetch-"),
            "kind": "prefetch" if row.role in spawning.PREFETCH else "handoff",
            "source": self.site.name if row.role.endswith("source") else row.peer,
            "target": row.peer if row.role.endswith("source") else self.site.name,
            "state": row.state,
            "outcome": row.outcome,
            "epoch": row.epoch,
            "created": row.created,
            "ended": row.ended,
            "error": str(row.detail.get("error", "")),
            "code": int(row.detail.get("code", 0)),
        }
        status = _read(self.site.handoff_root(row.id) / "status.json") or {}
        status.pop("handoff", None)
        facts["status"] = status
        if row.state != "ended" and not recovery.worker_alive(row):
            facts["status"] = {**status, "phase": "recovering", "eta_s": -1.0}
        return facts

    def _wait_arrived(self, guest: str) -> None:
        """Lets the handoff end by which a guest came that is to go on at once: where it came from is told first."""
        deadline = time.monotonic() + ARRIVED_S
        while time.monotonic() < deadline and any(
            row.role == "target" and record_of(self.journal.guest(guest)).state is State.OWNER
            for row in self.journal.handoffs(guest=guest, live=True)
        ):
            time.sleep(_POLL_S)

    # -- begun and cancelled ---------------------------------------------------------------------------------------

    def start(self, request: StartRequest) -> dict[str, Any]:
        """Begins a handoff; what this site can know is refused at once, what the target says comes with the result."""
        if request.to == self.site.name:
            raise UsageError(f"guest {request.guest!r} is to go to {request.to!r}, which is this site: name another")
        peer = self.core.known_site(request.to)
        _check_options(request.options)
        self.check_waypoints(request)
        row = self.journal.guest(request.guest)
        prefetching.end_here(self.core, row.name)
        self._wait_arrived(row.name)
        with self.core.alone(row.name, "beginning a handoff"):
            record = record_of(self.journal.guest(row.name))
            if record.state is State.AWAY:
                raise Conflict(f"guest {row.name!r} is at site {row.owner!r} already: begin its handoff there")
            if record.state in (State.ABSENT, State.REFUSED):
                raise UnknownThing(f"no guest {row.name!r} at this site: 'haulier guest list' shows those there are")
            if record.state is not State.OWNER or self.journal.handoffs(guest=row.name, live=True):
                raise Conflict(
                    f"guest {row.name!r} is being handed over already (handoff {row.handoff}): "
                    "see 'haulier status', or cancel it"
                )
            if row.wanted != "running":
                raise Conflict(f"guest {row.name!r} is {row.wanted}: only a running guest can be handed over")
            self._may_leave(row.name, peer.name)
            layers.release(self.site, row)
            job = Job(handoff=new_handoff_id(), role="source", guest=row.name, peer=peer.name, options=request.options)
            self.core.children.append(spawning.start_source(self.site, self.journal, job))
        return self.show(job.handoff)

    def check_waypoints(self, request: StartRequest) -> None:
        """They are other sites of the fleet than the two. Raises UsageError, UnknownThing."""
        names = request.options.through
        if len(set(names)) < len(names) or len(names) > MOST_WAYPOINTS or {self.site.name, request.to} & set(names):
            raise UsageError(f"a handoff goes through {MOST_WAYPOINTS} sites at most, and not its source or target")
        for name in names:
            self.core.known_site(name)
        if names and (request.options.transport or self.site.transport) == "mptcp":
            raise UsageError("what goes through another site is a connection of its own: give --transport striping")

    def prefetch(self, request: StartRequest) -> dict[str, Any]:
        """Begins a prefetch; an earlier one of that guest is ended for it."""
        self.check_waypoints(request)
        return self.show(prefetching.start(self.core, request.guest, request.to, request.options).handoff)

    def cancel(self, name: str) -> dict[str, Any]:
        """Asks the worker to stop. The handoff's end tells whether it came in time. Conflict if it is over."""
        row = self.journal.handoff(str(self.show(name)["id"]))
        if row.state == "ended":
            raise Conflict(f"handoff {row.id} is over ({row.outcome}): there is nothing to cancel")
        state = record_of(self.journal.find_guest(row.guest)).state
        if row.role in spawning.PREFETCH:
            pass
        elif (row.role == "source" and state not in (State.OWNER, State.OFFERED)) or (
            row.role == "target" and state not in (State.RECEIVING, State.READY)
        ):
            raise Conflict(
                f"handoff {row.id} cannot be cancelled any more: the guest has been given to site "
                f"{row.peer if row.role == 'source' else self.site.name!r}; hand it back instead"
            )
        # a worker that is hit before it can heed the signal just dies; recovery then has to know that it was meant to
        self.journal.update_handoff(row.id, detail={**row.detail, "cancel": True})
        row.worker.signal(signal.SIGTERM)
        return self.show(row.id)

    def reclaim(self, name: str) -> dict[str, Any]:
        """Takes back a guest whose token went to a site that is gone for good, and was put out of the fleet.

        The operator speaks for that site, as if it had refused: whether it ran the guest for a while, and what it
        wrote, nobody can know here. Conflict for any other guest.
        """
        guest = self.journal.guest(name)
        row = self.journal.find_handoff(guest.handoff) if guest.handoff else None
        if guest.state != State.GRANTED or row is None:
            raise Conflict(
                f"guest {name!r} is '{guest.state}' at site {self.site.name!r}: only one that is 'granted' to a site "
                "which never answered can be taken back"
            )
        if self.journal.find_site(row.peer) is not None:
            raise Conflict(
                f"site {row.peer!r} may run guest {name!r}, or will when it is back: wait until it answers. If it is "
                f"gone for good, put it out of the fleet ('haulier site remove {row.peer} --force', at the site that "
                "made the fleet), then try again"
            )
        # It would ask for half a minute more; what it had to say is in the journal.
        if not row.worker.kill(SETTLING_S):
            raise Conflict(f"the worker of handoff {row.id} (process {row.pid}) does not end: try again")
        with self.core.taken_in(name, "being taken back"):
            log.warning("guest %s is taken back from site %s, which is gone for good", name, row.peer)
            recovery.handle(self.site, self.journal, name, Event.REFUSED, guest.pending)
        after = self.journal.guest(name)
        if after.state != State.OWNER:
            raise Conflict(f"guest {name!r} is '{after.state}' by now: 'haulier status {row.id}' says how that came")
        return {
            "guest": name,
            "epoch": after.epoch,
            "status": str(self.journal.handoff(row.id).detail.get("error", "")),
        }

    # -- between agents ----------------------------------------------------------------------------------------------

    def ownership(self, message: OwnershipMessage, caller: str) -> dict[str, Any]:
        """A message of the ownership table from another site's agent; what to answer."""
        check_name(message.guest, "guest")
        try:
            event = Event(message.event)
        except ValueError:
            raise UsageError(
                f"{message.event[:40]!r} is no message about ownership: run the same haulier there"
            ) from None
        if event not in MESSAGES - {Event.OFFER} or not 0 < message.epoch < MAX_EPOCH:
            raise UsageError(f"{event.value!r} with epoch {message.epoch} is no message between agents")
        if not self._party(message.guest, caller):
            log.warning("site %s sent %s about guest %s, in which it has no part", caller, event, message.guest)
            return {"messages": []}
        with self.core.alone(ownership_of(message.guest), "settling who owns it"):
            answers = recovery.handle(self.site, self.journal, message.guest, event, message.epoch, caller)
        return {"messages": [list(answer) for answer in answers]}

    def resume_target(self, request: Resumption, caller: str) -> dict[str, Any]:
        """New workers go on with a post-copy: starts this side's; an `Accept`. Conflict while it cannot be."""
        check_name(request.guest, "guest")
        if not re.fullmatch(r"[0-9a-f]{64}", request.secret):
            raise UsageError("a session's secret is 64 hexadecimal digits")
        with self.core.alone(request.guest, "going on with its post-copy"):
            row = self.journal.handoff(request.handoff)
            record = record_of(self.journal.find_guest(request.guest))
            mine = row.peer == caller and row.role == "target" and row.guest == request.guest
            if not mine or record.state is not State.FILLING or record.epoch != request.epoch:
                raise Conflict(f"guest {request.guest!r} at site {self.site.name!r} waits for no such memory")
            if row.worker.signal(recovery.LEFT_ALONE):
                raise Conflict(f"the worker of handoff {row.id} at site {self.site.name!r} is just ending: ask again")
            recovery.settle_filling(self.site, self.journal, row)
            accept, process = spawning.accept_resumption(self.site, self.journal, row, request.secret, request.pictured)
            self.core.children.append(process)
        return dict(msgspec.to_builtins(accept))

    def _party(self, guest: str, caller: str) -> bool:
        """A site may speak of a guest only if it was ever the other side of a handoff of it."""
        rows = self.journal.handoffs(guest=guest)
        return any(row.peer == caller and row.role not in spawning.PREFETCH for row in rows)

    # -- kept going ----------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """At the agent's start: says what goes on, and makes whole what was cut short between two writes."""
        for guest in self.journal.guests():
            if guest.state == State.RECEIVING and self.journal.find_handoff(guest.handoff) is None:
                # killed between taking an offer and recording the handoff: recovery needs the record
                self.journal.add_handoff(
                    HandoffRow(guest.handoff, guest.name, "target", guest.owner, epoch=guest.pending)
                )
        for row in self.journal.handoffs(live=True):
            how = "goes on" if recovery.worker_alive(row) else "has no worker any more: taking it up"
            log.info("handoff %s of guest %s: %s", row.id, row.guest, how)
        self.supervise()

    def supervise(self) -> None:
        """Brings handoffs without a worker to their end, patiently where the other site does not answer."""
        self.core.children = [child for child in self.core.children if child.poll() is None]
        live = self.journal.handoffs(live=True)
        for name in self._tries.keys() - {row.id for row in live}:
            del self._tries[name]
        now = time.monotonic()
        for row in live:
            if recovery.worker_alive(row) or self.core.is_busy(row.guest):
                continue
            if not row.pid and 0 <= time.time() - row.created < _PATIENCE_S:
                continue
            count, again = self._tries.get(row.id, (0, 0.0))
            if now < again:
                continue
            self._tries[row.id] = (count + 1, now + _RETRY_S[min(count, len(_RETRY_S) - 1)])
            self.beside(partial(self._recover, row))

    def _in_a_thread(self, work: Callable[[], None]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, name="recovery", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self, wait_s: float) -> None:
        """Lets recoveries finish; one that waits for another site any longer is begun again by the next agent."""
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _recover(self, row: HandoffRow) -> None:
        try:
            with self.core.alone(row.guest, f"handoff {row.id} is being settled"):
                # the row may have ended since it was read
                row = self.journal.handoff(row.id)
                if row.state == "ended" or recovery.worker_alive(row):
                    return
                done = recovery.recover(self.site, self.journal, row, self._messenger)
                if not done and record_of(self.journal.find_guest(row.guest)).state is State.SERVING:
                    self.core.children.append(spawning.resume_source(self.site, self.journal, row))
            log.info("handoff %s of guest %s: %s", row.id, row.guest, "settled" if done else "not settled yet")
        except Conflict as error:
            log.info("handoff %s: %s", row.id, error)
        except Exception:
            # one that cannot be settled must not keep the others from being settled
            log.exception("handoff %s of guest %s cannot be settled yet", row.id, row.guest)

    def _messenger(self, site: str) -> worker.AgentPeer:
        try:
            return worker.peer_of(self.site, self.journal, site)
        except PeerError:
            raise
        except HaulierError as error:
            raise PeerError(f"site {site!r} cannot be asked: {error}") from error


def _check_options(options: Options) -> None:
    if options.disk not in ("full", "on-demand"):
        raise UsageError(f"a disk cannot go {options.disk[:40]!r}: give full or on-demand")
    if options.transport:
        check_transport(options.transport)
    if options.paths not in ("cheap", "all", "deadline"):
        raise UsageError(f"there is no choice of paths {options.paths[:40]!r}: give cheap, all or deadline")
    if options.join not in ("ahead", "after"):
        raise UsageError(f"clients cannot join {options.join[:40]!r}: give ahead or after")
    if not 10 <= options.downtime_ms <= 60_000:
        raise UsageError(f"a downtime of {options.downtime_ms} ms cannot be aimed for: give 10 to 60000")
    for word in options.allow:
        if word not in ALLOWABLE:
            raise UsageError(f"{word[:40]!r} cannot be allowed: give {', '.join(ALLOWABLE)}")
    if POST_COPY in options.allow and options.check:
        raise UsageError(
            "with --allow post-copy the guest may run before its memory is whole, so that there is nothing to compare: "
            "leave out --check"
        )
    if options.keep_fresh_s:
        raise UsageError("only a prefetch is kept fresh: 'haulier prefetch' begins one")
    if not 0 <= options.deadline_s < 1e7 or not 0 < options.stall_s < 1e7 or not -50 <= options.level <= 19:
        raise UsageError("the handoff's options are out of bounds: seconds from 0 to 10000000, level from -50 to 19")


def _read(path: Path) -> dict[str, Any] | None:
    """A worker's JSON file; None if there is none (yet) or it is not whole."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_FILE))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
