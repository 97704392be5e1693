"""One path: what is in flight on it, what it can carry, and whether it still does.

TCP keeps each connection's bytes in order, so a path acknowledges with one number: how many data frames have
arrived on this connection. From the acknowledgements the path learns its rate (bytes delivered between two
acks, as BBR does: https://queue.acm.org/detail.cfm?id=3022184) and its round trip without a queue: the least that a
short average of samples fell to. An average, because the least single sample of a path with jitter, losses
or a busy peer is one that hardly any frame meets, and a window made from it would strangle the path. The
window of about 1.5 bandwidth-delay products keeps the link full with half a round trip of queue, whatever the
size of the kernel's buffers. When the path seems to be longer than it was, the window is cut for a moment so that
the queue drains and shows whether the path is.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

from haulier.errors import Corrupt
from haulier.session.channel import OutFrame
from haulier.session.frames import HEADER, MAX_PAYLOAD
from haulier.session.settings import Settings

_LEAST_FRAME: Final = 4096
_BASE_RTT_S: Final = 10.0
"""A base round trip older than this is measured again."""
_START_RTTS: Final = 2.5
"""Window until the rate has stopped growing; TCP itself doubles in a round trip at most."""
_GROWTH: Final = 1.25
_DRAIN_RTTS: Final = 0.5
_LONGER: Final = 1.75
_AGAIN_S: Final = 2.0
"""At least this long between two looks at whether the path has become longer: each costs half a round trip."""
_RATE_MEMORY_S: Final = 1.0
"""Time constant of the rate that is reported."""
_UNKNOWN_RTT_S: Final = 0.1


class _Sent(NamedTuple):
    frame: OutFrame
    size: int
    at: float
    first_at: float  # when the first frame of this flight left
    delivered: int
    delivered_at: float
    app_limited: bool


class PathFlow:
    """The sending side of a path; times are seconds of the caller's clock."""

    def __init__(self, key: int, name: str, now: float, settings: Settings, rtt: float | None) -> None:
        self.key = key
        self.name = name
        self.heard = now
        """When bytes last came from the peer."""
        self.progress = now
        """When an ack last moved, or the first frame in flight left."""
        self.stalled = False
        self.received = 0
        """Data frames that came in on this connection ..."""
        self.acked_to_peer = 0
        """... and how many of them the peer was told of."""
        self.control: list[bytes] = []
        """Frames that go out before any data."""
        self.in_flight = 0
        self.sent_bytes = 0
        self.acked_bytes = 0
        self.resent_bytes = 0
        self.requeued = False
        self.min_rtt = rtt
        """The shortest round trip seen lately: what is reported."""
        self.base_rtt = rtt
        """The usual round trip when there is no queue: what windows are made from."""
        self.srtt = rtt
        self._settings = settings
        self._fifo: deque[_Sent] = deque()
        self._acked = 0
        self._delivered_at = now
        self._first_at = now
        self._smooth = rtt
        self._spread = 0.0
        self._base_at = now
        self._probe_until = 0.0
        self._drained_at = 0.0
        self._settled_at = 0.0  # from then on rate samples are not of a window that was cut
        self._probed: list[float] = []
        self._low_rtt = math.inf  # least average since ...
        self._low_since = now
        self._starting = True
        self._start_rate = 0.0
        self._flat_rounds = 0
        self._round_ends = 0
        self._dry_until = 1
        self._rates: deque[tuple[float, float]] = deque()
        self._ping: tuple[int, float] | None = None
        self._pings = 0
        self._busy_s = 0.0
        self._ping_at = now
        self.rate = 0.0
        """Bytes per second the path can carry, as far as is known; 0 = not yet."""
        self.steady_rate = 0.0
        """The same, smoothed: what is reported."""
        self.window = settings.first_window
        self.frame_limit = 16 * 1024

    # -- sending

    def on_sent(self, frame: OutFrame, now: float) -> None:
        """`frame` goes to the connection now."""
        size = frame.size + HEADER.size
        if not self.in_flight:
            self.progress = self._first_at = self._delivered_at = now
        self._fifo.append(
            _Sent(frame, size, now, self._first_at, self.acked_bytes, self._delivered_at, self._dry_until > 0)
        )
        self.in_flight += size
        self.sent_bytes += size

    def ran_dry(self) -> None:
        """Nothing to send: if there was room, samples of this flight do not show what the path can carry."""
        if self.in_flight < self.window:
            self._dry_until = self.acked_bytes + self.in_flight + 1

    def on_ack(self, count: int, now: float) -> list[OutFrame]:
        """The peer has `count` frames of this connection; those that are new. Raises Corrupt."""
        news = count - self._acked
        if news < 0 or news > len(self._fifo):
            raise Corrupt(
                f"the peer acknowledges {count} frames on {self.name}, of {self._acked + len(self._fifo)} sent: "
                "check that both sites run the same haulier"
            )
        if not news:
            return []
        self._acked = count
        frames = []
        for _ in range(news):
            sent = self._fifo.popleft()
            self.in_flight -= sent.size
            self.acked_bytes += sent.size
            frames.append(sent.frame)
        self._delivered_at = self.progress = now
        self.stalled = self.requeued = False
        if self.acked_bytes >= self._dry_until:
            self._dry_until = 0
        self._sample_rate(sent, now)
        self._first_at = sent.at
        self._sample_rtt(now - sent.at, now)
        self._resize()
        return frames

    def take_unacked(self) -> list[OutFrame]:
        """All frames in flight; the connection is gone and nothing of it counts any more."""
        frames = [sent.frame for sent in self._fifo if not sent.frame.acked]
        self._fifo.clear()
        self.in_flight = 0
        return frames

    def unacked(self) -> list[OutFrame]:
        """Frames in flight that have not been acknowledged on any path."""
        return [sent.frame for sent in self._fifo if not sent.frame.acked]

    # -- estimates

    def _sample_rate(self, sent: _Sent, now: float) -> None:
        interval = max(now - sent.delivered_at, sent.at - sent.first_at)
        if interval <= 0:
            return
        rate = (self.acked_bytes - sent.delivered) / interval
        if sent.app_limited and rate < self.rate:
            return
        keep = max(10 * (self.base_rtt or 0), 0.3)
        rates = self._rates
        while rates and rates[-1][1] <= rate:
            rates.pop()
        rates.append((now, rate))
        while rates[0][0] < now - keep:
            rates.popleft()
        self.rate = rates[0][1]
        if sent.app_limited:
            # A lower bound only: it must not start, or drag down, an average that takes seconds to recover.
            self.steady_rate = max(self.steady_rate, rate)
            return
        self._busy_s += interval
        weight = max(interval / self._busy_s, 1 - math.exp(-interval / (_RATE_MEMORY_S * 4)))
        self.steady_rate += (rate - self.steady_rate) * weight

    def _sample_rtt(self, rtt: float, now: float) -> None:
        if self.srtt is None or self._smooth is None or self.min_rtt is None or self.base_rtt is None:
            self.srtt = self._smooth = self.min_rtt = self.base_rtt = rtt
            self._base_at = now
            return
        self._spread += (abs(rtt - self.srtt) - self._spread) / 8
        self.srtt += (rtt - self.srtt) / 8
        smooth = self._smooth = self._smooth + (rtt - self._smooth) / 4
        self.min_rtt = min(self.min_rtt, rtt)
        self._low_rtt = min(self._low_rtt, smooth)
        if self._probe_until:
            self._probe(rtt, now)
        elif smooth <= self.base_rtt:
            self.base_rtt, self._base_at = smooth, now
        elif now - self._low_since > max(0.5, 4 * self.base_rtt):
            # Never below this all the while: more than our own window can cause. Has the path become longer?
            longer = self._low_rtt > _LONGER * self.base_rtt + 0.010 and not self._starting
            longer = longer and now - self._base_at > _AGAIN_S
            if longer or now - self._base_at > _BASE_RTT_S:
                # Frames sent from now on meet less of a queue, those sent a round trip from now none.
                self._drained_at = now + 2 * self.srtt
                self._probe_until = self._drained_at + max(self.base_rtt, 0.05)
                self._probed = []
                self._settled_at = math.inf
            self._low_rtt, self._low_since = math.inf, now

    def _probe(self, rtt: float, now: float) -> None:
        if now >= self._drained_at:
            self._probed.append(rtt)
        if now >= self._probe_until and self._probed:
            # Frames still leave in small bursts and wait for each other, hence not the average.
            self._smooth = self.base_rtt = sorted(self._probed)[len(self._probed) // 4]
            self.min_rtt, self._base_at = min(self._probed), now
            self._probe_until = 0.0
            self._settled_at = now + 2 * self.base_rtt
            self._low_rtt, self._low_since = math.inf, now

    def _still_starting(self) -> bool:
        if self._starting and self.acked_bytes >= self._round_ends:
            self._round_ends = self.acked_bytes + self.in_flight
            if self.rate >= self._start_rate * _GROWTH:
                self._start_rate, self._flat_rounds = self.rate, 0
            elif not self._dry_until:
                self._flat_rounds += 1
                self._starting = self._flat_rounds < 3
        return self._starting

    def _resize(self) -> None:
        s = self._settings
        if not self.rate or self.base_rtt is None:
            return
        rtts = _START_RTTS if self._still_starting() else s.window_rtts
        if self._probe_until:
            rtts = _DRAIN_RTTS
        slack = max(s.slack_s, min(2 * self._spread, 2 * self.base_rtt))
        # Of the frame that is on its way one half is in base_rtt already.
        window = int(self.rate * (self.base_rtt * rtts + slack)) - self.frame_limit // 2
        self.window = max(s.min_window, min(window, s.max_window))
        frame = int(self.rate * s.frame_s) & ~1023
        self.frame_limit = max(_LEAST_FRAME, min(frame, MAX_PAYLOAD))

    def eta(self, now: float, more: int = 0) -> float:
        """Seconds until `more` bytes that leave now are acknowledged, as far as can be told."""
        rtt = self.base_rtt if self.base_rtt is not None else _UNKNOWN_RTT_S
        rate = self.rate or self._settings.first_window / max(rtt, 0.001)
        late = now - self.progress if self.in_flight else 0.0
        return max(rtt, late) + (self.in_flight + more) / rate

    # -- life

    def stall_after(self) -> float:
        """Seconds without progress until this path counts as stalled."""
        return max(self._settings.stall_s, self._settings.stall_rtts * (self.srtt or 0))

    def dead_after(self) -> float:
        """Seconds of silence until the connection is given up."""
        return max(self._settings.dead_s, self._settings.dead_rtts * (self.srtt or 0))

    def ping_due(self) -> float:
        """When the next ping is due."""
        return self._ping_at + self._settings.ping_s

    def ping(self, now: float) -> int:
        """The number of a ping that leaves now."""
        self._pings += 1
        self._ping_at = now
        if self._ping is None:
            self._ping = self._pings, now
        return self._pings

    def on_pong(self, number: int, now: float) -> None:
        """The peer answered a ping."""
        if self._ping is None or number != self._ping[0]:
            return
        rtt = now - self._ping[1]
        self._ping = None
        if self.in_flight:
            self.srtt = rtt if self.srtt is None else self.srtt
        else:
            self._sample_rtt(rtt, now)
        if not self.in_flight:
            self.stalled = False
