"""New workers for a guest that runs before its memory is whole: they go on where dead ones, or a dead link, left off.

Both QEMUs have paused their post-copy by then, or are made to. The target's listens again, the source's says what had
arrived by the target's word, and sends the rest, through new proxies, whose mirrors begin as what both dead workers'
held.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from typing import Any, Final, Protocol

from haulier.agent.site import Site
from haulier.errors import Conflict, GuestError, HandoffFailed, HaulierError
from haulier.guests import rescue
from haulier.guests.command import RAM_ID
from haulier.guests.qemu import Qemu
from haulier.handoff import agreeing, clients, served
from haulier.handoff.attempts import picture_id
from haulier.handoff.control import Control
from haulier.handoff.convergence import RecentMost, Window, serving_window
from haulier.handoff.journal import Journal
from haulier.handoff.memory_link import MemoryPump
from haulier.handoff.messages import (
    Accept,
    AnyMessage,
    Failed,
    Filled,
    Finish,
    Job,
    MemoryReady,
    Offer,
    Resumption,
    Status,
)
from haulier.handoff.offering import connect
from haulier.handoff.progress import Progress
from haulier.handoff.residence import guest_paths, memory_lost, retire
from haulier.handoff.source import CONNECT_S
from haulier.handoff.token import OwnPeer, Token
from haulier.handoff.urgent import UrgentPump
from haulier.handoff.vm_target import VmTarget
from haulier.memory.proxy import SourceProxy
from haulier.session import Session

log = logging.getLogger(__name__)

PAUSE_S: Final = 30.0
"""How long QEMU may take to see that its connection is gone."""
PATIENCE_S: Final = 2.0
GRACE_S: Final = 15.0
BUSY_S: Final = 20.0
LEVEL: Final = 3


class Peer(OwnPeer, Protocol):
    """The target's agent."""

    def resume(self, request: Resumption) -> Accept: ...


