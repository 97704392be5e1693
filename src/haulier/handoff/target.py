"""The target's side of a handoff: collects a copy that stays stopped, votes, and runs it on the token only."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from haulier import priority
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest, chunks_of
from haulier.chunks.store import ChunkStore
from haulier.disks.heat import unpack
from haulier.disks.transfer import DiskReceiver
from haulier.errors import Corrupt, HandoffFailed, HaulierError, PeerError
from haulier.guests.model import GuestSpec
from haulier.guests.tap import BRIDGE
from haulier.handoff import attempts, clients, readdressing, retained
from haulier.handoff.agreeing import TargetComparison
from haulier.handoff.control import Control, failure
from haulier.handoff.custody import Happened, happen
from haulier.handoff.elsewhere import Elsewhere
from haulier.handoff.footprint import footprint
from haulier.handoff.journal import Journal
from haulier.handoff.messages import (
    Base,
    BaseReady,
    Channel,
    Compare,
    Finish,
    GiveUp,
    GoFirst,
    Heat,
    Job,
    Own,
    PrepareMemory,
    Status,
    Stretch,
    Stretched,
)
from haulier.handoff.ownership import Action, Event, State
from haulier.handoff.progress import Progress
from haulier.handoff.residence import (
    copy_manifest,
    discard_copy,
    guest_paths,
    incoming_name,
    lease_of,
    manifest_name,
    spec_of,
)
from haulier.handoff.shared import block_space, golden_manifest, grown, images_named
from haulier.memory.base import MemoryBase
from haulier.memory.target_proxy import TargetProxy
from haulier.network import tunnel
from haulier.session import Session, TlsConfig
from haulier.units import MIB

log = logging.getLogger(__name__)
CONNECT_S = 60.0
OTHER_MEMORY = 256 * MIB
"""Firmware, video memory and what devices bring along, beside a guest's RAM."""


class Undecided(HandoffFailed):
    """The copy is ready, and the source cannot be heard: the agents settle it between them."""


