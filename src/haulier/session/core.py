"""The session without I/O: messages and frames in, frames and messages out, the time as an argument.

The whole state is here: channels (channel.py), paths (flow.py) and how they hang together.

    state      means                                              left by
    OPEN       messages flow both ways                            finish(), BYE, fail()
    DRAINING   finish() was called: nothing new, the rest goes    all acknowledged -> PARTING
    PARTING    BYE is out on every path                           the peer's BYE -> ENDED
    ENDED      both have said goodbye                             -
    FAILED     `error` says why                                   -

What holds in every state: a frame that was cut is sent again until it is acknowledged, on whatever path there is; the
receiver drops what it has; credit and acknowledged numbers only grow, so repeating or losing those frames with a
path does no harm (each path that comes up starts with all of them).

Order of sending: control frames; then urgent frames (those to be sent again first); then the rest (again first),
channels in turn, one frame each. A small message on a channel with nothing outstanding counts as urgent.
A path takes a frame when its window has room, unless another path would deliver it sooner even behind all
that waits.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from haulier.errors import Corrupt, HaulierError, PeerError, UsageError
from haulier.session.channel import Inbox, Outbox, OutFrame
from haulier.session.flow import PathFlow
from haulier.session.frames import ABORT, CHANNELS, HEADER, RESERVE, Frame, Kind, encode
from haulier.session.settings import Settings

_CREDIT: Final = struct.Struct("!Q")
_OUTPUT: Final = 128 * 1024
_SMALL: Final = 4096
_DATA: Final = int(Kind.DATA)
_RETIRED: Final = 1 << 30
"""Cost of a path that nothing should go over any more."""


class State(Enum):
    """See the table above."""

    OPEN = "open"
    DRAINING = "draining"
    PARTING = "parting"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True)
class PathDead:
    """A connection that must be closed (and dialled again); `why` is for the log."""

    key: int
    why: str


class SessionCore:
    """One end of a session. Not thread-safe. Methods raise HaulierError only where they say so."""

    def __init__(self, settings: Settings, peer: str, now: float) -> None:
        self.settings = settings
        self.peer = peer
        self.state = State.OPEN
        self.error: HaulierError | None = None
        self.why_no_path = "no connection yet"
        """The last reason for which there was no path; goes into the error of an outage."""
        self._outbox = [Outbox(c, settings.receive_window) for c in range(CHANNELS)]
        self._inbox = [Inbox(c, settings.receive_window, settings.max_message) for c in range(CHANNELS)]
        self.payload = [0] * CHANNELS
        """Bytes of messages by channel, sent and received together."""
        self._ring: deque[int] = deque()
        self._again: deque[OutFrame] = deque()
        self._again_urgent: deque[OutFrame] = deque()
        self._again_bytes = 0
        self._unsent = 0
        self._unacked = 0
        self._paths: dict[int, PathFlow] = {}
        self._spend = 0
        self._paths_lost = False
        """Acks may have been lost with one."""
        self._waits_for_cheap = now + settings.first_cheap_s
        self._outage_since: float | None = now
        self.ever_up = False
        self._ticked = now
        self.progress = 0
        """Grows whenever something was acknowledged or credited: what blocked senders wait for."""

    # -- the application's side

    def send(self, channel: int, payload: bytes, urgent: bool = False) -> None:
        """Queue a message. Raises UsageError, or `error` when the session is over."""
        self.check_open()
        box = self._outbox[_channel(channel)]
        # One small message of a channel that is otherwise quiet costs bulk nothing and need not queue behind it.
        urgent = urgent or (len(payload) <= _SMALL and not box.unacked)
        if len(payload) > self.settings.max_message:
            raise UsageError(
                f"a message of {len(payload)} bytes is too large: send at most {self.settings.max_message} at a time"
            )
        if box.idle:
            self._ring.append(channel)
        box.push(payload, urgent)
        self._unsent += len(payload)
        self._unacked += len(payload)
        self.payload[channel] += len(payload)

    def check_open(self) -> None:
        """Raise `error` unless messages can be sent."""
        if self.state is State.OPEN:
            return
        raise self.error or PeerError(f"the session with {self.peer} has ended: nothing more can be sent")

    def room(self, channel: int, part: float = 1.0) -> bool:
        """Less than that part of `max_unsent` waits on `channel`: a sender need not wait."""
        return self._outbox[_channel(channel)].unsent < self.settings.max_unsent * part

    def unacked(self, channel: int | None = None) -> int:
        """Payload bytes queued or sent, not acknowledged."""
        return self._unacked if channel is None else self._outbox[_channel(channel)].unacked

    def ready(self, channel: int) -> int:
        """Messages of `channel` waiting to be popped."""
        return self._inbox[channel].ready

    def pop(self, channel: int) -> tuple[bytes, int] | None:
        """The next message of `channel` and its cost for `consumed`."""
        found = self._inbox[channel].pop()
        if found is not None:
            self.payload[channel] += len(found[0])
        return found

    def consumed(self, channel: int, cost: int) -> bool:
        """The message was dealt with; True if the peer must be told of new credit."""
        box = self._inbox[channel]
        box.consumed(cost)
        return self._grant(box)

    def finish(self) -> None:
        """Send what is queued, then say goodbye."""
        if self.state is State.OPEN:
            self.state = State.DRAINING
            self._maybe_part()

    def end(self) -> None:
        """Over, in good order as far as can be known."""
        if self.state is not State.FAILED:
            self.state = State.ENDED
            self.progress += 1

    def abort(self, why: str, broken: HaulierError | None = None) -> None:
        """Give up: the peer is told why; `broken` becomes the error at this side."""
        if self.state in (State.ENDED, State.FAILED):
            return
        self.state, self.error = (State.FAILED, broken) if broken is not None else (State.ENDED, None)
        self.progress += 1
        text = why.encode()[:500]
        for path in self._paths.values():
            path.control.append(encode(Kind.BYE, flags=ABORT, payload=text))

    def fail(self, error: HaulierError) -> None:
        """The session is lost."""
        if self.state in (State.ENDED, State.FAILED):
            return
        self.state, self.error = State.FAILED, error
        self.progress += 1

    # -- paths

    def path_up(
        self, key: int, name: str, now: float, rtt: float | None = None, cost: int = 0, *, ping: bool = True
    ) -> None:
        """A connection has proved itself; `rtt` if the handshake showed it, `cost` as the operator says.

        `ping`: ask for the round trip at once, where it is not known.
        """
        if key in self._paths:
            self.path_down(key, now, "replaced by a new connection")
        path = self._paths[key] = PathFlow(key, name, now, self.settings, rtt)
        path.cost = cost
        self._outage_since = None
        self.ever_up = True
        for box in self._inbox:
            if box.next or box.granted != self.settings.receive_window:
                box.grant(always=True)
                path.control.append(_state(box))
        if (rtt is None and ping) or cost > self._spend:
            # Else the handshake was as good as a ping.
            self._ping(path, now)
        if self.state is State.PARTING:
            self._say_bye(path)
        self._requeue_stalled()

    def retire(self, key: int, now: float) -> None:
        """From here on neither side sends data on that path while another one works."""
        path = self._paths[key]
        path.cost = _RETIRED
        self._ping(path, now)
        self.progress += 1

    def path_down(self, key: int, now: float, why: str) -> None:
        """The connection is gone; what was in flight on it goes another way."""
        path = self._paths.pop(key, None)
        if path is None:
            return
        self._paths_lost = True
        self._requeue(path, path.unacked())
        self.why_no_path = f"{path.name}: {why}"
        if not self._paths:
            self._outage_since = now

    def _ping(self, path: PathFlow, now: float) -> None:
        flags = RESERVE if path.cost > self._spend else 0
        path.control.append(encode(Kind.PING, flags=flags, number=path.ping(now)))

    @property
    def spend(self) -> int:
        """The cost up to which paths carry data."""
        return self._spend

    def may_spend(self, cost: int, now: float) -> None:
        """From now on paths of up to this cost carry data; dearer ones only when no cheaper one works."""
        if cost != self._spend:
            self._spend = cost
            for path in self._paths.values():
                self._ping(path, now)
            self.progress += 1

    def held(self, path: PathFlow, now: float) -> bool:
        """`path` is in reserve now: it is too dear, and another one works that is not, or may be about to come up."""
        if not self._dear(path):
            return False
        if any(not self._dear(other) and not other.stalled for other in self._paths.values()):
            return True
        return now < self._waits_for_cheap and all(self._dear(other) for other in self._paths.values())

    def _dear(self, path: PathFlow) -> bool:
        return path.cost > self._spend or path.reserved

    def paths(self) -> Iterable[PathFlow]:
        """The paths that are up."""
        return self._paths.values()

    def path(self, key: int) -> PathFlow:
        """The path of that key; it must be up."""
        return self._paths[key]

    @property
    def up(self) -> bool:
        """There is a path."""
        return bool(self._paths)

    @property
    def outage_since(self) -> float | None:
        """Since when there has been no path; None while there is one."""
        return self._outage_since

    # -- frames in

    def heard(self, key: int, now: float) -> None:
        """Bytes came in on a path, if only part of a frame."""
        self._paths[key].heard = now

    def receive(self, key: int, frame: Frame, now: float) -> bool:
        """Take one frame; True if messages of its channel became ready. Raises Corrupt."""
        path = self._paths[key]
        path.heard = now
        kind, channel, flags, number, payload = frame
        if kind == _DATA:
            if path.received == path.acked_to_peer:
                path.owed, path.owed_since = 0, now
            path.received += 1
            path.owed += len(payload)
            if path.owed >= self.settings.ack_bytes:
                path.busy_at = now
            box = self._inbox[channel]
            completed = box.accept(number, flags, payload)
            self._grant(box)
            return completed
        if kind == Kind.ACK:
            for sent in path.on_ack(number, now):
                self._acknowledge(sent)
            self._maybe_part()
        elif kind == Kind.STATE:
            if len(payload) != _CREDIT.size:
                raise Corrupt(
                    f"a state frame of {len(payload)} bytes came from {self.peer}: check both sites' versions"
                )
            out = self._outbox[channel]
            before = out.unacked
            out.state(number, *_CREDIT.unpack(payload))
            self._unacked -= before - out.unacked
            self.progress += 1
            self._maybe_part()
        elif kind == Kind.PING:
            path.reserved = bool(flags & RESERVE)
            path.control.append(encode(Kind.PONG, number=number))
            if len(path.control) > 1000:
                raise Corrupt(f"{self.peer} floods {path.name} with pings: check what listens there")
        elif kind == Kind.PONG:
            path.on_pong(number, now)
        elif kind == Kind.BYE:
            self._on_bye(flags, payload)
        else:
            raise Corrupt(f"{self.peer} sent a frame of kind {kind} in the middle of a session: check both versions")
        return False

    def _acknowledge(self, frame: OutFrame) -> None:
        size = frame.size
        if self._outbox[frame.channel].acknowledge(frame):
            self._unacked -= size
            self.progress += 1

    def _on_bye(self, flags: int, payload: bytes) -> None:
        if self.state in (State.ENDED, State.FAILED):
            return
        if flags & ABORT:
            why = "".join(c if c.isprintable() else "?" for c in payload.decode("utf-8", "replace"))
            self.fail(PeerError(f"{self.peer} gave up the session: {why}"))
        elif not all(box.settled for box in self._outbox):
            # A peer that closes in good order has taken all it wants; what it did not take is lost.
            self.fail(
                PeerError(f"{self.peer} ended the session with {self._unacked} bytes from here not taken: see its log")
            )
        else:
            for path in self._paths.values():
                if self.state is not State.PARTING:
                    path.control.append(encode(Kind.BYE))
            self.state = State.ENDED
            self.progress += 1

    def _maybe_part(self) -> None:
        if self.state is State.DRAINING and all(box.settled for box in self._outbox):
            self.state = State.PARTING
            for path in self._paths.values():
                self._say_bye(path)

    def _say_bye(self, path: PathFlow) -> None:
        # What the peer sent may be acknowledged on another path, later than this goodbye or never: say it here too.
        if self._paths_lost or len(self._paths) > 1:
            path.control.extend(_state(box) for box in self._inbox if box.next)
        path.control.append(encode(Kind.BYE))

    def _grant(self, box: Inbox) -> bool:
        if not box.grant():
            return False
        # On every path: an update must not hang on one that has stalled unnoticed.
        for path in self._paths.values():
            path.control.append(_state(box))
        return True

    # -- frames out

    def output(self, key: int, now: float, room: int = _OUTPUT) -> list[bytes | memoryview]:
        """What to write to a path now, about `room` bytes at most; empty when there is nothing or no window."""
        path = self._paths[key]
        out: list[bytes | memoryview] = []
        if path.control:
            out.extend(path.control)
            path.control.clear()
        owes = path.acked_to_peer != path.received
        if not (path.stalled or self.state in (State.ENDED, State.FAILED) or self.held(path, now)):
            self._data(path, now, room, out)
        if owes and (out or self._ack_due(path) <= now):
            path.acked_to_peer = path.received
            # Ahead of data: it must not wait for those.
            out.insert(0, encode(Kind.ACK, number=path.received))
        return out

    def _ack_due(self, path: PathFlow) -> float:
        """When what has come on `path` is to be acknowledged, whether or not anything else goes there."""
        s = self.settings
        if self.state is not State.OPEN or path.owed >= s.ack_bytes:
            return path.owed_since
        return path.owed_since + (s.quiet_ack_s if path.owed_since > path.busy_at + s.quiet_after_s else s.ack_s)

    def _data(self, path: PathFlow, now: float, room: int, out: list[bytes | memoryview]) -> None:
        """Appends frames of data, about `room` bytes at most."""
        while room > 0:
            if not self._unsent and not self._ring and not self._again and not self._again_urgent:
                path.ran_dry()
                break
            frame = self._next(path, now)
            if frame is None:
                break
            out.append(HEADER.pack(_DATA, frame.channel, frame.flags, frame.size, frame.number))
            out.append(frame.payload)
            room -= frame.size
            path.on_sent(frame, now)

    def _next(self, path: PathFlow, now: float) -> OutFrame | None:
        """The frame that `path` should carry next."""
        if path.room(2) > 0 and self._sooner_here(path, now, 0):
            if (frame := self._pop_again(self._again_urgent, path)) is not None:
                return frame
            if (frame := self._cut(path, urgent=True)) is not None:
                return frame
        if path.room() <= 0 or not self._sooner_here(path, now, self._unsent + self._again_bytes):
            return None
        if (frame := self._pop_again(self._again, path)) is not None:
            return frame
        if (frame := self._cut(path, urgent=False)) is not None:
            return frame
        path.ran_dry()
        return None

    def _sooner_here(self, path: PathFlow, now: float, waiting: int) -> bool:
        """`path` delivers a frame before the best path would, behind the `waiting` bytes."""
        if len(self._paths) == 1:
            return True
        mine = path.eta(now)
        return all(
            mine <= other.eta(now, waiting)
            for other in self._paths.values()
            if other is not path and not other.stalled and not self.held(other, now)
        )

    def _pop_again(self, queue: deque[OutFrame], path: PathFlow) -> OutFrame | None:
        while queue:
            frame = queue.popleft()
            frame.waiting = False
            self._again_bytes -= frame.size
            if not frame.acked:
                path.resent_bytes += frame.size
                return frame
        return None

    def _cut(self, path: PathFlow, *, urgent: bool) -> OutFrame | None:
        ring = self._ring
        for _ in range(len(ring)):
            channel = ring[0]
            ring.rotate(-1)
            box = self._outbox[channel]
            if (urgent and not box.urgent) or not box.sendable():
                continue
            frame = box.cut(path.frame_limit)
            self._unsent -= frame.size
            self.progress += 1
            if box.idle:
                ring.pop()  # it was rotated to the end
            return frame
        return None

    def _requeue(self, path: PathFlow, frames: Iterable[OutFrame]) -> None:
        for frame in frames:
            if not frame.waiting:
                frame.waiting = True
                self._again_bytes += frame.size
                (self._again_urgent if frame.urgent else self._again).append(frame)

    def _requeue_stalled(self) -> None:
        """Give what hangs on stalled paths to the others, once there are others."""
        if all(path.stalled for path in self._paths.values()):
            return
        for path in self._paths.values():
            if path.stalled and not path.requeued:
                path.requeued = True
                self._requeue(path, path.unacked())

    # -- time

    def tick(self, now: float) -> list[PathDead]:
        """Look at the clock: pings, stalls, dead connections (returned), the end of patience (`fail`)."""
        gap = now - self._ticked
        self._ticked = now
        if gap > 2 * self.settings.ping_s:
            # It was this process that slept, not the peer.
            for path in self._paths.values():
                path.heard += gap
                path.progress += gap
        dead: list[PathDead] = []
        for path in self._paths.values():
            silent = now - path.heard
            if silent >= path.dead_after():
                dead.append(PathDead(path.key, f"nothing heard for {silent:.1f} s"))
            elif path.in_flight and not path.stalled and now - path.progress >= path.stall_after():
                path.stalled = True
            if now >= path.ping_due():
                self._ping(path, now)
        self._requeue_stalled()
        since = self._outage_since
        if since is not None and now - since >= self.settings.outage_limit_s:
            self.fail(
                PeerError(
                    f"no path to {self.peer} for {now - since:.0f} s (last: {self.why_no_path}): "
                    "check the links and the agent there, then start the handoff again"
                )
            )
        return dead

    def deadline(self, now: float) -> float:
        """When `tick` is next needed."""
        due = now + self.settings.ping_s
        for path in self._paths.values():
            due = min(due, path.ping_due(), path.heard + path.dead_after())
            if path.in_flight and not path.stalled:
                due = min(due, path.progress + path.stall_after())
            if path.acked_to_peer != path.received:
                due = min(due, self._ack_due(path))
        if self._unsent or self._again_bytes:
            for path in self._paths.values():
                if path.waits_for_tcp:
                    # TCP does not say when it has room; often enough to stay ahead of it.
                    due = min(due, now + min(max(path.window / (path.rate.peak or 1e6) / 16, 0.001), 0.010))
        if len(self._paths) > 1 and (self._unsent or self._again_bytes):
            due = min(due, now + 0.05)  # which path is sooner changes with time alone
        if self._outage_since is not None:
            due = min(due, self._outage_since + self.settings.outage_limit_s)
        return due


def _state(box: Inbox) -> bytes:
    return encode(Kind.STATE, box.channel, number=box.next, payload=_CREDIT.pack(box.granted))


def _channel(channel: int) -> int:
    if not 0 <= channel < CHANNELS:
        raise UsageError(f"there is no channel {channel}: use 0 to {CHANNELS - 1}")
    return channel