class ResumeSource:
    """The source's side. `run` returns the report; HaulierError when it breaks again: then it is begun again."""

    def __init__(self, site: Site, journal: Journal, job: Job, peer: Peer) -> None:
        self.site, self.journal, self.job, self.peer = site, journal, job, peer
        self.report: dict[str, Any] = {}
        self.left_alone = threading.Event()
        """The other site's worker is gone, by the word of its agent: set from outside."""
        status = Status(handoff=job.handoff, role="source", guest=job.guest, source=site.name, target=job.peer)
        self.progress = Progress(site.handoff_root(job.handoff), status)
        self._row = journal.handoff(job.handoff)
        self._token = Token(journal, job, site.name, peer, self.left_alone)
        self._over = threading.Event()
        self._began = time.monotonic()
        self._rates = RecentMost()
        self._rate = 0.0
        self._session: Session | None = None
        self._pump: MemoryPump | None = None
        self._filled: Filled | None = None
        self._marks: dict[str, float] = {
            name: float(at) for name, at in self._row.detail.get("post_copy", {}).get("marks", {}).items()
        }

    def run(self) -> dict[str, Any]:
        """Serves until the target has all of the memory, then clears the original away."""
        self._token.take_up(self.journal.guest(self.job.guest).pending)
        self.progress.phase("post-copy", f"going on with the memory of {self.job.guest}")
        self._qemu = Qemu.adopt(guest_paths(self.site, self.job.guest), worker=True)
        with contextlib.ExitStack() as network:
            try:
                self._serve(network)
                self._finish()
            finally:
                self._over.set()
                self.progress.finish()
                if self._pump is not None:
                    self._pump.close()
                    self._pump.proxy.close()
                self.site.mirror(self.job.handoff).unlink(missing_ok=True)
                if self._session is not None:
                    self._session.close(linger_s=3)
                self._qemu.close()
                self.progress.write(force=True)
        return self.report

    def _serve(self, network: contextlib.ExitStack) -> None:
        job, epoch = self.job, self._token.epoch
        broken = served.remembered(self._row)
        secret = secrets.token_hex(32)
        base = served.picture_of(self.site.mirror(job.handoff))
        accept = self._ask(Resumption(job.guest, job.handoff, epoch, secret, pictured=base is not None))
        self._began = time.monotonic()
        offer = Offer(
            handoff=job.handoff,
            source=self.site.name,
            spec={},
            epoch=epoch,
            secret=secret,
            manifest="",
            options=job.options,
        )
        self._session, _ = connect(self.site, job.peer, offer, accept, network)
        self._control = Control(self._session, job.peer, self._check)
        self._control.wait_connected(CONNECT_S)
        self._control.compare_clocks()
        ready = self._control.wait(MemoryReady, 90)
        if ready.pictured:
            given_up = agreeing.at_source(base, picture_id(job.handoff), self._control)
            log.info("both workers before knew the same of the memory, but for %d pages", given_up)
        self._paused()
        proxy = SourceProxy(
            self.site.mirror(job.handoff),
            base if ready.pictured else None,
            level=LEVEL,
            clock=time.thread_time,
            broken=broken,
        )
        self._mark = self._qemu.qmp.mark()
        out = self._qemu.paths.out_sock
        urgent = UrgentPump(out, self._session)
        self._qemu.migrate_uri(f"unix:{out}", resume=True)
        self._pump = MemoryPump(urgent.stream(), proxy, self._session, self._window)
        self._pump.serve(RAM_ID, urgent)
        self._pump.first_pass_over()
        self._pump.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        self._token.settle(self._control, self._runs, self._hears)

    def _ask(self, request: Resumption) -> Accept:
        """Has the target's agent start its side. It may just be looking after the guest itself, for some seconds.

        Both agents look again after the same times, so one that is refused once would be refused for ever.
        """
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                return self.peer.resume(request)
            except Conflict as error:
                if time.monotonic() > deadline:
                    raise
                log.info("site %s: %s", self.job.peer, error)
            time.sleep(0.5)

    def _paused(self) -> None:
        """Waits until QEMU has seen that its old connection is gone."""
        deadline = time.monotonic() + PAUSE_S
        while (status := str(self._qemu.query_migrate().get("status", "none"))) != "postcopy-paused":
            if time.monotonic() > deadline or not status.startswith("postcopy"):
                raise GuestError(f"QEMU of guest {self.job.guest!r} cannot go on with its post-copy: it is {status}")
            self._qemu.pause_postcopy()
            time.sleep(0.1)

    def _check(self) -> None:
        if self.left_alone.is_set() and time.monotonic() - self._began < GRACE_S:
            # The target's agent was still speaking of the worker before, whose end both agents found at the same time.
            self.left_alone.clear()
        if self.left_alone.is_set():
            raise HandoffFailed(f"the worker at site {self.job.peer!r} is gone")
        pump = self._pump
        if pump is not None and pump.error is not None:
            raise GuestError(f"the memory of guest {self.job.guest!r} broke off again: {pump.error}") from pump.error
        if pump is not None and pump.ended.is_set():
            served.check_whole(self._qemu, self._mark)

    def _window(self) -> Window:
        assert self._session is not None
        return serving_window(self._rate or 10e6, self._session.rtt_s())

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            with contextlib.suppress(HaulierError):
                assert self._session is not None and self._pump is not None
                status = self.progress.status
                status.wire_bytes = sum(self._session.wire_bytes())
                status.rate_bps = self._rate = self._rates.add(time.monotonic(), self._session.rate_bps())
                status.rtt_s = self._session.rtt_s()
                served.observe(self._qemu, self.progress, self._pump)
                self.progress.write()

    def _runs(self, at: float) -> None:
        self._marks.setdefault("running", at)

    def _hears(self, message: AnyMessage) -> None:
        if isinstance(message, Filled):
            self._filled = message
        elif isinstance(message, Failed):
            log.warning("site %s: %s", self.job.peer, message.text)

    def _finish(self) -> None:
        assert self._pump is not None and self._session is not None
        done = self._marks["whole"] = time.time()
        with contextlib.suppress(HaulierError):
            self._control.send(Finish(""))
        marks = self._marks
        running = marks.get("running", done)
        sent, received = self._session.wire_bytes()
        self.report = {
            "handoff": self.job.handoff,
            "guest": self.job.guest,
            "source": self.site.name,
            "target": self.job.peer,
            "epoch": self._token.epoch,
            "outcome": "done",
            "total_s": round(running - marks.get("begin", self._row.created), 4),
            "until_released_s": round(done - marks.get("begin", self._row.created), 4),
            "downtime_ms": round((running - marks.get("stop", running)) * 1000, 1),
            "wire": {"sent": sent, "received": received, "transport": self._session.transport()},
            "post_copy": served.figures(self._pump, self._filled, marks) | {"resumed": True},
        }
        retire(self.site, self.job.guest, self.job.handoff)
        clients.gone(self.site, self.job.guest)
        self.journal.advance(self.job.guest, "away", "away", manifest="")


class ResumeTarget(VmTarget):
    """The target's side: the guest runs here, its memory is not whole, and its QEMU listens again."""

    def __init__(self, site: Site, journal: Journal, job: Job, cancelled: threading.Event) -> None:
        super().__init__(site, journal, job, cancelled)
        self._ended = threading.Event()

    def _ready(self, session: Session) -> None:
        self._voted = self._goes_first = self._running = self._filling = True
        self._qemu = Qemu.adopt(self.paths, worker=True)
        self._qemu.patience_s = PATIENCE_S
        self._listen_again()
        mirror = self.site.mirror(self.job.handoff)
        self._base = served.picture_of(mirror) if self.job.memory_base else None
        self._give_to_qemu(self._proxy_on(self._base), urgent=True)
        self.control.send(MemoryReady(pictured=self._base is not None))

    def _listen_again(self) -> None:
        try:
            why = rescue.recover(self.paths.rescue_ctl, f"unix:{self.paths.mig_sock}")
        except (OSError, ValueError) as error:
            why = f"nobody holds a connection to it: {error}"
        if why is not None:
            raise GuestError(f"QEMU of guest {self.spec.name!r} does not listen for the rest of its memory ({why})")

    def _await_loaded(self) -> None:
        """Asks, for QEMU may not answer before some pages have come: its events are missed until then."""
        assert self._qemu is not None
        while self._qemu.alive() and not self._ended.wait(0.3):
            with contextlib.suppress(GuestError):
                if self._qemu.query_migrate().get("status") == "completed":
                    self._loaded_at = time.time()
                    self.control.tell("loaded")
                    return
        if not self._ended.is_set():
            self.control.tell(GuestError(memory_lost(self.spec.name)))

    def _close(self, session: Session) -> None:
        self._ended.set()
        super()._close(session)