class TargetHandoff(ABC):
    """One handoff at its target, of a guest of any kind. `run` returns the outcome: "done", "failed" or "undecided"."""

    _begins_on_offer = False
    """The session may begin on the connection over which the offer came."""

    def __init__(self, site: Site, journal: Journal, job: Job, cancelled: threading.Event) -> None:
        assert job.offer is not None
        self.site, self.journal, self.job, self.offer = site, journal, job, job.offer
        self.spec = self._spec()
        self.paths = guest_paths(site, job.guest)
        self.directory: Path = site.handoff_root(job.handoff)
        self.progress = Progress(
            self.directory,
            Status(handoff=job.handoff, role="target", guest=job.guest, source=job.peer, target=site.name),
        )
        self.outcome = "failed"
        self._cancelled = cancelled
        self._receiver: DiskReceiver | None = None
        self._store = ChunkStore(site.store)
        self._base: MemoryBase | None = None
        self._comparison: TargetComparison | None = None
        self._wrong = False
        self._footprint: dict[str, int] = {}
        self._loaded_at = 0.0
        self._durable_at = 0.0
        self._voted = False
        self._running = False
        self._filling = False
        """It does, and its memory is not whole."""
        self._taken = False
        """The token is durable here: the guest is this site's ..."""
        self._settled = False
        """... and its disk has its lasting name."""
        self._tunnels: set[str] = set()
        """Ends that this handoff has made here."""
        self._readdressed: Future[dict[str, Any]] | None = None
        self._lock = threading.Lock()
        self._partial = self.offer.options.disk == "on-demand"
        self._heat = b""
        self._elsewhere = Elsewhere(site, job.peer, self._store, lease_of(job.handoff))
        self.left_alone = threading.Event()
        """The other site's worker is gone, by the word of its agent: set from outside."""

    def _spec(self) -> GuestSpec:
        return spec_of(self.journal.guest(self.job.guest))

    # -- the whole of it -------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Works until the guest runs here for good, or the copy is thrown away."""
        site, mptcp = self.site, self.offer.options.transport == "mptcp"
        session = Session.listen(
            TlsConfig(site.certificate, site.key, site.ca_certificate, self.job.peer),
            bytes.fromhex(self.offer.secret),
            bind=site.listening(),
            mptcp=mptcp,
            handed_at=site.offer_socket(self.job.handoff) if self._begins_on_offer and not mptcp else None,
        )
        self.control = Control(session, self.job.peer, self._check)
        try:
            # At once, so that the source's way here and what is to be prepared here take the same time. Messages that
            # come before their channel is listened to wait in the session.
            self.progress.status.port = session.port
            self.progress.phase("connect")
            self._ready(session)
            self.control.wait_connected(CONNECT_S)
            self.progress.phase("post-copy" if self._filling else "receive")
            self._work(session)
        except Undecided as error:
            log.warning("%s", error)
            self.outcome = "undecided"
        except Exception as error:
            log.exception("handoff %s", self.job.handoff)
            self._fail(error)
        finally:
            self._close(session)
        return self.outcome

    def _ready(self, session: Session) -> None:
        """Listens; what can be made before the source is here is made."""
        self._store.add_lease(lease_of(self.job.handoff))
        session.on(Channel.PROBE, lambda data: None)
        if self.job.manifest:
            self._prepare_early(session, grown(self._store.load_manifest(self.job.manifest), self.spec.disk_size))
        else:
            session.on(Channel.DISK, self._disk)

    def _work(self, session: Session) -> None:
        quiet_since = 0.0
        while True:
            self._observe(session)
            try:
                news = self.control.next(0.1)
            except PeerError as error:
                if self._filling:
                    raise Undecided(
                        f"the rest of memory does not come ({error}): the agents start new workers"
                    ) from error
                if self._running:
                    return  # the guest runs here; the source will learn it from the agent
                if self._voted:
                    raise Undecided(f"the source cannot be heard ({error}): the agents settle it") from error
                raise
            if isinstance(news, Exception):
                raise news
            if isinstance(news, str):
                self._maybe_arrived()
            elif isinstance(news, Base):
                self._adopt_base(news)
            elif isinstance(news, Heat):
                self._heat = unpack(news.counts, chunks_of(self.spec.disk_size))
            elif isinstance(news, PrepareMemory):
                retained.check_named(news.memory_base, (self.job.memory_base,), self.job.peer)
                self._prepare_memory(news)
            elif isinstance(news, Compare):
                self.control.send(self._compare_with().compare(news))
            elif isinstance(news, GiveUp):
                self.control.send(self._compare_with().give_up(news))
            elif isinstance(news, GoFirst):
                self._go_first()
            elif isinstance(news, Stretch):
                self.control.send(self._stretch(news))
            elif isinstance(news, Own):
                if self._owned(news):
                    return
            elif isinstance(news, Finish):
                self._finish(news)
                return
            elif news is not None:
                raise HandoffFailed(f"site {self.job.peer!r}: {getattr(news, 'text', news)}")
            if self._running and not self._filling:
                # The source may be gone for good: what it still has to say is only useful, not needed.
                quiet_since = quiet_since or time.monotonic()
                if self.left_alone.is_set() or time.monotonic() - quiet_since > 60:
                    return

    # -- what kinds of guests do each in their way ------------------------------------------------------------------

    @abstractmethod
    def _prepare_early(self, session: Session, manifest: Manifest) -> None:
        """All that can be made here without a word of the source, because the base's manifest is here."""

    @abstractmethod
    def _prepare_memory(self, news: PrepareMemory) -> None:
        """Makes what takes memory, and says so. Corrupt when it is not the time for it."""

    @abstractmethod
    def _maybe_arrived(self) -> None:
        """Votes once all of the copy is here; called whenever something has come."""

    def _go_first(self) -> None:
        """The guest is to run here before its memory."""
        raise Corrupt(f"site {self.job.peer!r} sends this kind of guest before its memory: run the same haulier there")

    @abstractmethod
    def _copy_alive(self) -> bool:
        """Whether there is anything that the token could have run."""

    @abstractmethod
    def _run(self, after: State) -> bool:
        """Runs the copy, now that the guest is this site's, and says since when; False if it is lost."""

    @abstractmethod
    def _finish(self, news: Finish) -> None:
        """Keeps what the way back starts from."""

    def _has_mirror(self) -> bool:
        """Whether pages have come already."""
        return False

    # -- all of them -----------------------------------------------------------------------------------------------

    def _stretch(self, news: Stretch) -> Stretched:
        if not news.ahead:
            self._tunnels.add("away")
            return Stretched(clients.receive(self.site, self.spec, self.job.peer, news))
        self._tunnels.add("home")
        error = readdressing.receive_ahead(self.site, self.spec.name, self.spec.mac, self.job.peer, news)
        return Stretched(error, tunnel.mac_of(BRIDGE))

    def _check(self) -> None:
        if self._cancelled.is_set() and not self._running:
            self._cancelled.clear()
            raise HandoffFailed("the target's operator or agent stopped the handoff")
        if self.left_alone.is_set() and not self._running:
            text = f"the worker at site {self.job.peer!r} is gone"
            raise Undecided(f"{text}: the agents settle it") if self._voted else HandoffFailed(text)
        if self.left_alone.is_set() and self._filling:
            raise Undecided(f"the worker at site {self.job.peer!r} is gone: the agents start new ones")

    def _observe(self, session: Session) -> None:
        sent, received = session.wire_bytes()
        status = self.progress.status
        status.wire_bytes = received + sent
        status.rate_bps = session.rate_bps()
        status.rtt_s = session.rtt_s()
        self.progress.write()

    # -- disk ------------------------------------------------------------------------------------------------------

    def _adopt_base(self, news: Base) -> None:
        manifest = Manifest.decode(news.manifest)
        if manifest.digest != bytes.fromhex(self.offer.manifest) or manifest.size != self.spec.disk_size:
            raise Corrupt(f"the manifest that site {self.job.peer!r} sent is not the one it offered: try again")
        if self._receiver is None:
            self._start_receiver(manifest)
        self.control.send(BaseReady())

    def _start_receiver(self, manifest: Manifest) -> None:
        golden = golden_manifest(self._store, self.spec.golden) if self.job.golden else None
        space = block_space(self._store, manifest, golden, images_named(self._store, self.job.images))
        name = incoming_name(self.job.handoff)
        self._space = space
        meta = {"residual": {"source": self.job.peer, "handoff": self.job.handoff}} if self._partial else None
        # Before the first message: from then on only commits write it.
        self._store.save_manifest(name, manifest, meta, partial=True)
        self._receiver = DiskReceiver(
            self._store,
            manifest,
            space,
            lambda data: self.control.session.send(Channel.DISK, data, urgent=True),
            lease_of(self.job.handoff),
            manifest_name=name,
            on_commit=self._committed,
            on_lacking=None if self._partial else self._fetch_elsewhere,
            partial=self._partial,
            meta=meta,
        )

    def _fetch_elsewhere(self, lacking: list[bytes]) -> None:
        assert self._receiver is not None
        self._elsewhere.fetch(lacking, self._receiver.came)

    def _disk(self, data: bytes) -> None:
        try:
            if self._receiver is None:
                raise Corrupt("disk messages came before their manifest: run the same haulier at both sites")
            self._receiver.handle(data)
        except Exception as error:
            self.control.tell(error)

    def _committed(self, manifest: Manifest, final: bool) -> None:
        self._elsewhere.enough()
        if final:
            self._durable_at = time.time()
        self.control.tell("committed")

    # -- memory ----------------------------------------------------------------------------------------------------

    def _make_proxy(self, picture: str) -> TargetProxy:
        spec = self.spec
        base = self._base = retained.open_base(self.site, spec.name, spec.uuid, picture)
        self.progress.status.memory_base = picture
        proxy = self._proxy_on(base)
        # Of a picture that an attempt left, the sites have yet to agree on what it holds.
        if not attempts.is_attempt(picture):
            proxy.prepare()
        return proxy

    def _proxy_on(self, base: MemoryBase | None) -> TargetProxy:
        most = self.spec.memory_bytes + OTHER_MEMORY
        return TargetProxy(self.site.mirror(self.job.handoff), base, max_memory=most)

    def _compare_with(self) -> TargetComparison:
        if self._comparison is None:
            if self._base is None or self._has_mirror():
                raise Corrupt("the source's messages came in a wrong order: run the same haulier at both sites")
            self._comparison = TargetComparison(self._base)
        return self._comparison

    # -- ownership -------------------------------------------------------------------------------------------------

    def _send(self, happened: Happened) -> None:
        for event, epoch in happened.messages():
            self.control.own(event, epoch)

    def _owned(self, news: Own) -> bool:
        """Acts on a message of the ownership table; True when there is nothing left to do here."""
        if news.event == Event.TOKEN and self._voted and not self._taken and not self._copy_alive():
            # The vote is taken back: whoever wrote down that it owns a guest which is not there has lost it for both.
            lost = happen(self.journal, self.spec.name, Event.COPY_LOST, handoff=self.job.handoff)
            if Action.DISCARD_COPY in lost.actions:
                self._discard()
                self._send(lost)
                return True
        happened = happen(
            self.journal,
            self.spec.name,
            Event(news.event),
            news.epoch,
            handoff=self.job.handoff,
            changes={"owner": self.site.name, "wanted": "running"} if news.event == Event.TOKEN else None,
        )
        for action in happened.actions:
            if action is Action.RUN_COPY:
                self._taken = True
                clients.coming(self.site, self.spec.name)
                if not self._run(happened.after.state):
                    return True
            elif action is Action.DISCARD_COPY:
                self._discard()
                return True
        self._send(happened)
        if Action.RUN_COPY in happened.actions:
            self._settle()
            self._maybe_arrived()
        return False

    def _settle(self) -> None:
        """All that need not be done before the guest runs, most urgent first."""
        self._moved()
        self.progress.phase("post-copy" if self._filling else "running")
        if not self._filling:
            priority.behind()
        self._footprint = footprint(self.site.mirror(self.job.handoff))
        # The guest's manifest gets its lasting name only now; until here the incoming one pinned the chunks.
        name = manifest_name(self.spec.name)
        assert self._receiver is not None
        copy_manifest(self._store, incoming_name(self.job.handoff), name)
        state = self.journal.guest(self.spec.name).state
        self.journal.advance(self.spec.name, state, state, manifest=name)
        self._disk_is(name)
        self._store.drop_manifest(incoming_name(self.job.handoff))
        self._store.drop_lease(lease_of(self.job.handoff))
        self._settled = True

    def _disk_is(self, name: str) -> None:  # noqa: B027 - only some have their disk from an export
        """The manifest of the guest's disk is called that from now on."""

    def _moved(self) -> None:
        """The guest runs here: has its clients' network follow."""
        if self.spec.net == "mptcp":
            # Beside the rest: the guest takes half a second for what it is asked, and clients have their tunnel.
            pool = ThreadPoolExecutor(1, thread_name_prefix="readdress")
            self._readdressed = pool.submit(
                readdressing.settle, self.site, self.journal, self.spec.name, after_s=readdressing.PATIENCE_S
            )
            pool.shutdown(wait=False)
        clients.arrived(self.site, self.journal, self.spec, self.job.peer)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        if self._taken and not self._settled:
            # The guest is this site's: the agent has it run, and gives its disk the lasting name.
            log.error("handoff %s is not settled here yet: %s", self.job.handoff, error)
            self.outcome = "undecided"
            return
        if self._running:
            return
        with contextlib.suppress(HaulierError):
            self.control.send(failure(error))
        happened = happen(self.journal, self.spec.name, Event.FAIL, handoff=self.job.handoff)
        if Action.DISCARD_COPY in happened.actions:
            self._discard()
            with contextlib.suppress(HaulierError):
                self._send(happened)
        self._wrong = isinstance(error, Corrupt)
        if self._wrong:
            # Whatever did not match may be the picture that the mirror started from.
            retained.forget(self.site, self.spec.name)
        self._note(str(error))
        if self._wrong:
            retained.suspect(self.site, self._store, self.job.memory_base)

    def _note(self, error: str) -> None:
        detail = self.journal.handoff(self.job.handoff).detail
        self.journal.update_handoff(self.job.handoff, detail={**detail, "error": error})

    def _discard(self) -> None:
        self.outcome = "failed"
        discard_copy(self.site, self.spec.name, self.job.handoff)
        if self._tunnels:
            clients.records(self.site).close(self.spec.name, *self._tunnels)

    def _close(self, session: Session) -> None:
        self._elsewhere.close()
        self._keep_attempt(self.outcome == "failed", "cut")
        session.close(linger_s=3)
        if self._readdressed is not None and (error := self._readdressed.exception()) is not None:
            log.warning("clients of guest %s go by a tunnel until the agent has tried again: %s", self.spec.name, error)
        self._store.close()
        self.progress.finish()
        self.progress.write(force=True)

    def _keep_attempt(self, worth_it: bool, kind: str) -> None:
        """The next attempt starts from what came here, unless it was wrong."""
        if worth_it and not self._wrong:
            attempts.keep_of(self.site, self.job, self.spec, self._base, kind)
        elif self.outcome != "undecided" or not self._filling:
            # Otherwise whoever goes on with the post-copy starts from it.
            self.site.mirror(self.job.handoff).unlink(missing_ok=True)

    def report(self) -> dict[str, Any]:
        return {
            "handoff": self.job.handoff,
            "role": "target",
            "outcome": self.outcome,
            "phases": self.progress.phases,
            "footprint": self._footprint,
            "clients": self._followed(),
        }

    def _followed(self) -> dict[str, Any]:
        """What came of clients' connections, where they move with the guest."""
        done = self._readdressed
        return done.result() if done is not None and done.done() and done.exception() is None else {}
