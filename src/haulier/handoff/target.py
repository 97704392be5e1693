"""The target's side of a handoff: collects a copy that stays stopped, votes, and runs it on the token only."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from haulier import priority
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest, chunks_of
from haulier.chunks.store import ChunkStore
from haulier.disks.export import DiskExport
from haulier.disks.heat import unpack
from haulier.disks.transfer import DiskReceiver
from haulier.errors import Corrupt, GuestError, HandoffFailed, HaulierError, PeerError
from haulier.guests import rescue
from haulier.guests.command import RAM_ID
from haulier.guests.model import GuestSpec
from haulier.guests.qemu import Qemu, create_overlay
from haulier.guests.tap import BRIDGE, create_tap, tap_name
from haulier.handoff import attempts, clients, readdressing, retained
from haulier.handoff.agreeing import TargetComparison
from haulier.handoff.check import memory_digests
from haulier.handoff.control import Control, failure
from haulier.handoff.custody import Happened, happen
from haulier.handoff.elsewhere import Elsewhere
from haulier.handoff.footprint import footprint
from haulier.handoff.journal import Journal
from haulier.handoff.measures import POST_COPY
from haulier.handoff.memory_link import MemorySink
from haulier.handoff.messages import (
    Arrived,
    Base,
    BaseReady,
    Channel,
    Compare,
    Filled,
    Finish,
    GiveUp,
    GoFirst,
    Heat,
    Job,
    MemoryReady,
    Own,
    Poised,
    PrepareMemory,
    Running,
    Status,
    Stretch,
    Stretched,
)
from haulier.handoff.ownership import Action, Event, State
from haulier.handoff.progress import Progress
from haulier.handoff.residence import (
    copy_manifest,
    discard_copy,
    end_copy,
    guest_paths,
    incoming_name,
    lease_of,
    manifest_name,
    memory_lost,
    run_copy,
    spec_of,
)
from haulier.handoff.shared import block_space, golden_manifest, grown, images_named
from haulier.memory.base import MemoryBase
from haulier.memory.loading import GuestRam
from haulier.memory.target_proxy import TargetProxy
from haulier.network import tunnel
from haulier.session import Session, TlsConfig
from haulier.units import MIB
from haulier.without import DIRECT, without

log = logging.getLogger(__name__)
CONNECT_S = 60.0
ALONE_S = 10.0
"""How long device state may take that a source which is gone has sent before."""
OTHER_MEMORY = 256 * MIB
"""Firmware, video memory and what devices bring along, beside a guest's RAM."""


class Undecided(HandoffFailed):
    """The copy is ready, and the source cannot be heard: the agents settle it between them."""


