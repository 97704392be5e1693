"""When to read on, when to do another disk round, and when to let QEMU switch over. Pure: numbers in, decisions out.

Two halves make a short downtime, and neither does alone: bounded buffers between the source QEMU and the target QEMU
(otherwise seconds of compressed pages lie in queues when the guest stops), and QEMU's own estimate of the link held to
the link's real rate (a run of unchanged pages passes the proxy a hundred times faster than the link, and QEMU would
believe it could send the rest in no time).
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Final

from haulier.units import CHUNK, MIB

CLOSED_THRESHOLD: Final = 1
"""Bytes. Below one page, so that a closed gate opens by itself only when nothing at all is left; not zero, because QEMU
then skips the exact dirty count and stops after its first pass, whatever the guest has dirtied meanwhile."""
FIRST_PASS_RAW: Final = 512 * MIB
MOST_QUEUED: Final = 24 * MIB
"""Wire bytes of memory that may wait in the first pass."""
QUEUED_S: Final = 5.0
"""Seconds of link that may."""
MIN_RATE_BPS: Final = 64_000.0
MOST_RATIO: Final = 8.0
WIDER: Final = 1.2
"""Times its threshold that an open gate can come to before it is opened wider."""
MORE_THAN_USUAL: Final = 1.3
"""Times what the guest's last rounds held."""
LONG_ROUNDS: Final = 12
"""Memory rounds after which the guest counts as one that is hard to catch."""


class RecentRatio:
    """Raw bytes per wire byte over the last few seconds, from running totals. 1.0 until there is enough to tell."""

    def __init__(self, span: float = 6.0, least: int = 64 * 1024) -> None:
        self._span, self._least = span, least
        self._totals: deque[tuple[float, int, int]] = deque()

    def add(self, now: float, raw: int, wire: int) -> float:
        """Takes the totals so far."""
        totals = self._totals
        totals.append((now, raw, wire))
        while len(totals) > 2 and totals[1][0] < now - self._span:
            totals.popleft()
        sent = wire - totals[0][2]
        return max(1.0, (raw - totals[0][1]) / sent) if sent >= self._least else 1.0


class RecentMost:
    """The most of a figure's recent values: a link's rate shows only while there is something to send.

    `span` is how many seconds a value counts.
    """

    def __init__(self, span: float = 8.0) -> None:
        self._span = span
        self._values: deque[tuple[float, float]] = deque()

    def add(self, now: float, value: float) -> float:
        """Takes a value, and gives the most of those that count; a lone zero keeps what was known."""
        values = self._values
        while values and values[-1][1] <= value:
            values.pop()
        values.append((now, value))
        while len(values) > 1 and values[0][0] < now - self._span:
            values.popleft()
        return values[0][1]


class RecentRounds:
    """What a round of memory came to over the last second and a half, in raw and wire bytes, from running totals.

    (0, 0) until four rounds have gone by in that time: then they are of the pages that the guest writes all the time.
    """

    def __init__(self, span: float = 1.5, least: int = 4) -> None:
        self._span, self._least = span, least
        self._totals: deque[tuple[float, int, int, int]] = deque()

    def add(self, now: float, rounds: int, raw: int, wire: int) -> tuple[int, int]:
        """Takes the totals so far."""
        totals = self._totals
        totals.append((now, rounds, raw, wire))
        while len(totals) > 2 and totals[0][0] < now - self._span:
            totals.popleft()
        _, first, first_raw, first_wire = totals[0]
        if rounds - first < self._least:
            return 0, 0
        return (raw - first_raw) // (rounds - first), (wire - first_wire) // (rounds - first)


@dataclass(frozen=True, slots=True)
class Window:
    """Bounds for what is on its way, in bytes."""

    wire: int
    raw: int
    hungry: int = 0
    """Wire bytes on their way below which the link will soon have nothing to do."""
    flying: int = 0
    """Of these, what the link itself holds: a round trip's."""
    rate_bps: float = 0.0
    """What the link was last seen to take."""
    ending: bool = False
    """What is encoded now is, or may be, what the stopped guest waits for."""


