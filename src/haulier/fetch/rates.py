"""What a source gives: bytes a second by what arrived, the round trip, and how much to have asked for at once. Pure.

The rate is the largest of the recent samples, each taken over at least a round trip during which something was always
outstanding; the window is 1.5 bandwidth-delay products of it, 2 while it still grows, and a little for the time that
processes take. Largest rate and shortest round trip together name the link's own bandwidth-delay product, as BBR does
(Cardwell et al., 2016): a queue on the way makes neither larger.
"""

from __future__ import annotations

from collections import deque
from typing import Final

FIRST_WINDOW: Final = 256 << 10
MAX_WINDOW: Final = 32 << 20
STEADY_GAIN: Final = 1.5
GROWING_GAIN: Final = 2.0
SLACK_S: Final = 0.010
"""Processes at both ends wait for a core now and then, on a short link for as long as its round trip."""
SAMPLE_S: Final = 0.1
MEMORY_S: Final = 3.0
RTT_MEMORY_S: Final = 300.0
"""Long: while a link is busy every round trip is longer by the queue that we ourselves make."""
FIRST_RTT_S: Final = 0.1


class Rate:
    """One source. Times are of one monotonic clock in seconds, amounts in wire bytes."""

    def __init__(self) -> None:
        self._rtts: deque[tuple[float, float]] = deque()
        self._samples: deque[tuple[float, float]] = deque()
        self._rtt = FIRST_RTT_S
        self._bps = 0.0
        self._since = 0.0
        self._bytes = 0
        self._measuring = False
        self._grew = True
        self.arrived = 0
        """Wire bytes that came in all."""
        self.chunk_bytes = 40_000.0
        """Wire bytes of a chunk, as they lately were."""

    @property
    def rtt(self) -> float:
        """Shortest round trip seen lately, in seconds."""
        return self._rtt

    @property
    def bps(self) -> float:
        """Bytes (not bits) a second; 0 until known."""
        return self._bps

    @property
    def window(self) -> int:
        """How many wire bytes to have outstanding."""
        if not self._samples:
            return FIRST_WINDOW
        gain = GROWING_GAIN if self._grew else STEADY_GAIN
        # Two chunks more: one that is half here counts as outstanding, and the next question has to be on its way.
        return min(MAX_WINDOW, int(self.bps * (self.rtt * gain + SLACK_S) + 2 * self.chunk_bytes))

    def pong(self, now: float, rtt: float) -> None:
        """A small question was answered after `rtt` seconds."""
        self._rtts.append((now, max(rtt, 1e-4)))
        while len(self._rtts) > 1 and self._rtts[0][0] < now - RTT_MEMORY_S:
            # The shortest stays for as long as nothing newer is close to it: a busy link only shows longer ones.
            self._rtts.popleft()
        self._rtt = min(rtt for _at, rtt in self._rtts)

    def busy(self, now: float) -> None:
        """Something is outstanding from now on."""
        if not self._measuring:
            self._measuring, self._since, self._bytes = True, now, 0

    def idle(self) -> None:
        """Nothing is outstanding any more: what comes now says nothing about the link."""
        self._measuring = False

    def came(self, now: float, wire_bytes: int, *, chunk: bool = True) -> None:
        """`wire_bytes` arrived."""
        self.arrived += wire_bytes
        if chunk:
            self.chunk_bytes += (wire_bytes - self.chunk_bytes) / 16
        if not self._measuring:
            return
        self._bytes += wire_bytes
        took = now - self._since
        if took < max(SAMPLE_S, self.rtt):
            return
        sample = self._bytes / took
        self._grew = sample > 1.15 * self.bps
        self._samples.append((now, sample))
        memory = max(MEMORY_S, 10 * self.rtt)
        while self._samples[0][0] < now - memory:
            self._samples.popleft()
        self._bps = max(rate for _at, rate in self._samples)
        self._since, self._bytes = now, 0