class TargetHandoff:
    """One handoff at its target. `run` returns the outcome: "done", "failed" or "undecided"."""

    _begins_on_offer = False
    """The session may begin on the connection over which the offer came."""

    def __init__(
        self,
        site: Site,
        journal: Journal,
        job: Job,
        cancelled: threading.Event,
        waiting: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """`waiting`: a disk export that has started already and waits."""
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
        self._qemu: Qemu | None = None
        self._sink: MemorySink | None = None
        self._export: DiskExport | None = None
        self._waiting = waiting
        self._receiver: DiskReceiver | None = None
        self._store = ChunkStore(site.store)
        self._base: MemoryBase | None = None
        self._comparison: TargetComparison | None = None
        self._wrong = False
        self._footprint: dict[str, int] = {}
        self._loaded_at = 0.0
        self._durable_at = 0.0
        self._voted = False
        self._goes_first = False
        self._filling = False
        """The guest runs, and its memory is not whole."""
        self._device_at = 0.0
        self._running = False
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

    def _prepare_early(self, session: Session, manifest: Manifest) -> None:
        """All that can be made here without a word of the source, because the base's manifest is here."""
        self.paths.prepare()
        with ThreadPoolExecutor(2, thread_name_prefix="prepare") as pool:
            proxy = pool.submit(self._make_proxy, self.job.memory_base)
            qemu = pool.submit(self._start_qemu, self.job.manifest)
            self._start_receiver(manifest)
            session.on(Channel.DISK, self._disk)
        qemu.result()
        self._swap_export(incoming_name(self.job.handoff))
        self._receive_memory(proxy.result())

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
                self._maybe_filled()
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
                self._goes_first = True
                self._maybe_arrived()
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
        self._swap_export(incoming_name(self.job.handoff))
        if final:
            self._durable_at = time.time()
        self.control.tell("committed")

    # -- memory ----------------------------------------------------------------------------------------------------

    def _start_export(self, manifest: str) -> None:
        paths = self.paths
        waiting, self._waiting = self._waiting, None
        export = DiskExport.start(
            self.site.store, manifest, paths.nbd_sock, paths.nbd_ctl, paths.nbd_log, waiting=waiting
        )
        with self._lock:
            self._export = export

    def _swap_export(self, manifest: str) -> None:
        with self._lock:
            if self._export is not None:
                self._export.swap(manifest)

    def _prepare_memory(self, news: PrepareMemory) -> None:
        if self._receiver is None or self._qemu is not None:
            raise Corrupt("the source's messages came in a wrong order: run the same haulier at both sites")
        self.paths.prepare()
        self._start_qemu(incoming_name(self.job.handoff))
        self._receive_memory(self._make_proxy(news.memory_base))

    def _start_qemu(self, manifest: str) -> None:
        """The guest's copy: stopped, with its disk's export, and waiting for memory."""
        spec, paths = self.spec, self.paths
        self._start_export(manifest)
        create_overlay(paths.overlay, spec.disk_size)
        tap = None
        if spec.address:
            tap = tap_name(spec.name)
            create_tap(tap)
        early = POST_COPY in self.offer.options.allow
        qemu = self._qemu = Qemu.start(spec, paths, incoming=True, nic=tap, worker=True, rescue=early)
        if early:
            self._rescue = rescue.start(paths.rescue_sock, paths.rescue_ctl)
        self._mark = qemu.qmp.mark()
        qemu.set_capabilities(
            events=True,
            late_block_activate=True,
            pause_before_switchover=True,
            return_path=True,
            postcopy_ram=early,
            postcopy_preempt=early,
        )
        qemu.prepare_incoming(f"unix:{paths.mig_sock}")

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

    def _receive_memory(self, proxy: TargetProxy) -> None:
        proxy.reader = self._space
        early = POST_COPY in self.offer.options.allow
        if not early and not without(DIRECT):
            proxy.ram = GuestRam(self.paths.ram, RAM_ID)
        self._give_to_qemu(proxy, urgent=early)
        self.control.send(MemoryReady())

    def _give_to_qemu(self, proxy: TargetProxy, *, urgent: bool) -> None:
        """From here on what comes for QEMU goes there; `urgent`: by a second connection what a running guest awaits."""
        connect = self._to_qemu if urgent else None
        self._sink = MemorySink(self._to_qemu(), proxy, self.control.session, self.control.tell, connect)
        threading.Thread(target=self._await_loaded, name="await-loaded", daemon=True).start()

    def _to_qemu(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.connect(str(self.paths.mig_sock))
        return stream

    def _has_mirror(self) -> bool:
        return self._sink is not None and self._sink.proxy.mirror is not None

    def _compare_with(self) -> TargetComparison:
        if self._comparison is None:
            if self._base is None or self._has_mirror():
                raise Corrupt("the source's messages came in a wrong order: run the same haulier at both sites")
            self._comparison = TargetComparison(self._base)
        return self._comparison

    def _await_loaded(self) -> None:
        assert self._qemu is not None
        try:
            self._qemu.wait_migration({"completed"}, timeout=1e7, since=self._mark)
        except GuestError as error:
            if not self._voted or self._filling:
                self.control.tell(error)
            return
        self._loaded_at = time.time()
        self.control.tell("loaded")

    def _maybe_arrived(self) -> None:
        """Votes once memory is loaded (unless it is to follow the guest) and the final manifest is durable here."""
        if self._voted or self._receiver is None or not self._receiver.final:
            return
        if self._goes_first:
            self._poise()
            return
        if not self._loaded_at:
            return
        assert self._qemu is not None and self._sink is not None
        if self._qemu.status() != "paused":
            self._qemu.wait_status({"paused"}, 10)
        # What the digests below are of is what the guest will have, whatever else the source sends.
        self._sink.seal()
        memory, check_s = b"", 0.0
        if self.offer.options.check:
            began = time.monotonic()
            memory = memory_digests(self.paths.ram)
            check_s = time.monotonic() - began
        proxy = self._sink.proxy
        self._voted = True
        happened = happen(self.journal, self.spec.name, Event.COMPLETE, decided=True, handoff=self.job.handoff)
        self.control.send(
            Arrived(
                happened.after.pending,
                proxy.raw_bytes,
                proxy.digest(),
                self._receiver.manifest.digest,
                memory,
                check_s,
                self._durable_at,
                self._loaded_at,
            )
        )
        self._send(happened)
        self.progress.phase("ready")

    def _poise(self) -> None:
        """Votes with the disk alone: the token, and device state behind it, may come."""
        assert self._receiver is not None
        self._voted = True
        happened = happen(self.journal, self.spec.name, Event.POISE, decided=True, handoff=self.job.handoff)
        self.control.send(Poised(happened.after.pending, self._receiver.manifest.digest, self._durable_at))
        self._send(happened)
        self.progress.phase("ready")

    def _maybe_filled(self) -> None:
        """Says that nothing is needed of the source any more once all of the memory is here."""
        if not self._filling or not self._loaded_at or self._sink is None:
            return
        self._filling = False
        self.outcome = "done"
        proxy, waits = self._sink.proxy, self._sink.waits
        happened = happen(self.journal, self.spec.name, Event.FILLED, decided=True, handoff=self.job.handoff)
        self.control.send(
            Filled(
                proxy.raw_bytes,
                proxy.digest(),
                waits.requests,
                waits.worst_s * 1000,
                waits.mean_s * 1000,
                self._device_at,
            )
        )
        self._send(happened)
        self.progress.phase("running")

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
                self._filling = happened.after.state is State.FILLING
                if self._filling and not self._device_state():
                    self._lost()
                    return True
                self._run()
            elif action is Action.DISCARD_COPY:
                self._discard()
                return True
        self._send(happened)
        if Action.RUN_COPY in happened.actions:
            self._settle()
            self._maybe_filled()
        return False

    def _copy_alive(self) -> bool:
        return self._qemu is not None and self._qemu.alive()

    def _run(self) -> None:
        assert self._qemu is not None
        at = run_copy(self.site, self._qemu)
        self._running = True
        self.outcome = "done"
        self.control.send(Running(at))

    def _device_state(self) -> bool:
        """Waits until QEMU has the guest's device state; False if it, the link, or the source is gone before."""
        assert self._qemu is not None
        session, alone_since = self.control.session, 0.0
        while self._qemu.alive():
            with contextlib.suppress(GuestError):
                if self._qemu.status() == "paused":
                    self._device_at = time.time()
                    return True
            if session.error is not None or session.over or self.left_alone.is_set():
                alone_since = alone_since or time.monotonic()
                alone_s = time.monotonic() - alone_since
                if self._sink is not None and (session.error is not None or alone_s > ALONE_S / 2):
                    self._sink.close()  # then QEMU gives up as well
                if alone_s > ALONE_S:
                    return False
            time.sleep(0.003)
        return False

    def _lost(self) -> None:
        """QEMU is gone before memory was whole: what the guest had in it is lost, its disk is here and right."""
        self._filling, self._running = False, True
        log.error("%s", memory_lost(self.spec.name))
        self._note(memory_lost(self.spec.name))
        if self._receiver is not None:
            self._settle()
        happened = happen(self.journal, self.spec.name, Event.COPY_LOST, decided=True, handoff=self.job.handoff)
        end_copy(self.site, self.spec.name)
        self._send(happened)
        self.outcome = "failed"

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
        with self._lock:
            if self._export is not None:
                if self._heat:
                    self._export.warm(self._heat)
                self._export.swap(name)
        self._store.drop_manifest(incoming_name(self.job.handoff))
        self._store.drop_lease(lease_of(self.job.handoff))
        self._settled = True

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

    def _finish(self, news: Finish) -> None:
        """Keeps the mirror for the way back."""
        if self._sink is None or not news.memory_id:
            return
        proxy = self._sink.proxy
        self._sink.close()
        row = self.journal.guest(self.spec.name)
        meta = retained.Retained(id=news.memory_id, guest=self.spec.name, uuid=self.spec.uuid, epoch=row.epoch)
        if proxy.mirror is not None:
            retained.keep(self.site, meta, proxy.mirror)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _fail(self, error: BaseException) -> None:
        if self._filling:
            if self._qemu is None or not self._qemu.alive():
                self._lost()
            else:
                self.outcome = "undecided"
            return
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
        if self._sink is not None:
            self._sink.close()
        if self._qemu is not None:
            self._qemu.close()
        discard_copy(self.site, self.spec.name, self.job.handoff)
        if self._tunnels:
            clients.records(self.site).close(self.spec.name, *self._tunnels)

    def _close(self, session: Session) -> None:
        self._elsewhere.close()
        if self._sink is not None:
            self._sink.close()
            self._sink.proxy.close()
        self._keep_attempt(self.outcome == "failed", "cut")
        session.close(linger_s=3)
        if self._qemu is not None:
            self._qemu.close()
        if self._waiting is not None:
            self._waiting.communicate()
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
