"""What a path can carry and how long it is, learnt from what happens on it; no I/O, the time is an argument.

`Rate` takes bytes delivered between two acknowledgements, as BBR does (https://queue.acm.org/detail.cfm?id=3022184).
`RoundTrip` wants the round trip *without a queue*. The least single sample would not do: on a path with jitter, or
with a busy peer, it is one that hardly any frame meets, and a window made from it strangles the path (the rate
falls with the window, the window with the rate). So it takes the least that a short average fell to, and when
there is reason to doubt asks for the window to be cut for a moment, so that the queue drains and shows the way itself.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

BASE_S: Final = 30.0
"""A base older than this is measured again, doubts or not."""
AGAIN_S: Final = 2.0
"""At least this long between two looks: each costs the path about half a round trip."""
LONGER: Final = 1.75
"""Never below this many bases: more than our own window can cause."""
FALLEN: Final = 0.85
"""The rate has fallen to this part of the best: perhaps because the window was made for a shorter way."""
GROWTH: Final = 1.25
"""A round in which the rate grew by this is still part of the start."""
_STEADY_S: Final = 3.0
_FLOW_S: Final = 1.0
_PATIENCE: Final = 0.010


class RoundTrip:
    """Round trips in seconds; None until the first is known."""

    def __init__(self, first: float | None, now: float) -> None:
        self.base = first
        """The usual round trip when there is no queue: what windows are made from."""
        self.least = first
        """The shortest seen lately: what is reported."""
        self.average = first
        self.spread = 0.0
        """Mean deviation from `average`."""
        self.draining = False
        """The window should be cut now."""
        self.settled_at = 0.0
        """From then on rates are not of a window that was cut."""
        self._smooth = first
        self._base_at = now
        self._low = math.inf  # least of _smooth since ...
        self._low_since = now
        self._drained_at = 0.0
        self._drain_until = 0.0
        self._samples: list[float] = []

    def sample(self, rtt: float, now: float, fallen: bool = False, starting: bool = False) -> None:
        """One more. `fallen`: the rate is well below its best; `starting`: a queue is no wonder."""
        if self.base is None or self.least is None or self.average is None or self._smooth is None:
            self.base = self.least = self.average = self._smooth = rtt
            self._base_at = now
            return
        if not self.draining:
            self.spread += (abs(rtt - self.average) - self.spread) / 8
        self.average += (rtt - self.average) / 8
        self.least = min(self.least, rtt)
        self._smooth += (rtt - self._smooth) / 4
        self._low = min(self._low, self._smooth)
        if self.draining:
            self._drain(rtt, now)
        elif self._smooth <= self.base:
            self.base, self._base_at = self._smooth, now
        elif now - self._low_since > max(0.5, 4 * self.base):
            longer = self._low > LONGER * self.base + _PATIENCE and not starting
            age = now - self._base_at
            if age > BASE_S or ((longer or fallen) and age > AGAIN_S):
                # Frames sent from now on meet less of a queue, those sent a round trip from now none.
                self.draining = True
                self.settled_at = math.inf
                self._drained_at = now + 2 * self.average
                self._drain_until = self._drained_at + max(self.base, 0.05)
                self._samples = []
            self._low, self._low_since = math.inf, now

    def _drain(self, rtt: float, now: float) -> None:
        if now >= self._drained_at:
            self._samples.append(rtt)
        if now >= self._drain_until and self._samples:
            # Frames still leave in small bursts and wait for each other, hence not the average.
            self._smooth = self.base = sorted(self._samples)[len(self._samples) // 4]
            self.least, self._base_at = min(self._samples), now
            self.draining = False
            self.settled_at = now + 2 * self.base
            self._low, self._low_since = math.inf, now


class Rate:
    """Bytes per second; 0 until known."""

    def __init__(self) -> None:
        self.peak = 0.0
        """The most in the last ten round trips: what windows are made from."""
        self.best = 0.0
        """The highest peak since `forget_best`."""
        self.starting = True
        """No round without growth yet."""
        self._peaks: deque[tuple[float, float]] = deque()
        self._bytes = 0.0
        self._seconds = 0.0
        self._start = 0.0
        self._flat = 0
        self._flow = 0.0
        self._flow_at = 0.0

    @property
    def steady(self) -> float:
        """What is delivered on average while busy, over some seconds: what is reported."""
        if self.starting or self._seconds < 0.2:
            return self.peak
        # What was carried of late, busy or not, the path can carry: a sender that hardly ever has more to send than
        # that would otherwise live on with the first rates it saw.
        return max(self._bytes / self._seconds, min(self.peak, self._flow / _FLOW_S))

    def flow(self, count: int, now: float) -> None:
        """`count` bytes more were delivered, whether or not there were more to send."""
        self._flow = self._flow * math.exp((self._flow_at - now) / _FLOW_S) + count
        self._flow_at = now

    @property
    def fallen(self) -> bool:
        """Well below the best."""
        return self.peak < FALLEN * self.best

    def sample(self, rate: float, now: float, keep: float, lower_bound: bool) -> None:
        """`rate` was delivered; more was not there to send if it is a `lower_bound`. Remembered for `keep` seconds."""
        if lower_bound and rate < self.peak:
            return
        peaks = self._peaks
        while peaks and peaks[-1][1] <= rate:
            peaks.pop()
        peaks.append((now, rate))
        while peaks[0][0] < now - keep:
            peaks.popleft()
        self.peak = peaks[0][1]
        self.best = max(self.best, self.peak)

    def busy(self, count: int, seconds: float) -> None:
        """`count` bytes were delivered in `seconds` in which there was always more to send."""
        if self.starting:
            return
        keep = math.exp(-seconds / _STEADY_S)
        self._bytes = self._bytes * keep + count
        self._seconds = self._seconds * keep + seconds

    def round(self, dry: bool) -> None:
        """A round trip is over; `dry` if there was not enough to send in it."""
        if not self.starting:
            return
        if self.peak >= self._start * GROWTH:
            self._start, self._flat = self.peak, 0
        elif not dry:
            self._flat += 1
            self.starting = self._flat < 3

    def forget_best(self) -> None:
        """From now on `fallen` means: fallen since now."""
        self.best = self.peak
