"""Sending a guest's data ahead: all of a handoff but the switchover, without QEMU's migration and without a copy.

The source reads the guest's memory file, which its QEMU shares, and sends the pages that the target's picture lacks;
the disk goes as in a handoff. Both sites keep the picture (`attempts`), and the handoff that follows begins from it. So
a page that was torn by a write costs bytes and nothing else: the handoff's own stream decides. No site owns the guest
by a prefetch, no QEMU is started, and the guest is neither stopped nor slowed but for the reading.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

from haulier.chunks.manifest import Manifest
from haulier.errors import Cancelled, Corrupt, GuestError, HandoffFailed, HaulierError, Unsupported
from haulier.guests.command import RAM_ID
from haulier.guests.model import GuestSpec
from haulier.handoff import agreeing, attempts, retained
from haulier.handoff.adapting import level_at
from haulier.handoff.control import failure
from haulier.handoff.convergence import window
from haulier.handoff.custody import record_of
from haulier.handoff.memory_link import Carrier
from haulier.handoff.messages import Accept, Channel, Finish, MemoryReady, Own, PrepareMemory
from haulier.handoff.ownership import State
from haulier.handoff.residence import incoming_name, lease_of
from haulier.handoff.target import TargetHandoff
from haulier.handoff.vm_source import VmSource
from haulier.memory.ahead import AheadReader
from haulier.memory.proxy import AHEAD_PAGES, SourceProxy
from haulier.memory.target_proxy import TargetProxy
from haulier.session import Session

log = logging.getLogger(__name__)
DELIVERED_S = 120.0


class PrefetchSource(VmSource):
    """One prefetch at the guest's site. `run` returns the report; the guest runs on here whatever happens."""

    _streams = False
    _proxy: SourceProxy | None = None

    def run(self) -> dict[str, Any]:
        self._adopt()
        self._passes: list[dict[str, Any]] = []
        error: BaseException | None = None
        try:
            self._prefetch()
        except Cancelled as ended:
            # What is kept fresh ends like this: all that was sent is there, and serves.
            error = ended
            if not self.job.options.keep_fresh_s or not self._passes:
                raise
        except BaseException as ended:
            error = ended
            raise
        finally:
            self._end(error)
        return self.report

    def _prefetch(self) -> None:
        self._marks["begin"] = time.time()
        self._watching()
        self._preflight()
        if self.spec.container is not None:
            raise Unsupported(f"guest {self.job.guest!r} is a container, which cannot be prefetched: hand it over")
        offer = self._prepare(record_of(self.row).last + 1)
        accept = self.peer.prefetch(offer)
        self._connect(offer, accept)
        self._settle(accept)
        sender = self._make_sender(accept)
        self._first_disk(sender, None)
        self._begin_memory(accept)
        while True:
            self._pass()
            every = self.job.options.keep_fresh_s
            if not every:
                break
            self._wait(every)
            assert self._rounds is not None
            self._send_round(self._rounds.next())
        self._settle_memory()

    def _stretch(self, there: str) -> None:
        """The guest goes nowhere."""

    def _join_clients(self, there: str, address: str) -> None:
        """Nor do its clients."""

    def _begin_memory(self, accept: Accept) -> None:
        assert self._control is not None
        base = retained.open_base(self.site, self.spec.name, self.spec.uuid, accept.memory_base)
        if not accept.manifest:
            self._control.send(PrepareMemory(accept.memory_base))
        self.report["given_up_pages"] = agreeing.at_source(base, accept.memory_base, self._control)
        self._base, self.progress.status.memory_base = base, accept.memory_base
        self._control.wait(MemoryReady, 90)
        proxy = self._proxy = SourceProxy(
            self.site.mirror(self.job.handoff),
            base,
            self._finder,
            level=self.job.options.level or level_at(self.site, self._rate),
        )
        for batch in proxy.name({RAM_ID: self.paths.ram.stat().st_size}):
            self._carry(batch.data)

    def _pass(self) -> None:
        """Once through the guest's memory: what the target's picture does not have yet."""
        assert self._proxy is not None and self._proxy.mirror is not None
        self.progress.phase("memory", "sending memory ahead")
        began, wire = time.time(), self._proxy.counters.wire_bytes
        reader = AheadReader(self.paths.ram, RAM_ID)
        pages = 0
        try:
            reader.plan_all()
            left = reader.regions_left or 1
            while not reader.done:
                self._check()
                numbers, copies = reader.take(self._proxy.mirror, 4)
                pages += len(numbers)
                for at in range(0, len(numbers), AHEAD_PAGES):
                    for batch in self._proxy.ahead(
                        RAM_ID, numbers[at : at + AHEAD_PAGES], copies[at : at + AHEAD_PAGES]
                    ):
                        self._carry(batch.data)
                self._observe()
                share = 1 - reader.regions_left / left
                sent = self._proxy.counters.wire_bytes - wire
                self.progress.left(0, int(sent * (1 - share) / share) if share > 0.02 else self.spec.memory_bytes // 20)
        finally:
            reader.close()
        entry = {"pages": pages, "wire_bytes": self._proxy.counters.wire_bytes - wire}
        self._passes.append(entry | {"seconds": round(time.time() - began, 3), "at": began})
        self._settle_memory()
        self.progress.status.progress = 0.0

    def _carry(self, data: bytes) -> None:
        """One batch, no faster than the link takes them."""
        assert self._session is not None
        carrier: Carrier = self._session
        limit = window(self._rate or 10e6, self._session.rtt_s(), False, True).wire
        mirror = self._proxy.mirror if self._proxy is not None else None
        while carrier.unacked(Channel.MEMORY) >= limit and mirror is not None and mirror.pack():
            self._check()
        while not carrier.wait_below(limit, Channel.MEMORY, timeout=0.1):
            self._check()
        carrier.send(Channel.MEMORY, data)

    def _settle_memory(self) -> None:
        """Waits until all of it has arrived."""
        assert self._session is not None
        deadline = time.monotonic() + DELIVERED_S
        while not self._session.wait_below(1, Channel.MEMORY, timeout=0.1):
            self._check()
            if time.monotonic() > deadline:
                raise HandoffFailed(f"site {self.job.peer!r} does not take what is sent ahead: see its worker's log")

    def _wait(self, seconds: float) -> None:
        self.progress.phase("fresh", f"all is there; what changes is sent every {seconds:g} s")
        deadline = time.monotonic() + seconds
        assert self._control is not None
        while time.monotonic() < deadline:
            for message in self._control.poll():
                raise HandoffFailed(f"site {self.job.peer!r} said {type(message).__name__} in a prefetch")
            self._check()
            self._observe()
            self.progress.write()
            self._over.wait(min(0.2, max(0.0, deadline - time.monotonic())))

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"prefetch of {self.job.guest!r} ended; what was sent is kept for its handoff")
        if not self.qemu.alive():
            raise GuestError(f"guest {self.job.guest!r} has stopped: there is nothing to send ahead")

    def _end(self, error: BaseException | None) -> None:
        """Whatever the end: rounds and session go, pictures stay."""
        failed = error if error is not None and not isinstance(error, Cancelled) else None
        if self._rounds is not None:
            try:
                self._rounds.abort()
            except HaulierError as wrong:
                log.info("bitmaps of a prefetch: %s", wrong)
        if self._session is not None and self._control is not None:
            try:
                if failed is None and self._session.wait_below(1, Channel.MEMORY, timeout=5):
                    self._control.send(Finish(""))
                else:
                    self._control.send(failure(failed or HandoffFailed("the prefetch ended early")))
            except HaulierError as wrong:
                log.info("the other end of a prefetch: %s", wrong)
            sent, received = self._session.wire_bytes()
            self.report.update(self._sent_ahead(sent, received))
        if self._proxy is not None:
            self.report["memory"] = {
                "wire_bytes": self._proxy.counters.wire_bytes,
                "kinds": self._proxy.counters.as_dict(),
            }
            self._proxy.close()
        self._keep_attempt(failed, "prefetch")
        self._store.drop_lease(lease_of(self.job.handoff))
        self._close()

    def _sent_ahead(self, sent: int, received: int) -> dict[str, Any]:
        return {
            "handoff": self.job.handoff,
            "guest": self.spec.name,
            "source": self.site.name,
            "target": self.job.peer,
            "outcome": "done",
            "total_s": round(time.time() - self._marks["begin"], 3),
            "wire": {"sent": sent, "received": received},
            "rate_bps": self._rate,
            "memory_base": self.progress.status.memory_base,
            "passes": self._passes,
            "disk": {"rounds": self._disk_rounds},
        }


