"""The source's side of a VM's handoff: QEMU's stream, and disk rounds beside it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from haulier.agent.site import Site
from haulier.compress.xz import name_of
from haulier.disks.export import DiskExport
from haulier.disks.heat import hot_chunks, pack
from haulier.disks.rounds import DiskRounds, Round
from haulier.disks.transfer import DiskSender
from haulier.errors import Corrupt, GuestError, HandoffFailed, HaulierError
from haulier.guests.command import RAM_ID
from haulier.guests.qemu import Qemu
from haulier.guests.qmp import Event as QmpEvent
from haulier.handoff import agreeing, attempts, foretold, retained, served
from haulier.handoff.adapting import Adapting, profile_of
from haulier.handoff.check import differing, memory_digests
from haulier.handoff.convergence import (
    CLOSED_THRESHOLD,
    Gate,
    Reading,
    RecentRatio,
    RecentRounds,
    Step,
    Window,
    held_bytes,
    quiet,
    serving_window,
    switchover_bandwidth,
)
from haulier.handoff.footprint import footprint
from haulier.handoff.journal import Journal
from haulier.handoff.measures import AUTO_CONVERGE, HELD_BACK, POST_COPY, Kind, Measure, Measures, advice, throttled
from haulier.handoff.memory_link import MemoryPump
from haulier.handoff.messages import (
    LEAVE_BYTES,
    Accept,
    AnyMessage,
    Arrived,
    Channel,
    Failed,
    Filled,
    GoFirst,
    Heat,
    Job,
    Poised,
    PrepareMemory,
)
from haulier.handoff.residence import guest_paths, incoming_name, pin_name, run_on
from haulier.handoff.source import DISK_CHUNK_WIRE, Peer, SourceHandoff
from haulier.handoff.urgent import UrgentPump
from haulier.memory.base import MemoryBase
from haulier.units import CHUNK, PAGE
from haulier.without import ORDER, without

log = logging.getLogger(__name__)

DRAIN_S = 1.5
MAX_BANDWIDTH = 1 << 30
"""bytes/s: QEMU never paces itself, the window does."""
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
STOPPED_STALL_S = 15.0
"""As the options' `stall_s`, while the guest stands still: longer than the session needs to see that a path is dead."""
QUIET_DISK = 256 * 1024
"""Wire bytes of a disk round below which memory may start."""


