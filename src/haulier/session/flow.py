"""One path: what is in flight on it, how much may be, and whether it still moves.

TCP keeps each connection's bytes in order, so a path acknowledges with one number: how many data frames have
arrived on this connection.

The window is about 1.5 bandwidth-delay products: the link stays full with half a round trip of queue, whatever
the size of anyone's buffers. Where the transport can tell how much its TCP has in flight and how long its round trips
are, the window applies to that, since what waits for the peer's process is no queue in the network; acknowledged
frames then only bound how far the peer may fall behind. Otherwise both are taken from the frames.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

from haulier.errors import Corrupt
from haulier.session.channel import OutFrame
from haulier.session.estimate import Rate, RoundTrip
from haulier.session.frames import HEADER, MAX_PAYLOAD
from haulier.session.settings import Settings

_LEAST_FRAME: Final = 4096
_START_RTTS: Final = 1.75
"""Window until the rate has stopped growing: a queue of one bandwidth-delay product must not overflow."""
_DRAIN_RTTS: Final = 0.5
_BEHIND: Final = 4
"""Windows of frames that may be unacknowledged when TCP's own state is known."""
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
        self.requeued = False
        """What is in flight here waits for another path as well."""
        self.received = 0
        """Data frames that came in on this connection ..."""
        self.acked_to_peer = 0
        """... and how many of them the peer was told of."""
        self.owed = 0
        """Payload bytes received since then, and ..."""
        self.owed_since = now
        """... since when."""
        self.busy_at = -math.inf
        """When so much had last come that acks do not wait."""
        self.control: list[bytes] = []
        """Frames that go out before any data."""
        self.in_flight = 0
        self.sent_bytes = 0
        self.acked_bytes = 0
        self.resent_bytes = 0
        self.window = settings.first_window
        self.frame_limit = 16 * 1024
        self.cost = 0
        """Carries data only when the session may spend so much, or when no cheaper path works."""
        self.reserved = False
        """The peer keeps this path in reserve."""
        self.loss = 0.0
        """Share of TCP's segments that it had to send again."""
        self.rtt = RoundTrip(rtt, now)
        self.rate = Rate()
        self._settings = settings
        self._patience_rtt = rtt or 0.0
        self._fifo: deque[_Sent] = deque()
        self._acked = 0
        self._delivered_at = now
        self._first_at = now
        self._round_ends = 0
        self._dry_until = 1
        self._tcp: int | None = None  # bytes that TCP had in flight at its last report, and what it got since
        self._tcp_at = now
        self._ping: tuple[int, float] | None = None
        self._pings = 0
        self._ping_at = now

    # -- sending

    def room(self, windows: int = 1) -> int:
        """Bytes that may be put in flight now; `windows` = 2 for what must not wait."""
        if self._tcp is None:
            return windows * self.window - self.in_flight
        return min(windows * self.window - self._tcp, _BEHIND * self.window - self.in_flight)

    @property
    def waits_for_tcp(self) -> bool:
        """There is no room, and no frame from the peer may come to say when there is."""
        return self._tcp is not None and self._tcp >= self.window

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
        if self._tcp is not None:
            self._tcp += size

    def ran_dry(self) -> None:
        """Nothing to send: if there was room, samples of this flight do not show what the path can carry."""
        if self.room() > 0:
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
        before, since = self.acked_bytes, self._delivered_at
        for _ in range(news):
            sent = self._fifo.popleft()
            self.in_flight -= sent.size
            self.acked_bytes += sent.size
            frames.append(sent.frame)
        self._delivered_at = self.progress = now
        self.stalled = self.requeued = False
        if self.acked_bytes >= self._dry_until:
            self._dry_until = 0
        interval = max(now - sent.delivered_at, sent.at - sent.first_at)
        if interval > 0:
            keep = max(10 * (self.rtt.base or 0), 0.3)
            self.rate.sample((self.acked_bytes - sent.delivered) / interval, now, keep, sent.app_limited)
        self.rate.flow(self.acked_bytes - before, now)
        if not sent.app_limited and now >= self.rtt.settled_at:
            self.rate.busy(self.acked_bytes - before, now - since)
        self._first_at = sent.at
        self._patience_rtt += (now - sent.at - self._patience_rtt) / 8
        if self._tcp is None:
            self._sample_rtt(now - sent.at, now)
        if self.acked_bytes >= self._round_ends:
            self._round_ends = self.acked_bytes + self.in_flight
            self.rate.round(self._dry_until > 0)
        self._resize()
        return frames

    def on_tcp(self, in_flight: int, rtt: float, now: float, loss: float = 0.0) -> None:
        """What TCP says of itself: bytes in flight or not sent yet, its smoothed round trip, the share sent again."""
        self._tcp = in_flight
        self.loss = loss
        # Its round trip is an average already; more often than this would only repeat it.
        if self.in_flight and rtt > 0 and now - self._tcp_at > rtt / 8:
            self._tcp_at = now
            self._sample_rtt(rtt, now)

    def unacked(self) -> list[OutFrame]:
        """Frames in flight that have not been acknowledged on any path."""
        return [sent.frame for sent in self._fifo if not sent.frame.acked]

    # -- estimates

    def _sample_rtt(self, rtt: float, now: float) -> None:
        was_draining = self.rtt.draining
        self.rtt.sample(rtt, now, self.rate.fallen, self.rate.starting)
        if was_draining and not self.rtt.draining:
            self.rate.forget_best()

    def _resize(self) -> None:
        s, rate, base = self._settings, self.rate.peak, self.rtt.base
        if not rate or base is None:
            return
        rtts = _DRAIN_RTTS if self.rtt.draining else _START_RTTS if self.rate.starting else s.window_rtts
        slack = s.slack_s if self.rate.starting else max(s.slack_s, min(2 * self.rtt.spread, base / 2))
        window = int(rate * (base * rtts + slack))
        if self._tcp is None:
            window -= self.frame_limit // 2  # of the frame that is on its way one half is in `base` already
        self.window = max(s.min_window, min(window, s.max_window))
        frame = int(rate * s.frame_s) & ~1023
        self.frame_limit = max(_LEAST_FRAME, min(frame, MAX_PAYLOAD))

    def eta(self, now: float, more: int = 0) -> float:
        """Seconds until `more` bytes that leave now are acknowledged, as far as can be told."""
        rtt = self.rtt.base if self.rtt.base is not None else _UNKNOWN_RTT_S
        rate = self.rate.peak or self._settings.first_window / max(rtt, 0.001)
        late = now - self.progress if self.in_flight else 0.0
        return max(rtt, late) + (self.in_flight + more) / rate

    # -- life

    def stall_after(self) -> float:
        """Seconds without progress until this path counts as stalled."""
        return max(self._settings.stall_s, self._settings.stall_rtts * self._patience_rtt)

    def dead_after(self) -> float:
        """Seconds of silence until the connection is given up."""
        return max(self._settings.dead_s, self._settings.dead_rtts * self._patience_rtt)

    def ping_due(self) -> float:
        """When the next ping is due: on a path that is idle but for what comes, that is sign of life enough."""
        last = self._ping_at if self.in_flight else max(self._ping_at, self.heard)
        return last + self._settings.ping_s

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
            return  # it waited behind data: acks and TCP know better
        self.stalled = False
        self._patience_rtt += (rtt - self._patience_rtt) / 8
        self._sample_rtt(rtt, now)
