"""One direction of a link, without I/O: packets and times in, packets out.

    push ──▶ loss ──▶ queue (drop-tail, bytes) ──▶ transmitter (rate) ──▶ delay line (delay ± jitter) ──▶ ready

The queue is served lazily: nothing happens between two calls, and each call first catches up with the
transmissions that began before its time. So a caller needs to wake only when something can come out
(`Shaper.due`), and a changed rate applies to what still waits in the queue, as on a real link.

Packets never overtake each other: the delay line is first in, first out, so one whose own delay is over still waits
for those before it.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec

from haulier.errors import UsageError

MINIMUM_QUEUE = 48_000
"""Smallest default queue in bytes: 32 full packets, so that a short link still takes a burst."""
MAXIMUM_QUEUE = 1 << 30
MINIMUM_RATE_BPS = 8_000.0
MAXIMUM_RATE_BPS = 100e9
MAXIMUM_DELAY_S = 60.0


class Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one direction of a link does to packets. `UsageError` for values that make no sense.

    rate_bps: bits of IP packets a second; 0 = not limited.  delay_s: one way.  jitter_s: each packet's delay is
    uniform in delay ± jitter.  loss: share of packets lost at random, 0 to 1.  queue_bytes: drop-tail limit of
    the queue before the transmitter; 0 = one bandwidth-delay product (of twice the delay), at least 48 kB.
    up: False loses everything, including what is on its way.
    """

    rate_bps: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    queue_bytes: int = 0
    up: bool = True

    def __post_init__(self) -> None:
        if self.rate_bps and not MINIMUM_RATE_BPS <= self.rate_bps <= MAXIMUM_RATE_BPS:
            raise UsageError(f"a rate of {self.rate_bps:g} bit/s: give 8kbit to 100gbit, or 0 for no limit")
        if not 0 <= self.delay_s <= MAXIMUM_DELAY_S:
            raise UsageError(f"a delay of {self.delay_s:g} s: give 0 to {MAXIMUM_DELAY_S:g} s")
        if not 0 <= self.jitter_s <= self.delay_s:
            raise UsageError(
                f"a jitter of {self.jitter_s:g} s on a delay of {self.delay_s:g} s: a packet's delay is uniform in "
                "delay ± jitter, so give a jitter between 0 and the delay"
            )
        if not 0 <= self.loss <= 1:
            raise UsageError(f"a loss of {self.loss:g}: give a share from 0 to 1 (or 0% to 100%)")
        if self.queue_bytes and not 1500 <= self.queue_bytes <= MAXIMUM_QUEUE:
            raise UsageError(
                f"a queue of {self.queue_bytes} bytes: give at least 1500, or 0 for one bandwidth-delay product"
            )

    @property
    def limit_bytes(self) -> int:
        """The queue's limit in bytes, the default worked out."""
        if self.queue_bytes:
            return self.queue_bytes
        return max(MINIMUM_QUEUE, int(self.rate_bps / 8 * 2 * self.delay_s))

    def changed(self, **changes: Any) -> Shape:
        """A copy with other values; checked like a new one."""
        return msgspec.structs.replace(self, **changes)


class Counts(msgspec.Struct):
    """What happened to packets of one direction. pushed = lost + dropped + cut + delivered + (still inside)."""

    pushed: int = 0
    pushed_bytes: int = 0
    delivered: int = 0
    delivered_bytes: int = 0
    lost: int = 0
    """At random."""
    dropped: int = 0
    """Queue full."""
    cut: int = 0
    """Link down."""


class Shaper:
    """The packets of one direction on their way. Times are seconds of any clock that never goes back."""

    def __init__(self, shape: Shape, rng: random.Random) -> None:
        self.shape = shape
        self.counts = Counts()
        self._rng = rng
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._line: deque[tuple[float, bytes]] = deque()
        self._free = 0.0
        """When the transmitter has sent the packet it is at."""
        self._limit = shape.limit_bytes

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the transmitter, as of the last call."""
        return self._queued_bytes

    def push(self, now: float, packet: bytes) -> None:
        """A packet enters the link at `now`."""
        shape = self.shape
        counts = self.counts
        counts.pushed += 1
        counts.pushed_bytes += len(packet)
        if not shape.up:
            counts.cut += 1
            return
        if shape.loss and self._rng.random() < shape.loss:
            counts.lost += 1
            return
        if self._queue:
            self._serve(now)
        if self._free <= now and not self._queue:
            self._transmit(now, packet)
        elif self._queued_bytes + len(packet) > self._limit:
            counts.dropped += 1
        else:
            self._queue.append(packet)
            self._queued_bytes += len(packet)

    def ready(self, now: float) -> list[bytes]:
        """The packets that have come out by `now`, in order."""
        if self._queue:
            self._serve(now)
        line = self._line
        out: list[bytes] = []
        size = 0
        while line and line[0][0] <= now:
            packet = line.popleft()[1]
            size += len(packet)
            out.append(packet)
        self.counts.delivered += len(out)
        self.counts.delivered_bytes += size
        return out

    def due(self) -> float | None:
        """When something may come out next; None = not before the next push."""
        if self._line:
            return self._line[0][0]
        return self._free if self._queue else None

    def reshape(self, now: float, shape: Shape) -> None:
        """Changes the link from `now` on.

        A new rate applies to the packet being sent and to all that wait, a new delay to packets sent from now on.
        """
        self._serve(now)
        old, self.shape = self.shape, shape
        self._limit = shape.limit_bytes
        if not shape.up:
            self.counts.cut += len(self._queue) + len(self._line)
            self._queue.clear()
            self._line.clear()
            self._queued_bytes = 0
            self._free = now
            return
        if self._free > now and old.rate_bps != shape.rate_bps:
            # The transmitter is at the youngest packet of the line: what is left of it goes at the new rate.
            left = (self._free - now) * old.rate_bps
            free = now + (left / shape.rate_bps if shape.rate_bps else 0.0)
            if self._line:
                out, packet = self._line.pop()
                self._line.append((out + free - self._free, packet))
            self._free = free
        self._serve(now)

    def _serve(self, now: float) -> None:
        queue = self._queue
        while queue and self._free <= now:
            packet = queue.popleft()
            self._queued_bytes -= len(packet)
            self._transmit(self._free, packet)

    def _transmit(self, start: float, packet: bytes) -> None:
        shape = self.shape
        done = start + len(packet) * 8 / shape.rate_bps if shape.rate_bps else start
        self._free = done
        out = done + shape.delay_s
        if shape.jitter_s:
            out += self._rng.uniform(-shape.jitter_s, shape.jitter_s)
        self._line.append((out, packet))