class VmSource(SourceHandoff):
    """One handoff of a VM at its source."""

    _streams = True

    def __init__(self, site: Site, journal: Journal, job: Job, peer: Peer, cancelled: threading.Event) -> None:
        super().__init__(site, journal, job, peer, cancelled)
        self.paths = guest_paths(site, job.guest)
        self._pump: MemoryPump | None = None
        self._rounds: DiskRounds | None = None
        self._ratios, self._usual = RecentRatio(), RecentRounds()
        self._base: MemoryBase | None = None
        self._adapting: Adapting | None = None
        self._measures: Measures | None = None
        self._stop_event: QmpEvent | None = None
        self._goes_first = False
        """The guest runs at the target before its memory is whole."""
        self._filled: Filled | None = None
        self._taking = False
        """The target's QEMU is there: what is sent to it is to be taken."""
        self._lost = False

    def run(self) -> dict[str, Any]:
        """As every source's; one whose post-copy had begun when the target refused it says what became of the guest."""
        try:
            return super().run()
        except HandoffFailed as error:
            if not self._lost:
                raise
            raise HandoffFailed(
                f"{error}: but its post-copy had begun, and what it had in memory is lost; its disk at "
                f"{self.site.name!r} is right: boot it with 'haulier guest start {self.job.guest}'"
            ) from error

    def _adopt(self) -> None:
        self.qemu = Qemu.adopt(self.paths, worker=True)

    def _accelerator(self) -> str:
        return self.qemu.accel

    def _check(self) -> None:
        super()._check()
        if self._pump is not None and self._pump.error is not None:
            error = self._pump.error
            if isinstance(error, HaulierError):
                raise error
            raise GuestError(f"the memory of guest {self.job.guest!r} broke off ({error}): see its qemu.log") from error
        self._check_taken()
        sends_after_it = self._token.serving or (self._goes_first and self._token.granted)
        if sends_after_it and self._pump is not None and self._pump.ended.is_set():
            # QEMU closes its stream when all is sent and the target has said so; what else it may be, it says.
            served.check_whole(self.qemu, self._mark)

    def _check_taken(self) -> None:
        """HandoffFailed, before the token, if the target's QEMU stands still. A dead link the session judges."""
        pump, session = self._pump, self._session
        if not self._taking or self._token.granted or pump is None or session is None:
            return
        still_s, limit = pump.still_s(time.monotonic(), session.connected), self.job.options.stall_s
        if self._stop_event is not None:
            limit = min(limit, STOPPED_STALL_S)
        if still_s > limit:
            raise HandoffFailed(
                f"QEMU at site {self.job.peer!r} has taken nothing of the memory of {self.job.guest!r} for "
                f"{still_s:.0f} s, although the link is up; the guest runs on at {self.site.name!r}: see what holds it "
                "up there (its qemu.log and disk export, a host that is overloaded or out of memory), then try again"
            )

    def _observe(self) -> None:
        super()._observe()
        if self._adapting is not None:
            status = self.progress.status
            status.mode, status.why = name_of(self._adapting.level), self._adapting.choice.reason
        if self._token.serving and self._pump is not None:
            served.observe(self.qemu, self.progress, self._pump)

    def _preflight(self) -> None:
        self.progress.phase("offer", "looking whether the guest can go")
        state = self.qemu.status()
        if state != "running":
            raise GuestError(f"guest {self.job.guest!r} is {state}, not running: 'haulier guest show' tells more")

    def _foretell(self, accept: Accept) -> None:
        """The forecast of this handoff: the operator's plan, or a small sample while the target prepares itself."""
        super()._foretell(accept)
        if self._forecast is None:
            rate, rtt = self._rate or 10e6, self._session.rtt_s() if self._session is not None else 0.0

            def make() -> None:
                with contextlib.suppress(HaulierError, OSError):
                    self._forecast = foretold.small(
                        self.site, self.job, self.spec.uuid, accept.memory_base, self._finder, rate, rtt
                    )

            threading.Thread(target=make, name="forecast", daemon=True).start()

    # -- disk ------------------------------------------------------------------------------------------------------

    def _begin_rounds(self) -> Round | None:
        """From here on the guest is touched: QEMU notes what it writes."""
        self._rounds = DiskRounds(self.qemu.qmp, "disk0", self.paths.rounds_sock)
        return self._rounds.begin()

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
            report = self._send_round(self._rounds.next(hold_back=not without(ORDER)))

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
        held = len(self._rounds.held_back)
        return self._note_disk_round(sent, began, round=current.number, last=last, dirty=len(current.dirty), held=held)

    def _held_bytes(self, held: int) -> int:
        """Wire bytes of so many chunks held back; the first round's, which are of old writes, say nothing of them."""
        later = [entry for entry in self._disk_rounds if entry["round"]]
        wire, chunks = (sum(entry[name] for entry in later) for name in ("wire_bytes", "chunks"))
        return held_bytes(held, wire, chunks)

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
        if not self.job.options.level:
            self._adapting = Adapting(profile_of(self.site), self._rate or 10e6, self.site.cpu_cap)
        proxy.set_level(self._adapting.level if self._adapting is not None else self.job.options.level)
        qemu = self.qemu
        early = POST_COPY in self.job.options.allow
        # Capabilities stay set from whatever this QEMU did before, so those that must be off are named too.
        qemu.set_capabilities(
            events=True,
            pause_before_switchover=True,
            return_path=True,
            late_block_activate=False,
            mapped_ram=False,
            auto_converge=AUTO_CONVERGE in self.job.options.allow,
            postcopy_ram=early,
            postcopy_preempt=early,
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
        urgent: UrgentPump | None = None
        if early:
            urgent = UrgentPump(self.paths.out_sock, self._session)
            qemu.migrate_uri(f"unix:{self.paths.out_sock}")
            ours = urgent.stream()
        else:
            ours, qemus = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._pump = MemoryPump(ours, proxy, self._session, self._window, made.ahead, self._adapting)
        if urgent is not None:
            self._pump.serve(RAM_ID, urgent)
        else:
            self._pump.widen(qemus)
            try:
                qemu.migrate_fd(qemus.fileno())
            finally:
                qemus.close()
        self._pump.start()

    def _window(self, first_pass: bool = False, may_end: bool = False) -> Window:
        if self._token.granted and self._goes_first and self._session is not None:
            return serving_window(self._rate or 10e6, self._session.rtt_s())
        pump = self._pump
        if pump is not None:
            first_pass, may_end = first_pass or pump.first_pass, may_end or pump.may_end
        return super()._window(first_pass, may_end)

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
        self._taking = True
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
            if self._take(measures.note(reading)):
                self._start_postcopy()
                break
            self.progress.status.downtime_ms = round(measures.outlook(reading).downtime_s * 1000, 1)
            self.progress.left(0, self._memory_left())
            step = gate.step(reading)
            if step is Step.DISK_ROUND:
                assert self._rounds is not None
                entry = self._send_round(self._rounds.next(hold_back=not without(ORDER)))
                held = self._held_bytes(entry["held"])
                gate.round_done(time.monotonic(), entry["seconds"], entry["wire_bytes"], self._rate, held)
            elif step is not Step.WAIT:
                threshold = CLOSED_THRESHOLD if step is Step.CLOSE else gate.wide(reading)
                self.qemu.set_parameters(
                    avail_switchover_bandwidth=switchover_bandwidth(threshold, self.job.options.downtime_ms)
                )
            else:
                with contextlib.suppress(GuestError):
                    self.qemu.qmp.wait_event("STOP", timeout=0.05 if self._ending else 0.15, since=self._mark)
        self.report["gate_attempts"] = gate.attempts

    def _make_measures(self) -> Measures:
        options = self.job.options
        deadline = self._began + options.deadline_s if options.deadline_s else 0.0
        return Measures(options.allow, options.downtime_ms, deadline)

    def _take(self, measure: Measure | None) -> bool:
        """Does what has to be done about a guest that outruns the link. True if it goes before its memory."""
        if measure is None:
            return False
        log.info("%s (%d %%): %s", measure.kind, measure.percent, measure.why)
        if measure.kind is Kind.THROTTLE:
            self.progress.status.message = f"slowing the guest by {measure.percent} %: {measure.why}"
            self.qemu.set_parameters(**throttled(measure.percent))
            return False
        if measure.kind is Kind.POST_COPY:
            self.progress.status.message = f"the guest goes before its memory: {measure.why}"
            return True
        raise HandoffFailed(
            f"guest {self.job.guest!r} writes faster than the link to {self.job.peer!r} carries it "
            f"({measure.why}); it runs on at {self.site.name!r}: {advice(self.job.options.allow)}"
        )

    def _reading(self, rounds: int) -> Reading:
        assert self._pump is not None
        now = time.monotonic()
        # Only from the second pass on: what the first one holds is nothing like what will be left at the end.
        ratio = self._ratios.add(now, self._pump.raw, self._pump.wire) if rounds >= 2 else 1.0
        usual = self._usual.add(now, rounds, self._pump.raw, self._pump.wire)
        return Reading(now, rounds, self._remaining, self._rate, ratio, *usual)

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

    def _start_postcopy(self) -> None:
        """Stops the guest for a switchover after which memory goes on, once disk and queues are small."""
        assert self._rounds is not None and self._session is not None and self._pump is not None
        for _ in range(4):
            if self._stopped():
                break
            entry = self._send_round(self._rounds.next())
            if quiet(entry["seconds"], entry["wire_bytes"], self._rate):
                break
        # What is queued now is downtime.
        self._ending = True
        self._pump.first_pass_over()
        self._session.wait_below(self._window().wire // 2, Channel.MEMORY, timeout=1.0)
        if self._stopped():
            return  # it has converged after all
        try:
            self.qemu.start_postcopy()
        except GuestError:
            if not self._stopped():
                raise
            return
        self._goes_first = True
        while not self._stopped():
            self._check()
            with contextlib.suppress(GuestError):
                self.qemu.qmp.wait_event("STOP", timeout=0.2, since=self._mark)

    # -- switchover ------------------------------------------------------------------------------------------------

    def _switch_over(self) -> None:
        """The last disk round, device state, and the target's word that everything is there."""
        self._last_disk()
        if self._goes_first:
            self._await_poised()
            return
        assert self._control is not None and self._sender is not None
        self.qemu.migrate_continue()
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

    def _last_disk(self) -> None:
        assert self._control is not None and self._rounds is not None and self._stop_event is not None
        self.progress.phase("switchover", "the guest is stopped")
        self._ending = True
        self._marks["stop"] = self._stop_event.at
        self.qemu.wait_migration({"pre-switchover"}, 30, since=self._mark)
        self._marks["pre-switchover"] = time.time()
        if self._goes_first:
            self._control.send(GoFirst())
        self._send_round(self._rounds.final(), last=True)
        self._rounds.stop()
        self._marks["disk-sent"] = time.time()

    def _await_poised(self) -> None:
        """The target's vote where memory is to follow the token: its disk is durable, its QEMU waits.

        QEMU's post-copy cannot be taken back once device state is sent, not even while the target has not run: so the
        token goes first, and device state right behind it.
        """
        assert self._control is not None and self._sender is not None
        self._sender.wait_committed()
        poised = self._control.wait(Poised, 60)
        self._marks["arrived"] = time.time()
        self._marks["disk-durable"] = poised.durable_at - self._control.clock_offset
        if poised.epoch != self._epoch:
            raise Corrupt(f"site {self.job.peer!r} votes for epoch {poised.epoch}, not {self._epoch}: try again")
        if poised.manifest != self._sender.manifest.digest:
            raise Corrupt(f"the disk arrived wrong at site {self.job.peer!r}: nothing was lost here; try again")
        # Before the token: whoever goes on with it after this worker's death has to know it.
        assert self._pump is not None
        served.remember(self.journal, self.job.handoff, self._pump.proxy)

    def _granted(self) -> None:
        if not self._goes_first:
            super()._granted()
            return
        self.qemu.migrate_continue()
        self.progress.phase("post-copy", "the guest is the target's; the rest of its memory follows")

    def _runs(self, at: float) -> None:
        super()._runs(at)
        if self._goes_first:
            served.note(self.journal, self.job.handoff, marks=self._marks)

    def _hears(self, message: AnyMessage) -> None:
        if isinstance(message, Filled):
            self._filled = message
        elif isinstance(message, Failed):
            log.warning("site %s: %s", self.job.peer, message.text)

    def _sent_completely(self) -> None:
        self.qemu.wait_migration({"completed"}, 30, since=self._mark)
        self.qemu.postmigrate()
        self._marks["completed"] = time.time()

    def _compare(self, arrived: Arrived, memory: bytes) -> None:
        """If asked for, all of memory must be the same there as well."""
        assert self._pump is not None
        self._trust(arrived, self._pump.raw, self._pump.proxy.finish())
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

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The guest runs at the target: keeps what serves the way back, clears away the rest, writes the report."""
        assert self._pump is not None and self._sender is not None and self._session is not None
        done = time.time()
        if self._goes_first:
            self._sent_after_it()
        name = self._say_finish()
        self._store.save_manifest(incoming_name(self.job.handoff), self._sender.manifest, partial=True)
        proxy = self._pump.proxy
        self.report.update(self._figures(done))
        self.report.update(foretold.told(self._forecast, self.report))
        if not self._goes_first:
            foretold.remember(self.site, self.report, self.spec.memory_bytes)
        self._pump.close()
        self.qemu.close()
        mirror = self.site.mirror(self.job.handoff)
        try:
            self._left(name, proxy.mirror if proxy.mirror is not None else mirror)
        finally:
            proxy.close()
            mirror.unlink(missing_ok=True)

    def _sent_after_it(self) -> None:
        """What the report says of post-copy; nothing that the target did not say it has is kept for the way back."""
        assert self._pump is not None and self._control is not None
        filled, pump = self._filled, self._pump
        self._marks["whole"] = time.time()
        if filled is not None:
            self._marks["memory-loaded"] = filled.loaded_at - self._control.clock_offset
        pump.ended.wait(10)
        whole = filled is not None and filled.raw_bytes == pump.raw and filled.stream_digest == pump.proxy.finish()
        digest = filled.stream_digest if whole and filled is not None else b""
        self._arrived = Arrived(self._epoch, pump.raw, digest, b"")
        if pump.device_state_at:
            self._marks["device-state"] = pump.device_state_at
        self.report["post_copy"] = served.figures(pump, filled, self._marks)

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
            self._lost = not run_on(self.qemu)

    def _drain(self) -> None:
        if self._session is not None and self._pump is not None:
            with contextlib.suppress(HaulierError):
                self._session.wait_below(1, Channel.MEMORY, timeout=DRAIN_S)

    def _keep_attempt(self, error: BaseException | None, kind: str = "cut") -> None:
        """The next attempt starts from what this one has sent, unless that was wrong."""
        if isinstance(error, Corrupt):
            self.site.mirror(self.job.handoff).unlink(missing_ok=True)
            # Of the two sites' it may be this one's that has decayed.
            retained.suspect(self.site, self._store, self.progress.status.memory_base)
        else:
            attempts.keep_of(self.site, self.job, self.spec, self._base, kind)

    def _drop_memory(self) -> None:
        """Lets go of what was made for sending memory."""
        if self._pump is not None:
            self._pump.close()

    def _let_go(self) -> None:
        self.qemu.close()
