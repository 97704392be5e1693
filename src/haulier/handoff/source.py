"""The source's side of a handoff: drives all phases, and is the one who passes the token."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import msgspec

from haulier.agent.site import Site
from haulier.chunks.blocks import StoreBlockFinder
from haulier.chunks.store import ChunkStore
from haulier.compress.stream import level_for
from haulier.disks.export import DiskExport
from haulier.disks.heat import hot_chunks, pack
from haulier.disks.rounds import DiskRounds, Round
from haulier.disks.transfer import DiskSender
from haulier.errors import Cancelled, Corrupt, GuestError, HandoffFailed, HaulierError, PeerError
from haulier.guests.qemu import Qemu
from haulier.guests.qmp import Event as QmpEvent
from haulier.handoff import agreeing, attempts, clients, foretold, retained
from haulier.handoff.adapting import Adapting, profile_of
from haulier.handoff.check import differing, memory_digests
from haulier.handoff.control import Control, failure
from haulier.handoff.convergence import (
    CLOSED_THRESHOLD,
    Gate,
    Reading,
    RecentMost,
    RecentRatio,
    Step,
    Window,
    switchover_bandwidth,
    window,
)
from haulier.handoff.figures import by_layer, times
from haulier.handoff.footprint import footprint
from haulier.handoff.journal import Journal
from haulier.handoff.measures import AUTO_CONVERGE, HELD_BACK, Kind, Measure, Measures, advice, throttled
from haulier.handoff.memory_link import MemoryPump
from haulier.handoff.messages import (
    LEAVE_BYTES,
    Accept,
    Arrived,
    Base,
    BaseReady,
    Channel,
    Finish,
    Heat,
    Job,
    MemoryReady,
    Offer,
    PrepareMemory,
    Running,
    Status,
    Stretched,
)
from haulier.handoff.offering import connect, make_offer
from haulier.handoff.preparing import Preparation, foreseeable
from haulier.handoff.progress import Progress
from haulier.handoff.residence import guest_paths, incoming_name, lease_of, pin_name, retire, spec_of
from haulier.handoff.token import RESTART_S, OwnPeer, Token
from haulier.images.layers import LAYERS, split_of
from haulier.memory.base import MemoryBase
from haulier.network import paths as networks
from haulier.session import Session
from haulier.units import CHUNK, PAGE

log = logging.getLogger(__name__)

CONNECT_S = 60.0
DRAIN_S = 1.5
MAX_BANDWIDTH = 1 << 30
"""bytes/s: QEMU never paces itself, the window does."""
PROBE_BYTES = 96 * 1024
SWITCHOVER_MARKS = (
    "pre-switchover",
    "disk-sent",
    "device-state",
    "disk-durable",
    "memory-loaded",
    "arrived",
    "completed",
    "token",
    "running",
)
"""What the report tells of the switchover, in the order in which it mostly happens."""
SMALL_DISK = 500_000
DISK_CHUNK_WIRE = 20_000
"""Wire bytes of a changed chunk, more or less."""
QUIET_DISK = 256 * 1024
"""Wire bytes of a disk round below which memory may start."""


class Peer(OwnPeer, Protocol):
    """The target's agent, as far as a worker talks to it."""

    def offer(self, offer: Offer) -> Accept: ...
    def prefetch(self, offer: Offer) -> Accept: ...