class PrefetchTarget(TargetHandoff):
    """One prefetch where the guest is to go: chunks go into the store, pages into a mirror."""

    _proxy: TargetProxy | None = None

    def _spec(self) -> GuestSpec:
        assert self.job.offer is not None
        return msgspec.convert(self.job.offer.spec, GuestSpec)

    def _prepare_early(self, session: Session, manifest: Manifest) -> None:
        self._start_receiver(manifest)
        session.on(Channel.DISK, self._disk)
        self._prepare_memory(PrepareMemory(self.job.memory_base))

    def _prepare_memory(self, news: PrepareMemory) -> None:
        if self._receiver is None or self._proxy is not None:
            raise Corrupt("the source's messages came in a wrong order: run the same haulier at both sites")
        self._proxy = self._make_proxy(news.memory_base)
        self._proxy.reader = self._space
        self.control.session.on(Channel.MEMORY, self._pages)
        self.control.send(MemoryReady())

    def _pages(self, data: bytes) -> None:
        assert self._proxy is not None
        try:
            self._proxy.feed(data)
            if self._proxy.mirror is not None:
                self._proxy.mirror.pack()
        except Exception as error:
            self.control.tell(error)

    def _has_mirror(self) -> bool:
        return self._proxy is not None and self._proxy.mirror is not None

    def _committed(self, manifest: Manifest, final: bool) -> None:
        self._elsewhere.enough()

    def _owned(self, news: Own) -> bool:
        raise Corrupt(f"site {self.job.peer!r} speaks of owning the guest in a prefetch: run the same haulier there")

    def _maybe_arrived(self) -> None:
        """There is no copy to vote for ..."""

    def _copy_alive(self) -> bool:
        return False

    def _run(self, after: State) -> bool:
        """... or to run."""
        return False

    def _finish(self, news: Finish) -> None:
        self.outcome = "done"

    def _fail(self, error: BaseException) -> None:
        self._wrong = isinstance(error, Corrupt)
        if self._wrong:
            retained.forget(self.site, self.spec.name)
        try:
            self.control.send(failure(error))
        except HaulierError as wrong:
            log.info("the other end of a prefetch: %s", wrong)
        self.journal.update_handoff(self.job.handoff, detail={"error": str(error)})
        if self._wrong:
            retained.suspect(self.site, self._store, self.job.memory_base)

    def _discard(self) -> None:
        """... or to throw away."""

    def _keep_attempt(self, worth_it: bool, kind: str) -> None:
        if self._proxy is not None:
            self._proxy.close()
        super()._keep_attempt(True, "prefetch")
        name = incoming_name(self.job.handoff)
        attempts.keep_chunks(self._store, self.spec.name, name)
        if name in self._store.manifest_names(name):
            self._store.drop_manifest(name)
        self._store.drop_lease(lease_of(self.job.handoff))
