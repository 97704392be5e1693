"""The window and the gate: properties, and whole handoffs of a simulated guest by a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.handoff.convergence import (
    CLOSED_THRESHOLD,
    Gate,
    Reading,
    RecentMost,
    RecentRounds,
    Step,
    held_bytes,
    switchover_bandwidth,
    window,
)
from haulier.units import CHUNK, MIB, PAGE

rates = st.floats(1e5, 1e9)


@given(rates, st.floats(0.0, 1.0))
def test_the_window_shrinks_near_the_end_and_covers_the_link(rate: float, rtt: float) -> None:
    bulk, end = window(rate, rtt, False), window(rate, rtt, True)
    assert end.wire <= bulk.wire and end.raw <= bulk.raw
    for found in (bulk, end):
        assert found.wire >= rate / 8 * 1.5 * rtt  # never idle for want of a window
        assert found.raw >= 8 * found.wire or found.raw >= MIB
        assert found.wire <= max(49_152, rate / 8 * (0.30 + 1.5 * rtt + 0.05))


def test_the_window_is_a_fraction_of_a_second_of_link() -> None:
    assert window(10e6, 0.05, True).wire == int(10e6 / 8 * 0.15)
    assert window(10e6, 0.05, False).wire == int(10e6 / 8 * 0.30)
    assert window(0.0, 0.05, True).wire > 0


def qemus_threshold(bandwidth: int, downtime_ms: int) -> int:
    """As QEMU computes it, in whole numbers."""
    return bandwidth // 1000 * downtime_ms


@given(st.integers(1, 1 << 40), st.integers(10, 60_000))
def test_the_bandwidth_gives_qemu_just_that_threshold(threshold: int, downtime_ms: int) -> None:
    found = qemus_threshold(switchover_bandwidth(threshold, downtime_ms), downtime_ms)
    assert found >= 1
    assert abs(found - threshold) <= downtime_ms / 2 or found == downtime_ms, "no further off than QEMU's own rounding"


@pytest.mark.parametrize("downtime_ms", [10, 50, 100, 300, 2000, 4000])
def test_a_closed_gate_lies_below_a_page_and_not_below_a_byte(downtime_ms: int) -> None:
    assert 1 <= qemus_threshold(switchover_bandwidth(CLOSED_THRESHOLD, downtime_ms), downtime_ms) < PAGE


def test_the_recent_most_keeps_a_rate_that_idles_and_forgets_an_old_one() -> None:
    most = RecentMost(8.0)
    assert most.add(0.0, 10.0) == 10.0
    assert most.add(4.0, 3.0) == 10.0
    assert most.add(9.0, 2.0) == 3.0
    assert most.add(30.0, 0.0) == 0.0 or most.add(30.0, 0.0) == 2.0
    assert most.add(31.0, 50.0) == 50.0


def reading(now: float, remaining: int, rate: float = 10e6, rounds: int = 3) -> Reading:
    return Reading(now, rounds, remaining, rate)


def test_the_gate_opens_only_right_after_a_small_round() -> None:
    gate = Gate(300)
    gate.start(0.0)
    assert gate.step(reading(0.1, 100 * MIB)) is Step.WAIT, "nothing is due yet"
    assert gate.step(reading(0.1, 0)) is Step.DISK_ROUND
    gate.round_done(1.0, 5.0, 1 << 20, 10e6)
    assert gate.step(reading(1.01, 0)) is Step.DISK_ROUND, "after a big round another one follows, without a pause"
    gate.round_done(2.0, 0.2, 10_000, 10e6)
    assert gate.step(reading(2.6, 0)) is Step.DISK_ROUND, "a small round that is long over does not count"
    gate.round_done(3.0, 0.2, 10_000, 10e6)
    assert gate.step(reading(3.01, 100 * MIB)) is Step.WAIT, "memory is not small"
    assert gate.step(reading(3.02, 0, rounds=1)) is Step.WAIT, "the first pass says nothing about what is dirty"
    assert gate.step(reading(3.03, 0)) is Step.OPEN
    assert gate.is_open


def test_what_is_held_back_counts_for_the_downtime() -> None:
    gate = Gate(300)
    budget = int(10e6 / 8 * 0.15)
    gate.round_done(1.0, 0.05, 0, 10e6, budget + 1)
    assert gate.step(reading(1.01, 0)) is Step.DISK_ROUND, "a round in which nothing was sent, but all was held back"
    gate.round_done(2.0, 0.05, 0, 10e6, budget)
    assert gate.step(reading(2.01, 0)) is Step.OPEN
    patient = Gate(300)
    assert patient.step(reading(0.5, 0, rounds=100)) is Step.DISK_ROUND
    patient.round_done(1.0, 0.05, 0, 10e6, 4 * budget)
    assert patient.step(reading(1.01, 0, rounds=100)) is Step.OPEN, "as with memory: more, when it has been long"


def test_chunks_held_back_are_reckoned_as_those_that_were_sent() -> None:
    assert held_bytes(0, 10_000, 5) == 0
    assert held_bytes(3, 10_000, 5) == 6_000
    assert held_bytes(3, 0, 0) == 3 * CHUNK // 2, "nothing is known yet"
    assert held_bytes(2, 10 * CHUNK, 1) == 2 * CHUNK, "what else a round sends is not theirs"


def test_an_open_gate_closes_when_the_guest_does_not_stop_and_then_asks_for_more() -> None:
    gate = Gate(300)
    thresholds = []
    now = 0.0
    for attempt in range(8):
        gate.round_done(now, 0.1, 0, 10e6)
        assert gate.step(reading(now + 0.01, 0)) is Step.OPEN
        thresholds.append(gate.threshold(10e6))
        assert gate.step(reading(now + 1.0, 0)) is Step.WAIT
        assert gate.step(reading(now + 2.6, 0)) is Step.CLOSE
        assert not gate.is_open
        assert gate.step(reading(now + 2.7, 0)) is Step.DISK_ROUND, f"attempt {attempt}: closed means closed"
        now += 3
    assert thresholds == sorted(thresholds)
    assert thresholds[0] * 4 == pytest.approx(thresholds[-1], rel=0.01)
    assert thresholds[0] * 8 / 10e6 < 0.3, "the first attempt keeps within the downtime asked for"


def test_an_open_gate_follows_what_pages_come_to_on_the_wire() -> None:
    gate = Gate(300)
    gate.round_done(0.0, 0.1, 0, 10e6)
    assert gate.step(Reading(0.1, 3, 0, 10e6, 2.0)) is Step.OPEN
    narrow = gate.threshold(10e6, 2.0)
    assert gate.step(Reading(0.3, 4, 0, 10e6, 2.1)) is Step.WAIT, "hardly more"
    assert gate.step(Reading(0.6, 9, 0, 10e6, 5.0)) is Step.WIDEN
    assert gate.threshold(10e6, 5.0) > 2 * narrow
    assert gate.step(Reading(0.7, 9, 0, 10e6, 5.1)) is Step.WAIT, "it is that wide by now"
    assert gate.step(Reading(1.0, 9, 0, 10e6, 2.0)) is Step.WAIT, "never narrower: QEMU may just be stopping the guest"
    assert gate.attempts == 1
    assert gate.step(Reading(2.7, 9, 0, 10e6, 6.0)) is Step.CLOSE, "patience is counted from its opening"


def test_recent_rounds_tell_once_there_are_four_of_them() -> None:
    rounds = RecentRounds()
    assert rounds.add(0.0, 3, 0, 0) == (0, 0)
    assert rounds.add(0.5, 6, 3_000_000, 90_000) == (0, 0)
    assert rounds.add(1.0, 8, 5_000_000, 150_000) == (1_000_000, 30_000)
    assert rounds.add(2.6, 12, 6_000_000, 190_000) == (250_000, 10_000), "only what is not long ago counts"
    assert rounds.add(9.0, 13, 7_000_000, 290_000) == (0, 0)


def test_what_the_guest_always_writes_is_no_reason_to_wait() -> None:
    gate = Gate(300)
    narrow = gate.threshold(10e6, 8.0)
    cheap = Reading(0.0, 9, 0, 10e6, 8.0, 2_000_000, 40_000)
    assert gate.wide(cheap) == 2_600_000 > narrow
    assert gate.wide(Reading(0.0, 9, 0, 10e6, 8.0, 100_000, 4_000)) == narrow, "never narrower for it"
    assert gate.wide(Reading(0.0, 9, 0, 10e6, 8.0, 2_000_000, 400_000)) == narrow, (
        "such a round takes the link too long"
    )
    assert gate.wide(Reading(0.0, 9, 0, 1e6, 8.0, 2_000_000, 40_000)) == gate.threshold(1e6, 8.0)


@dataclass
class Guest:
    """A guest on a link by a virtual clock: QEMU's rounds, a disk writer, and the engine's loop around the gate."""

    gate: Gate
    rate_bps: float
    memory: int
    dirty: float
    """Bytes of memory dirtied per second, within `hot` bytes."""
    hot: int
    writes: float
    """Wire bytes that the disk writer makes per second."""
    burst: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """From, to, wire bytes/s: a time in which the disk writes more."""
    rtt: float = 0.05
    now: float = 0.0
    rounds: int = 1
    open_threshold: int = 0
    unsent: float = 0.0
    log: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.remaining = float(self.memory)
        self.dirtied = 0.0

    def advance(self, seconds: float, share: float = 1.0) -> bool:
        """True when the guest stops by itself."""
        end = self.now + seconds
        while self.now < end:
            step = 0.01
            self.now += step
            begin, until, extra = self.burst
            self.unsent += (extra if begin <= self.now < until else self.writes) * step
            self.dirtied = min(float(self.hot), self.dirtied + self.dirty * step)
            self.remaining -= self.rate_bps / 8 * step * share
            if self.remaining <= max(self.open_threshold, CLOSED_THRESHOLD):
                # QEMU counts exactly once its estimate is below the threshold.
                left = max(0.0, self.remaining)
                self.remaining = min(left + self.dirtied, max(left, float(self.hot)))
                self.dirtied = 0.0
                self.rounds += 1
                if self.remaining <= max(self.open_threshold, CLOSED_THRESHOLD):
                    return True
        return False

    def disk_round(self) -> tuple[bool, float, float]:
        size, self.unsent = self.unsent, 0.0
        seconds = size * 8 / self.rate_bps + self.rtt
        return self.advance(seconds, share=0.2), seconds, size

    def run(self, limit: float = 600.0) -> float | None:
        """Wire bytes of disk that were not there when the guest stopped; None if it never did."""
        gate = self.gate
        gate.start(self.now)
        size = 0.0
        while self.now < limit:
            step = gate.step(Reading(self.now, self.rounds, int(self.remaining), self.rate_bps))
            self.log.append((self.now, step.value))
            if step is Step.DISK_ROUND:
                stopped, seconds, size = self.disk_round()
                if stopped:
                    return size + self.unsent
                gate.round_done(self.now, seconds, int(size), self.rate_bps)
            elif step is Step.OPEN:
                assert size * 8 <= max(16_384 * 8, self.rate_bps * 0.12), "opened after a big disk round"
                self.open_threshold = gate.threshold(self.rate_bps)
            elif step is Step.WIDEN:
                self.open_threshold = gate.threshold(self.rate_bps)
            elif step is Step.CLOSE:
                self.open_threshold = 0
            elif self.advance(0.05):
                return self.unsent
        return None


def test_a_quiet_guest_stops_with_almost_nothing_left_on_its_disk() -> None:
    guest = Guest(Gate(300), 10e6, 40 * MIB, dirty=50_000, hot=MIB, writes=5_000)
    left = guest.run()
    assert left is not None and left < 50_000
    assert guest.gate.attempts == 1


def test_a_guest_whose_dirty_rate_needs_more_is_given_more() -> None:
    guest = Guest(Gate(300), 10e6, 10 * MIB, dirty=5e6, hot=600_000, writes=5_000)
    assert guest.run() is not None
    assert guest.gate.attempts > 1
    assert ("close the gate") in {step for _, step in guest.log}


def test_no_switchover_while_the_disk_is_busy() -> None:
    # For a minute the disk writes more than the link carries; memory would be ready all the time.
    guest = Guest(Gate(300), 10e6, 2 * MIB, dirty=50_000, hot=MIB, writes=2_000, burst=(0.0, 20.0, 2e6))
    left = guest.run()
    opened = [at for at, step in guest.log if step == "open the gate"]
    assert opened and opened[0] > 20.0
    assert left is not None and left < 50_000


def test_a_disk_that_never_calms_down_never_opens_the_gate() -> None:
    guest = Guest(Gate(300), 10e6, 2 * MIB, dirty=50_000, hot=MIB, writes=2e6)
    assert guest.run(120.0) is None
    assert not guest.gate.attempts


@given(st.floats(1e6, 1e8), st.floats(1e3, 1e7), st.integers(10_000, 4 * MIB), st.floats(0, 5e5), st.integers(50, 1000))
def test_whatever_the_guest_does_the_gate_keeps_its_order(
    rate: float, dirty: float, hot: int, writes: float, downtime: int
) -> None:
    guest = Guest(Gate(downtime), rate, 8 * MIB, dirty=dirty, hot=hot, writes=writes)
    guest.run(30.0)
    opened = False
    for _, step in guest.log:
        if step == "open the gate":
            assert not opened
            opened = True
        elif step == "close the gate":
            assert opened
            opened = False
        elif step == "disk round":
            assert not opened, "a disk round while the guest may stop at any moment"
