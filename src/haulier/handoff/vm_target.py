"""The target's side of a virtual machine's handoff: QEMU with its disk's export, the memory it takes, and the vote.

Where the guest goes before its memory, the rest of it comes while the guest runs ("filling").
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.disks.export import DiskExport
from haulier.errors import Corrupt, GuestError
from haulier.guests import rescue
from haulier.guests.command import RAM_ID
from haulier.guests.qemu import Qemu, create_overlay
from haulier.guests.tap import create_tap, tap_name
from haulier.handoff import retained
from haulier.handoff.check import memory_digests
from haulier.handoff.custody import happen
from haulier.handoff.journal import Journal
from haulier.handoff.measures import POST_COPY
from haulier.handoff.memory_link import MemorySink
from haulier.handoff.messages import (
    Arrived,
    Channel,
    Filled,
    Finish,
    Job,
    MemoryReady,
    Poised,
    PrepareMemory,
    Running,
)
from haulier.handoff.ownership import Event, State
from haulier.handoff.residence import end_copy, incoming_name, memory_lost, run_copy
from haulier.handoff.target import TargetHandoff
from haulier.memory.loading import GuestRam
from haulier.memory.target_proxy import TargetProxy
from haulier.session import Session
from haulier.without import DIRECT, without

log = logging.getLogger(__name__)
ALONE_S = 10.0
"""How long device state may take that a source which is gone has sent before."""


class VmTarget(TargetHandoff):
    """One handoff of a virtual machine at its target."""

    def __init__(
        self,
        site: Site,
        journal: Journal,
        job: Job,
        cancelled: threading.Event,
        waiting: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """`waiting`: a disk export that has started already and waits."""
        super().__init__(site, journal, job, cancelled)
        self._waiting = waiting
        self._qemu: Qemu | None = None
        self._sink: MemorySink | None = None
        self._export: DiskExport | None = None
        self._goes_first = False
        self._device_at = 0.0

    # -- prepared --------------------------------------------------------------------------------------------------

    def _prepare_early(self, session: Session, manifest: Manifest) -> None:
        self.paths.prepare()
        with ThreadPoolExecutor(2, thread_name_prefix="prepare") as pool:
            proxy = pool.submit(self._make_proxy, self.job.memory_base)
            qemu = pool.submit(self._start_qemu, self.job.manifest)
            self._start_receiver(manifest)
            session.on(Channel.DISK, self._disk)
        qemu.result()
        self._swap_export(incoming_name(self.job.handoff))
        self._receive_memory(proxy.result())

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

    def _committed(self, manifest: Manifest, final: bool) -> None:
        self._swap_export(incoming_name(self.job.handoff))
        super()._committed(manifest, final)

    # -- memory ----------------------------------------------------------------------------------------------------

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

    # -- the vote --------------------------------------------------------------------------------------------------

    def _maybe_arrived(self) -> None:
        """Votes once memory is loaded (unless it is to follow the guest) and the final manifest is durable here."""
        if self._voted:
            self._maybe_filled()
            return
        if self._receiver is None or not self._receiver.final:
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

    def _go_first(self) -> None:
        self._goes_first = True
        self._maybe_arrived()

    def _poise(self) -> None:
        """Votes with the disk alone: the token, and device state behind it, may come."""
        assert self._receiver is not None
        self._voted = True
        happened = happen(self.journal, self.spec.name, Event.POISE, decided=True, handoff=self.job.handoff)
        self.control.send(Poised(happened.after.pending, self._receiver.manifest.digest, self._durable_at))
        self._send(happened)
        self.progress.phase("ready")

    # -- it runs ---------------------------------------------------------------------------------------------------

    def _copy_alive(self) -> bool:
        return self._qemu is not None and self._qemu.alive()

    def _run(self, after: State) -> bool:
        assert self._qemu is not None
        self._filling = after is State.FILLING
        if self._filling and not self._device_state():
            self._lost()
            return False
        at = run_copy(self.site, self._qemu)
        self._running = True
        self.outcome = "done"
        self.control.send(Running(at))
        return True

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

    def _disk_is(self, name: str) -> None:
        with self._lock:
            if self._export is not None:
                if self._heat:
                    self._export.warm(self._heat)
                self._export.swap(name)

    def _finish(self, news: Finish) -> None:
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
        if not self._filling:
            super()._fail(error)
        elif self._copy_alive():
            self.outcome = "undecided"
        else:
            self._lost()

    def _discard(self) -> None:
        if self._sink is not None:
            self._sink.close()
        if self._qemu is not None:
            self._qemu.close()
        super()._discard()

    def _close(self, session: Session) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink.proxy.close()
        super()._close(session)
        if self._qemu is not None:
            self._qemu.close()
        if self._waiting is not None:
            self._waiting.communicate()