def serving_window(rate_bps: float, rtt_s: float) -> Window:
    """While a guest runs at the target and waits for pages: whatever is on its way already stands before them.

    So no more than keeps the link busy: a round trip and 30 ms of link.
    """
    wire = max(32_768, int(max(rate_bps, MIN_RATE_BPS) / 8 * max(0.05, 1.1 * rtt_s + 0.03)))
    return Window(wire, max(256 << 10, 4 * wire), wire // 2, rate_bps=rate_bps, ending=True)


def window(rate_bps: float, rtt_s: float, ending: bool, first_pass: bool = False) -> Window:
    """Bounds for unacknowledged bytes: about 150 ms of link near the end, 300 ms before, and never below 1.5 RTT.

    The raw bound is eight times that, but at least 1 MiB, so that runs of unchanged pages do not stall the reader.
    In the first pass some seconds of link may wait, and many unchanged pages: while the link carries what must be
    sent, the reader gets on with the pages that cost only CPU (the end of a guest's memory is often zeros, which QEMU
    takes seconds to look at where they were never touched). What grows stale in the queue would have to be sent again
    anyway, and before the guest stops the queue has long drained.
    """
    seconds = max(0.15 if ending else 0.30, 1.5 * rtt_s + 0.05)
    wire = max(49_152, int(max(rate_bps, MIN_RATE_BPS) / 8 * seconds))
    flying = int(rate_bps / 8 * rtt_s)
    if first_pass and not ending:
        # At first the rate is a guess, and only a link that is full shows it.
        queued = max(wire, MIB, min(MOST_QUEUED, int(rate_bps / 8 * QUEUED_S)))
        return Window(queued, FIRST_PASS_RAW, max(wire * 3 // 4, 768 * 1024), flying, rate_bps)
    return Window(wire, max((1 if ending else 4) * MIB, 8 * wire), wire // 2, flying, rate_bps, ending)


def switchover_bandwidth(threshold: int, downtime_ms: int) -> int:
    """``avail-switchover-bandwidth`` (bytes/s) that makes QEMU stop the guest below `threshold` pending bytes.

    QEMU divides it by 1000 without a remainder before it multiplies with the downtime limit, so less than 1000 would
    mean a threshold of nothing; the least that can be asked for is `downtime_ms` bytes.
    """
    return max(1, round(threshold / downtime_ms)) * 1000


class Step(enum.StrEnum):
    """What the source does next."""

    WAIT = "wait"
    DISK_ROUND = "disk round"
    OPEN = "open the gate"
    WIDEN = "open the gate wider"
    CLOSE = "close the gate"


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known at one moment. Times in seconds, sizes in bytes."""

    now: float
    rounds: int
    """QEMU's dirty-sync-count."""
    remaining: int
    """QEMU's estimate of raw bytes of memory left in this round."""
    rate_bps: float
    ratio: float = 1.0
    """Raw bytes of memory that a byte on the wire stood for lately, of pages that were dirtied again."""
    round_raw: int = 0
    """What a memory round came to lately, in raw bytes and ..."""
    round_wire: int = 0
    """... on the wire; 0 where there were too few to tell."""


def quiet(seconds: float, wire_bytes: int, rate_bps: float) -> bool:
    """A disk round that took and sent so little that the next one may be the last."""
    return wire_bytes <= max(16_384, rate_bps / 8 * 0.08) or seconds < 0.12


def held_bytes(held: int, wire_bytes: int, chunks: int) -> int:
    """Wire bytes that `held` chunks will come to: as `chunks` of earlier rounds did, else half of their size."""
    return held * (min(CHUNK, wire_bytes // chunks) if chunks else CHUNK // 2)


class Gate:
    """Holds the memory switchover back until the disk is nearly clean too.

    While memory converges, a disk round is due every `pause` seconds. Once memory is small, rounds follow each other
    without a pause until one is small too; the gate opens at that moment. If the guest does not stop within
    `patience`, the gate closes again and rounds go on: the threshold then grows, up to `stretch` times, because each
    attempt, and every few memory rounds, prove that the guest's dirty rate keeps the rest above it. While it is open
    it follows what pages come to on the wire: by then only hot ones are sent, and they take fewer bytes each time.
    """

    def __init__(self, downtime_ms: int, *, pause: float = 2.0, patience: float = 2.5, stretch: float = 4.0) -> None:
        self.downtime_ms = downtime_ms
        self.pause = pause
        self.patience = patience
        self.stretch = stretch
        self.is_open = False
        self.attempts = 0
        self._opened = 0.0
        self._wide = 0
        self._round_ended = 0.0
        self._small = False
        self._long = 0

    def start(self, now: float) -> None:
        """Memory begins; the next disk round is due after a pause."""
        self._round_ended = now
        self._small = False

    def threshold(self, rate_bps: float, ratio: float = 1.0) -> int:
        """Raw bytes of memory below which QEMU may stop the guest while the gate is open.

        `ratio` must come from pages like those that will be left: a ratio of the first pass, full of pages that
        equal the mirror, doubles the downtime.
        """
        return max(8192, int(self._accepted(rate_bps) * max(1.0, min(MOST_RATIO, 0.8 * ratio))))

    def _accepted(self, rate_bps: float) -> float:
        """The same, grown by what was tried in vain."""
        return self._affordable(rate_bps) * min(self.stretch, 1.0 + 0.5 * max(0, self.attempts - 1 + self._long))

    def _affordable(self, rate_bps: float) -> float:
        """Wire bytes of memory that the stopped guest may wait for."""
        # The other half of the downtime asked for goes to the last disk round, device state and round trips.
        return max(rate_bps, MIN_RATE_BPS) / 8 * self.downtime_ms / 1000 * 0.5

    def wide(self, reading: Reading) -> int:
        """The threshold as things are.

        Rounds that follow each other at once and still hold as much each hold what the guest always writes. When the
        link takes such a round in half of the time that it may take, a little more than one is no reason to wait: only
        what comes on top is pages that have not been sent before.
        """
        wide = self.threshold(reading.rate_bps, reading.ratio)
        if reading.round_raw and reading.round_wire <= self._affordable(reading.rate_bps) / 2:
            wide = max(wide, int(MORE_THAN_USUAL * reading.round_raw))
        return wide

    def near(self, reading: Reading) -> bool:
        """Memory is small enough to think of switching over."""
        return reading.rounds >= 2 and reading.remaining < 4 * self.threshold(reading.rate_bps, reading.ratio)

    def round_done(self, now: float, seconds: float, wire_bytes: int, rate_bps: float, held: int = 0) -> None:
        """A disk round was acknowledged. `held`: wire bytes of chunks held back, for which the stopped guest waits."""
        self._round_ended = now
        self._small = quiet(seconds, wire_bytes, rate_bps) and held <= self._accepted(rate_bps)

    def step(self, reading: Reading) -> Step:
        """What to do now; the caller does it and reports a disk round with `round_done`."""
        self._long = max(0, reading.rounds - LONG_ROUNDS) // 8
        if self.is_open:
            if reading.now - self._opened > self.patience:
                self.is_open = False
                return Step.CLOSE
            wide = self.wide(reading)
            if wide > WIDER * self._wide:
                self._wide = wide
                return Step.WIDEN
            return Step.WAIT
        if self.near(reading):
            if self._small and reading.now - self._round_ended < 0.5:
                self.is_open = True
                self.attempts += 1
                self._opened = reading.now
                self._wide = self.wide(reading)
                self._small = False
                return Step.OPEN
            return Step.DISK_ROUND
        if reading.now - self._round_ended >= self.pause:
            return Step.DISK_ROUND
        return Step.WAIT