class SourceHandoff:
    """One handoff at its source. `run` returns the report; raises what went wrong, with the guest running here."""

    _probe_bytes = PROBE_BYTES
    _streams = True
    """Memory comes as QEMU's stream: what sends it can be made ready before the target has answered."""

    def __init__(self, site: Site, journal: Journal, job: Job, peer: Peer, cancelled: threading.Event) -> None:
        self.site, self.journal, self.job, self.peer = site, journal, job, peer
        self.row = journal.guest(job.guest)
        self.spec = spec_of(self.row)
        self.paths = guest_paths(site, job.guest)
        self.directory: Path = site.handoff_root(job.handoff)
        self.progress = Progress(
            self.directory,
            Status(handoff=job.handoff, role="source", guest=job.guest, source=site.name, target=job.peer),
        )
        self.report: dict[str, Any] = {}
        self._cancelled = cancelled
        self._store = ChunkStore(site.store)
        self._session: Session | None = None
        self._control: Control | None = None
        self._pump: MemoryPump | None = None
        self._rounds: DiskRounds | None = None
        self._preparation: Preparation | None = None
        self._sender: DiskSender | None = None
        self._ending = False
        self._rate = 0.0
        self._rates = RecentMost()
        self._ratios = RecentRatio()
        self._base: MemoryBase | None = None
        self._forecast: dict[str, Any] | None = None
        self._adapting: Adapting | None = None
        self._measures: Measures | None = None
        self._disk_rounds: list[dict[str, Any]] = []
        self._timeline: list[dict[str, Any]] = []
        self._marks: dict[str, float] = {}
        self._stop_event: QmpEvent | None = None
        self._over = threading.Event()
        self._transport = job.options.transport or site.transport or "striping"
        self._host_network = contextlib.ExitStack()
        self._spender: networks.Spender | None = None
        self.left_alone = threading.Event()
        """The other site's worker is gone, by the word of its agent: set from outside."""
        self._token = Token(journal, job, site.name, peer, self.left_alone)

    # -- the whole of it -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Hands the guest over. On any failure before the token the guest runs on here and nothing is left behind."""
        self._adopt()
        try:
            self._hand_over()
        except BaseException as error:
            if self._token.passed:
                raise
            self._back_out(error)
            raise
        finally:
            self._close()
        return self.report

    def _adopt(self) -> None:
        self.qemu = Qemu.adopt(self.paths, worker=True)

    def _accelerator(self) -> str:
        return self.qemu.accel

    def _host(self) -> dict[str, str]:
        """What the target has to know of this host; nothing where QEMU stands between."""
        return {}

    def _hand_over(self) -> None:
        self._marks["begin"] = time.time()
        self._watching()
        self._preflight()
        offer, accept = self._offer()
        with ThreadPoolExecutor(1, thread_name_prefix="begin-rounds") as pool:
            begun = pool.submit(self._begin_rounds) if accept.complete else None
            self._connect(offer, accept)
            self._settle(accept)
        first = begun.result() if begun is not None else None
        sender = self._make_sender(accept)
        early = first is not None and len(first.dirty) * DISK_CHUNK_WIRE < SMALL_DISK
        if early:
            # All at once: pages that would equal blocks of so small a disk cost less than the wait for it.
            self._start_memory(accept)
        self._first_disk(sender, first)
        if not early:
            self._start_memory(accept)
        assert self._control is not None
        self._control.wait(MemoryReady, 90)
        self.progress.phase("memory", "sending memory while the guest runs")
        self._foretell(accept)
        self._converge()
        self._switch_over()
        self._before_token()
        self._pass_token()
        self._finish()

    def _before_token(self) -> None:
        """Both sites are stopped and whole here, and the guest is still this site's: a place to look at both."""

    def _check(self) -> None:
        """Raises whatever stands against going on."""
        if self._cancelled.is_set() and not self._token.granted:
            raise Cancelled(f"handoff of {self.job.guest!r} cancelled; the guest runs on at site {self.site.name!r}")
        if self.left_alone.is_set() and not self._token.granted:
            raise HandoffFailed(
                f"the worker at site {self.job.peer!r} is gone; guest {self.job.guest!r} runs on at "
                f"{self.site.name!r}: see the worker's log there"
            )
        if self._pump is not None and self._pump.error is not None:
            error = self._pump.error
            if isinstance(error, HaulierError):
                raise error
            raise GuestError(f"the memory of guest {self.job.guest!r} broke off ({error}): see its qemu.log") from error
        deadline = self.job.options.deadline_s
        if deadline and not self._token.granted and time.time() - self._marks["begin"] > deadline:
            raise HandoffFailed(
                f"guest {self.job.guest!r} was not at site {self.job.peer!r} within {deadline:g} s; it runs on at "
                f"{self.site.name!r}: allow more time, or let it write less"
            )

    def _observe(self) -> None:
        session = self._session
        if session is None:
            return
        sent, received = session.wire_bytes()
        status = self.progress.status
        status.wire_bytes = sent + received
        status.rate_bps = self._rate = self._rates.add(time.monotonic(), session.rate_bps())
        status.rtt_s = session.rtt_s()
        status.paths = [msgspec.to_builtins(path) for path in session.paths()]
        status.transport = session.transport()
        if self._spender is not None:
            now = time.time()
            session.may_spend(self._spender.look(now, now - self._marks["begin"], status.eta_s))
        if self._adapting is not None:
            status.mode, status.why = f"zstd level {self._adapting.level}", self._adapting.choice.reason
        if self._sender is not None:
            status.layers = {name: asdict(layer) for name, layer in list(self._sender.layers.items())}

    def _watching(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        """Runs beside the engine: keeps the status fresh, and wakes a disk sender that waits when all is over."""
        while not self._over.wait(0.2):
            try:
                self._observe()
                self.progress.write()
                error: HaulierError | None = None
                try:
                    self._check()
                    if self._session is not None:
                        error = self._session.error
                    if error is None and self._control is not None:
                        error = self._control.failed
                except HaulierError as found:
                    error = found
                if error is not None and self._sender is not None:
                    self._sender.fail(error)
            except Exception:
                log.exception("the watch over handoff %s", self.job.handoff)

    # -- offer and connection --------------------------------------------------------------------------------------

    def _preflight(self) -> None:
        self.progress.phase("offer", "looking whether the guest can go")
        state = self.qemu.status()
        if state != "running":
            raise GuestError(f"guest {self.job.guest!r} is {state}, not running: 'haulier guest show' tells more")

    def _offer(self) -> tuple[Offer, Accept]:
        self._epoch = self._token.begin()
        offer = self._prepare(self._epoch)
        first = foreseeable(offer.memory_bases, offer.golden)
        if first is not None and self._streams:
            assert self._preparation is not None
            self._preparation.foresee(first)
        return offer, self.peer.offer(offer)

    def _prepare(self, epoch: int) -> Offer:
        """The offer; what both sites hold is indexed from here on, while the target looks at it."""
        manifest = self._manifest = self._store.load_manifest(self.row.manifest)
        self._preparation = Preparation(self.site, self._store, self.job.handoff, self.spec, manifest)
        offer = make_offer(self.site, self._store, self.job, self.row, manifest, epoch)
        options = msgspec.structs.replace(self.job.options, transport=self._transport)
        return msgspec.structs.replace(offer, accelerator=self._accelerator(), host=self._host(), options=options)

    def _settle(self, accept: Accept) -> None:
        assert self._preparation is not None
        self._preparation.settle(accept, memory=self._streams)

    @property
    def _finder(self) -> StoreBlockFinder:
        assert self._preparation is not None
        return self._preparation.finder

    def _connect(self, offer: Offer, accept: Accept) -> None:
        self.progress.phase("connect", f"connecting to {self.job.peer}")
        session, ways = connect(self.site, self.job.peer, offer, accept, self._host_network)
        self._session = session
        options = self.job.options
        self._spender = networks.Spender(options.paths, options.deadline_s, [way.rule.cost for way in ways])
        session.may_spend(self._spender.cost)
        self._control = Control(session, self.job.peer, self._check)
        self._control.wait_connected(CONNECT_S)
        self._control.compare_clocks()
        self._stretch(ways[0].there)
        # Learns the link's rate while the disk is looked at; at 10 Mbps it is through in 80 ms.
        for _ in range(4 if self._probe_bytes else 0):
            session.send(Channel.PROBE, os.urandom(self._probe_bytes // 4))
        if not accept.manifest:
            # There QEMU reads the disk's first sector when it starts; otherwise it has begun to start by now.
            self._control.send(Base(self._manifest.encode()))
            self._control.wait(BaseReady, 120)
        self._observe()

    def _stretch(self, there: str) -> None:
        """A guest that keeps its address: the tunnel, before anything of it is needed."""
        assert self._control is not None
        news = clients.stretch(self.site, self.spec, self.job.handoff, self.job.peer, there)
        if news is None:
            return
        self._control.send(news)
        error = self._control.wait(Stretched, 30).error
        if error:
            raise HandoffFailed(
                f"the address of guest {self.job.guest!r} cannot be kept: site {self.job.peer!r} can make no tunnel "
                f"({error}); see 'haulier doctor --network' there"
            )

    # -- disk ------------------------------------------------------------------------------------------------------

    def _begin_rounds(self) -> Round | None:
        """From here on the guest is touched: QEMU notes what it writes."""
        self._rounds = DiskRounds(self.qemu.qmp, "disk0", self.paths.rounds_sock)
        return self._rounds.begin()

    def _make_sender(self, accept: Accept) -> DiskSender:
        session = self._session
        assert session is not None
        self.progress.phase("disk", "sending the base and application layers that the target lacks")
        self._store.add_lease(lease_of(self.job.handoff))
        finder = self._finder
        self._split = split_of(self._store, self.spec.image, self.spec.golden, self.spec.uuid)
        sender = self._sender = DiskSender(
            self._store,
            self._manifest,
            finder.space,
            finder.index,
            lambda data: session.send(Channel.DISK, data),
            lease_of(self.job.handoff),
            level=level_for(self._rate),
            layer_of=self._split.of,
            order=LAYERS,
        )
        # What the target turns out to lack is hidden there.
        finder.index = sender.index
        session.on(Channel.DISK, sender.handle)
        return sender

    def _foretell(self, accept: Accept) -> None:
        """The forecast of this handoff: the operator's plan, or a small sample while the target prepares itself."""
        self._forecast = foretold.planned(self.site, self.job)
        if self._forecast is None and self.spec.container is None:
            rate, rtt = self._rate or 10e6, self._session.rtt_s() if self._session is not None else 0.0

            def make() -> None:
                with contextlib.suppress(HaulierError, OSError):
                    self._forecast = foretold.small(
                        self.site, self.job, self.spec.uuid, accept.memory_base, self._finder, rate, rtt
                    )

            threading.Thread(target=make, name="forecast", daemon=True).start()

    def _first_disk(self, sender: DiskSender, first: Round | None) -> None:
        """What the target lacks of the base, then rounds until they are small. First, for memory is full of it."""
        counts = self._read_counts()
        if counts is not None and self._control is not None:
            self._control.send(Heat(pack(counts)))
        on_demand = self.job.options.disk == "on-demand"
        if sender.offer_manifest(hot_chunks(self._manifest, counts) if on_demand else None).wire_bytes > QUIET_DISK:
            sender.commit()
        self.progress.status.message = "sending what the disk has beyond its layers"
        first = first or self._begin_rounds()
        assert self._rounds is not None and first is not None
        # What is old and large stays; leaving a little behind would gain nothing.
        report = self._send_round(first, leave=on_demand and len(first.chunks) * CHUNK > LEAVE_BYTES)
        for _ in range(4):
            if report["wire_bytes"] <= max(QUIET_DISK, self._rate / 8 * 0.5):
                break
            report = self._send_round(self._rounds.next())

    def _read_counts(self) -> bytes | None:
        """How often each chunk was read here."""
        with contextlib.suppress(HaulierError, OSError):
            return DiskExport.attach(self.paths.nbd_ctl).heat()
        return None

    def _pin(self) -> None:
        """What is left behind stays here until the target has it, whatever happens: durable before the token."""
        if self.job.options.disk == "on-demand" and self._sender is not None:
            meta = {"target": self.job.peer, "since": time.time()}
            name = pin_name(self.spec.name, self.job.handoff)
            self._store.save_manifest(name, self._sender.manifest, meta, partial=True)

    def _send_round(self, current: Round, *, last: bool = False, leave: bool = False) -> dict[str, Any]:
        """Sends one disk round and waits until it is durable there. It is cut short when the guest stops."""
        assert self._sender is not None and self._rounds is not None
        began = time.time()
        with current:
            sent = self._sender.send_round(self._until_stop(current, last), ask=not last, leave=leave)
            if last:
                # Under way before the round's export and bitmap are taken away: that time is downtime.
                self._sender.commit(final=True, wait=False)
        if not last:
            self._sender.commit()
            self._pin()
        self._observe()
        entry = {
            "round": current.number,
            "last": last,
            "dirty": len(current.dirty),
            "chunks": sent.chunks_dirty - sent.chunks_unchanged - sent.chunks_zero,
            "wire_bytes": sent.wire_bytes,
            "seconds": round(time.time() - began, 4),
            "at": round(began - self._marks["begin"], 4),
        }
        self._disk_rounds.append(entry)
        return entry

    def _until_stop(self, current: Round, last: bool) -> Iterator[tuple[int, bytes]]:
        for item in current.items():
            yield item
            self._observe()
            self.progress.left(len(current.left) * DISK_CHUNK_WIRE, self._memory_left())
            if not last and self._stopped():
                return
            self._check()

    # -- memory ----------------------------------------------------------------------------------------------------

    def _start_memory(self, accept: Accept) -> None:
        assert self._session is not None and self._control is not None
        if not accept.manifest:
            self._control.send(PrepareMemory(accept.memory_base))
        assert self._preparation is not None
        if attempts.is_attempt(accept.memory_base):
            base = retained.open_base(self.site, self.spec.name, self.spec.uuid, accept.memory_base)
            self.report["given_up_pages"] = agreeing.at_source(base, accept.memory_base, self._control)
            made = self._preparation.memory_on(accept.memory_base, base)
        else:
            made = self._preparation.memory()
        self._base, proxy = made.base, made.proxy
        self.progress.status.memory_base = accept.memory_base
        if not self.job.options.level:
            self._adapting = Adapting(profile_of(self.site), self._rate or 10e6, self.site.cpu_cap)
        proxy.set_level(self._adapting.level if self._adapting is not None else self.job.options.level)
        ours, qemus = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pump = MemoryPump(ours, proxy, self._session, self._window, made.ahead, self._adapting)
        self._pump.widen(qemus)
        qemu = self.qemu
        # Capabilities stay set from whatever this QEMU did before, so those that must be off are named too.
        qemu.set_capabilities(
            events=True,
            pause_before_switchover=True,
            return_path=True,
            late_block_activate=False,
            mapped_ram=False,
            auto_converge=AUTO_CONVERGE in self.job.options.allow,
        )
        if AUTO_CONVERGE in self.job.options.allow:
            qemu.set_parameters(**HELD_BACK)
        qemu.set_parameters(
            max_bandwidth=MAX_BANDWIDTH,
            downtime_limit=self.job.options.downtime_ms,
            avail_switchover_bandwidth=switchover_bandwidth(CLOSED_THRESHOLD, self.job.options.downtime_ms),
        )
        self._mark = qemu.qmp.mark()
        self._marks["memory"] = time.time()
        try:
            qemu.migrate_fd(qemus.fileno())
        finally:
            qemus.close()
        self._pump.start()

    def _window(self) -> Window:
        assert self._session is not None
        first_pass = self._pump is not None and self._pump.first_pass
        return window(self._rate or 10e6, self._session.rtt_s(), self._ending, first_pass)

    def _stopped(self) -> bool:
        """The guest has stopped for the switchover (or QEMU gave up, which `_converge` finds out)."""
        if self._stop_event is not None:
            return True
        if self._pump is None:
            return False
        for event in self.qemu.qmp.events(self._mark):
            if event.name == "STOP":
                self._stop_event = event
                return True
            if event.name == "MIGRATION" and event.data.get("status") in {"failed", "cancelled"}:
                reason = self.qemu.query_migrate().get("error-desc", "QEMU gives no reason")
                raise GuestError(f"QEMU gave up sending the memory of {self.job.guest!r}: {reason}")
        return False

    def _memory_left(self) -> int:
        """Wire bytes of memory that are probably still to come."""
        pump = self._pump
        if pump is None:
            return self.spec.memory_bytes // 20
        ratio = pump.wire / pump.raw if pump.raw > 1 << 20 else 0.2
        return int(self._remaining * ratio)

    _remaining = 0

    def _converge(self) -> None:
        """Memory and disk rounds until the guest has stopped for the switchover."""
        gate = Gate(self.job.options.downtime_ms)
        gate.start(time.monotonic())
        measures = self._measures = self._make_measures()
        while not self._stopped():
            self._check()
            assert self._control is not None and self._pump is not None
            for message in self._control.poll():
                raise HandoffFailed(f"site {self.job.peer!r} said {type(message).__name__} too early")
            self._observe()
            ram = self.qemu.query_migrate().get("ram", {})
            self._remaining = int(ram.get("remaining", self.spec.memory_bytes))
            reading = self._reading(int(ram.get("dirty-sync-count", 0)))
            self._ending = gate.near(reading)
            if reading.rounds >= 2:
                self._pump.first_pass_over()
            self._note(reading, gate.is_open)
            self._take(measures.note(reading))
            self.progress.status.downtime_ms = round(measures.outlook(reading).downtime_s * 1000, 1)
            self.progress.left(0, self._memory_left())
            step = gate.step(reading)
            if step is Step.DISK_ROUND:
                assert self._rounds is not None
                entry = self._send_round(self._rounds.next())
                gate.round_done(time.monotonic(), entry["seconds"], entry["wire_bytes"], self._rate)
            elif step in (Step.OPEN, Step.CLOSE):
                threshold = gate.threshold(self._rate, reading.ratio) if step is Step.OPEN else CLOSED_THRESHOLD
                self.qemu.set_parameters(
                    avail_switchover_bandwidth=switchover_bandwidth(threshold, self.job.options.downtime_ms)
                )
            else:
                with contextlib.suppress(GuestError):
                    self.qemu.qmp.wait_event("STOP", timeout=0.05 if self._ending else 0.15, since=self._mark)
        self.report["gate_attempts"] = gate.attempts

    def _make_measures(self) -> Measures:
        options = self.job.options
        left = options.deadline_s - (time.time() - self._marks["begin"]) if options.deadline_s else 0.0
        return Measures(options.allow, options.downtime_ms, time.monotonic() + left if options.deadline_s else 0.0)

    def _take(self, measure: Measure | None) -> None:
        """Does what has to be done about a guest that outruns the link."""
        if measure is None:
            return
        log.info("%s (%d %%): %s", measure.kind, measure.percent, measure.why)
        if measure.kind is Kind.THROTTLE:
            self.progress.status.message = f"slowing the guest by {measure.percent} %: {measure.why}"
            self.qemu.set_parameters(**throttled(measure.percent))
            return
        raise HandoffFailed(
            f"guest {self.job.guest!r} dirties its memory faster than the link to {self.job.peer!r} carries it "
            f"({measure.why}); it runs on at {self.site.name!r}: {advice(self.job.options.allow)}"
        )

    def _reading(self, rounds: int) -> Reading:
        assert self._pump is not None
        now = time.monotonic()
        # Only from the second pass on: what the first one holds is nothing like what will be left at the end.
        ratio = self._ratios.add(now, self._pump.raw, self._pump.wire) if rounds >= 2 else 1.0
        return Reading(now, rounds, self._remaining, self._rate, ratio)

    def _note(self, reading: Reading, gate_open: bool) -> None:
        """One point of the report's time line, four a second."""
        at = time.time() - self._marks["begin"]
        if not self._timeline or at - self._timeline[-1]["at"] >= 0.25:
            point = {"at": round(at, 3), "round": reading.rounds, "left": reading.remaining, "open": gate_open}
            point |= {
                "wire": self.progress.status.wire_bytes,
                "rate_bps": round(reading.rate_bps),
                "ratio": round(reading.ratio, 2),
            }
            self._timeline.append(point)

    # -- switchover ------------------------------------------------------------------------------------------------

    def _switch_over(self) -> None:
        """The last disk round, device state, and the target's word that everything is there."""
        assert self._control is not None and self._rounds is not None and self._stop_event is not None
        self.progress.phase("switchover", "the guest is stopped")
        self._ending = True
        self._marks["stop"] = self._stop_event.at
        self.qemu.wait_migration({"pre-switchover"}, 30, since=self._mark)
        self._marks["pre-switchover"] = time.time()
        self._send_round(self._rounds.final(), last=True)
        self._rounds.stop()
        self._marks["disk-sent"] = time.time()
        self.qemu.migrate_continue()
        assert self._sender is not None
        self._sender.wait_committed()
        memory = b""
        if self.job.options.check:
            memory = memory_digests(self.paths.ram)
        self._arrived = arrived = self._control.wait(Arrived, 120)
        self._marks["arrived"] = time.time()
        self._marks["disk-durable"] = arrived.durable_at - self._control.clock_offset
        self._marks["memory-loaded"] = arrived.loaded_at - self._control.clock_offset
        if self._pump is not None and self._pump.device_state_at:
            self._marks["device-state"] = self._pump.device_state_at
        self._sent_completely()
        self._compare(arrived, memory)

    def _sent_completely(self) -> None:
        self.qemu.wait_migration({"completed"}, 30, since=self._mark)
        self.qemu.postmigrate()
        self._marks["completed"] = time.time()

    def _compare(self, arrived: Arrived, memory: bytes) -> None:
        """Nothing unverified runs: the stream, the manifest and (if asked for) all of memory must be the same there."""
        assert self._pump is not None and self._sender is not None
        if arrived.epoch != self._epoch:
            raise Corrupt(f"site {self.job.peer!r} votes for epoch {arrived.epoch}, not {self._epoch}: try again")
        if arrived.raw_bytes != self._pump.raw or arrived.stream_digest != self._pump.proxy.finish():
            raise Corrupt(
                f"memory arrived wrong at site {self.job.peer!r} ({arrived.raw_bytes} of {self._pump.raw} bytes): "
                "nothing was lost here; try again"
            )
        if arrived.manifest != self._sender.manifest.digest:
            raise Corrupt(f"the disk arrived wrong at site {self.job.peer!r}: nothing was lost here; try again")
        if self.job.options.check:
            wrong = differing(memory, arrived.memory)
            self.report["check"] = {
                "regions": len(memory) // 16,
                "differing": wrong[:100],
                "memory_equal": not wrong,
                "seconds": round(arrived.check_s, 4),
            }
            if wrong:
                raise Corrupt(
                    f"the memory of {self.job.guest!r} differs in {len(wrong)} MiB at site {self.job.peer!r} "
                    f"(first at {wrong[0]} MiB): nothing was lost here; report it with the handoff's directory"
                )

    def _pass_token(self) -> None:
        assert self._control is not None
        self._check()
        self._token.grant(self._control)
        self._marks["token"] = time.time()
        clients.left(self.site, self.job.guest)
        self.progress.phase("token", "the guest is the target's")
        self._token.settle(self._control, self._runs)

    def _runs(self, at: float) -> None:
        """The target's worker said when the guest ran there, seconds of this host's clock."""
        self._marks["running"] = at

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The guest runs at the target: keeps what serves the way back, clears away the rest, writes the report."""
        assert self._pump is not None and self._sender is not None and self._session is not None
        done = time.time()
        name = self._say_finish()
        self._store.save_manifest(incoming_name(self.job.handoff), self._sender.manifest, partial=True)
        proxy = self._pump.proxy
        self.report.update(self._figures(done))
        self.report.update(foretold.told(self._forecast, self.report))
        foretold.remember(self.site, self.report, self.spec.memory_bytes)
        self._pump.close()
        proxy.keep()
        proxy.close()
        self.qemu.close()
        self._left(name)

    def _say_finish(self, places: bytes = b"") -> str:
        """Lets the target's worker end; the id of the picture of memory that both keep."""
        assert self._control is not None
        if "running" not in self._marks:
            with contextlib.suppress(HaulierError):
                self._runs(self._control.wait(Running, 3).at - self._control.clock_offset)
        self._observe()
        name = retained.memory_id(self.spec.uuid, self._epoch, self._arrived.stream_digest)
        with contextlib.suppress(PeerError):
            self._control.send(Finish(name, places))
        self.progress.phase("finish", "clearing away")
        return name

    def _left(self, picture: str, places: bytes | None = None) -> None:
        """Keeps the picture of memory (and where a container's pages lie in it), and takes away what ran here."""
        assert self._sender is not None
        meta = retained.Retained(
            id=picture,
            guest=self.spec.name,
            uuid=self.spec.uuid,
            epoch=self._epoch,
            manifest=self._sender.manifest.digest.hex(),
        )
        retained.keep(self.site, meta, self.site.mirror(self.job.handoff))
        if places is not None:
            retained.keep_places(self.site, self.spec.name, places)
        retire(self.site, self.spec.name, self.job.handoff)
        clients.gone(self.site, self.spec.name)
        self.journal.advance(self.spec.name, "away", "away", manifest="")

    def _told(self, done: float, marks: Sequence[str], state_bytes: int) -> dict[str, Any]:
        """What the report says of a handoff that is done, whatever moved."""
        assert self._control is not None and self._session is not None and self._sender is not None
        return {
            "handoff": self.job.handoff,
            "guest": self.spec.name,
            "source": self.site.name,
            "target": self.job.peer,
            "epoch": self._epoch,
            "outcome": "done",
            **times(self._marks, done, float(self.report.get("check", {}).get("seconds", 0.0)), marks),
            "clock_offset_s": self._control.clock_offset,
            "wire": self._wire(),
            "rate_bps": self._rate,
            "rtt_s": self._session.rtt_s(),
            "timeline": self._timeline,
            "disk": {"rounds": self._disk_rounds, "origin": self._sender.counters.as_dict()},
            "layers": by_layer(self._split, self._sender, state_bytes),
        }

    def _figures(self, done: float) -> dict[str, Any]:
        assert self._pump is not None and self._sender is not None
        pump, proxy = self._pump, self._pump.proxy
        ram = self.qemu.query_migrate().get("ram", {})
        found = self._told(done, SWITCHOVER_MARKS, pump.wire)
        found["disk"]["left_behind"] = len(self._sender.left) * CHUNK
        return found | {
            "accelerator": self.qemu.accel,
            "memory_base": self.progress.status.memory_base,
            "memory": {
                "raw_bytes": pump.raw,
                "wire_bytes": pump.wire,
                "rounds": ram.get("dirty-sync-count", 0),
                "resent_pages": max(0, ram.get("normal", 0) - self.spec.memory_bytes // PAGE),
                "stalled_s": round(pump.stalled_s, 3),
                "kinds": proxy.counters.as_dict(),
                "warnings": list(proxy.warnings),
            },
            "footprint": footprint(self.site.mirror(self.job.handoff)),
            "adapting": self._adapting.report() if self._adapting is not None else {},
            "measures": self._measures.taken if self._measures is not None else [],
        }

    def _wire(self) -> dict[str, Any]:
        """Bytes between the two workers, and what each path had a part in it."""
        assert self._session is not None
        sent, received = self._session.wire_bytes()
        status = self.progress.status
        payload = self._session.payload_bytes()
        channels = {channel.name.lower(): payload[channel] for channel in Channel if payload[channel]}
        found = {"sent": sent, "received": received, "channels": channels}
        return found | {"transport": status.transport, "paths": status.paths}

    def _resume(self) -> None:
        """Makes the guest run on, whatever was being done with it."""
        if self._pump is not None:
            # First: a QEMU that writes its devices' state into a stream that nobody reads answers to nothing.
            self._pump.hang_up()
            with contextlib.suppress(HaulierError):
                self.qemu.migrate_cancel()
        if self._rounds is not None:
            with contextlib.suppress(HaulierError):
                self._rounds.abort()
        if self.qemu.alive():
            self.qemu.resume_source()

    def _drop_memory(self) -> None:
        """Lets go of what was made for sending memory."""
        if self._pump is not None:
            self._pump.close()

    def _back_out(self, error: BaseException) -> None:
        """Before the token, or after a refusal: the guest runs on here, and nothing is left behind."""
        log.warning("handoff %s of %s: %s", self.job.handoff, self.job.guest, error)
        self.progress.phase("back out", str(error))
        clients.stayed(self.site, self.job.guest)
        self._resume()
        if isinstance(error, Cancelled) and self._session is not None and self._pump is not None:
            with contextlib.suppress(HaulierError):
                # What is on its way arrives first: the next attempt need not send it again.
                self._session.wait_below(1, Channel.MEMORY, timeout=DRAIN_S)
        if self._token.epoch and not self._token.refused:
            if self._control is not None:
                with contextlib.suppress(HaulierError):
                    self._control.send(failure(error))
            self._token.call_off(self._control)
            if self._session is not None:
                self._session.close(linger_s=3)
            # Where there is no session the agent may have the offer, and not have been able to say so.
            unheard = self._token.tell_agent(0.0 if self._session is not None else RESTART_S)
            if unheard:
                log.info("site %s is not told that handoff %s is off: %s", self.job.peer, self.job.handoff, unheard)
        self._drop_memory()
        if self._preparation is not None:
            self._preparation.close()
        self._keep_attempt(error)
        with contextlib.suppress(HaulierError):
            self._store.drop_manifest(incoming_name(self.job.handoff))
        with contextlib.suppress(HaulierError):
            self._store.drop_manifest(pin_name(self.spec.name, self.job.handoff))
        self._store.drop_lease(lease_of(self.job.handoff))

    def _keep_attempt(self, error: BaseException | None, kind: str = "cut") -> None:
        """The next attempt starts from what this one has sent, unless it was wrong."""
        if isinstance(error, Corrupt):
            self.site.mirror(self.job.handoff).unlink(missing_ok=True)
        else:
            attempts.keep_of(self.site, self.job, self.spec, self._base, kind)

    def _close(self) -> None:
        self._over.set()
        self.progress.finish()
        self.report["phases"] = self.progress.phases
        if self._session is not None:
            self._session.close(linger_s=3)
        self._host_network.close()
        if self._preparation is not None:
            self._preparation.close()
        self._let_go()
        self._store.close()
        self.progress.write(force=True)

    def _let_go(self) -> None:
        self.qemu.close()
