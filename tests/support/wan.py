"""An in-memory WAN under a virtual clock, between two SessionCores: rate, delay, outages, lost connections.

Each link carries one connection at a time and behaves like TCP over it: bytes stay in order; while the link is down
they wait and come late; when the connection is cut, what was under way is gone and each end learns of it in its own
time. End `a` dials, as a connector does. Nothing here sleeps: `run` jumps from event to event.

    wan = Wan([Link(rate=1.25e6, delay=0.025)])
    wan.a.send(1, b"hello")
    assert wan.run(lambda: wan.b.got == [(1, b"hello")], limit_s=5)
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from haulier.session.core import SessionCore, State
from haulier.session.frames import CHANNELS, FrameReader
from haulier.session.settings import Settings

PIECE = 1448
QUEUE = 4 << 20
"""What kernel and network take beyond what has crossed the link: deep buffers, which the session must not fill."""


@dataclass(eq=False)
class Link:
    """`rate` in bytes/s and `delay` one way in s, both directions alike; may be changed while the WAN runs."""

    rate: float = 1e8
    delay: float = 0.005
    up: bool = True
    jitter: float = 0.0
    """Each piece comes up to twice this later (s); none overtakes another."""
    loss: float = 0.0
    """Chance that a piece is lost and comes one round trip later, with all behind it."""
    cost: int = 0
    """As the operator of end `a` says."""


class Pipe:
    """One direction of one connection."""

    def __init__(self, wan: Wan, link: Link, deliver: Callable[[bytes], None], wants_more: Callable[[], None]) -> None:
        self._wan, self._link = wan, link
        self._deliver, self._wants_more = deliver, wants_more
        self._unsent: deque[bytes] = deque()
        self.backlog = 0
        self.unacked = 0
        """What TCP would say that it has in flight ..."""
        self.srtt = 0.0
        """... and its smoothed round trip; 0 until known."""
        self._entered: deque[tuple[int, float]] = deque()
        self._sending = False
        self._late = 0.0
        self.alive = True
        self.held: list[bytes] = []

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            self._unsent.append(data[start : start + PIECE])
        self.backlog += len(data)
        self.unacked += len(data)
        self._entered.append((len(data), self._wan.now))
        self._send()

    def _send(self) -> None:
        if self._sending or not self._unsent or not self.alive:
            return
        if not self._link.up:
            return
        self._sending = True
        # Fast links in bigger steps, for the simulation's sake.
        piece = self._unsent.popleft()
        while self._unsent and len(piece) < self._link.rate * 0.0005:
            piece += self._unsent.popleft()
        self._wan.after(len(piece) / self._link.rate, lambda: self._sent(piece))

    def _sent(self, piece: bytes) -> None:
        self._sending = False
        self.backlog -= len(piece)
        arrival = self._wan.now + self._link.delay + 2 * self._link.jitter * self._wan.random.random()
        if self._wan.random.random() < self._link.loss:
            arrival += 2 * self._link.delay + 0.001
        self._late = max(self._late, arrival)  # TCP delivers in order
        self._wan.at(self._late, lambda: self._arrived(piece))
        self._send()
        self._wants_more()

    def _arrived(self, piece: bytes) -> None:
        if not self.alive:
            return
        if not self._link.up or self.held:
            self.held.append(piece)
            return
        self._take(piece)

    def _take(self, piece: bytes) -> None:
        self._wan.after(self._link.delay, lambda: self._acked(len(piece)))
        self._deliver(piece)

    def _acked(self, count: int) -> None:
        self.unacked -= count
        while self._entered and count >= self._entered[0][0]:
            size, at = self._entered.popleft()
            count -= size
            rtt = self._wan.now - at
            self.srtt = self.srtt + (rtt - self.srtt) / 8 if self.srtt else rtt
        if self._entered and count:
            self._entered[0] = self._entered[0][0] - count, self._entered[0][1]

    def resume(self) -> None:
        """The link is up again: TCP repeats what was lost meanwhile."""
        held, self.held = self.held, []
        for piece in held:
            if self.alive:
                self._take(piece)
        self._send()


@dataclass(eq=False)
class End:
    """A core, its application, and its side of each connection."""

    wan: Wan
    core: SessionCore
    sleepy: float = 0.0
    """The process gets the processor up to this many seconds after it was woken."""
    got: list[tuple[int, bytes]] = field(default_factory=list)
    got_at: list[float] = field(default_factory=list)
    blocked: set[int] = field(default_factory=set)
    """Channels whose callback does not return for now."""
    pipes: dict[int, Pipe] = field(default_factory=dict)
    readers: dict[int, FrameReader] = field(default_factory=dict)
    queue: deque[tuple[int, bytes, bool]] = field(default_factory=deque)
    tick_at: float = -1.0
    _inbound: list[tuple[int, bytes]] = field(default_factory=list)

    def send(self, channel: int, payload: bytes, urgent: bool = False) -> None:
        """Like Session.send, which waits for room: what does not fit waits here, in order."""
        self.queue.append((channel, payload, urgent))
        self.wan.poke()

    def work(self) -> None:
        now, core = self.wan.now, self.core
        for path in core.tick(now):
            self.wan.lost(self, path.key, path.why)
        full = set()
        for _ in range(len(self.queue)):
            channel, payload, urgent = self.queue.popleft()
            if channel in full or not core.room(channel) or core.state is not State.OPEN:
                full.add(channel)
                self.queue.append((channel, payload, urgent))
            else:
                core.send(channel, payload, urgent)
        for channel in range(CHANNELS):
            while channel not in self.blocked and (item := core.pop(channel)):
                self.got.append((channel, item[0]))
                self.got_at.append(now)
                core.consumed(channel, item[1])
        for key, pipe in list(self.pipes.items()):
            self.pump(key, pipe)
        due = max(core.deadline(now), now + 1e-4)
        if self.tick_at <= now or due < self.tick_at:
            self.tick_at = due
            self.wan.at(due, self.wan.poke)

    def pump(self, key: int, pipe: Pipe) -> None:
        if self.wan.tells_tcp:
            self.core.path(key).on_tcp(pipe.unacked, pipe.srtt, self.wan.now)
        while pipe.backlog < QUEUE and (out := self.core.output(key, self.wan.now, 16 * 1024)):
            pipe.write(b"".join(out))

    def receive(self, key: int, data: bytes) -> None:
        if not self.sleepy:
            self._take(key, data)
            return
        self._inbound.append((key, data))
        if len(self._inbound) == 1:
            self.wan.after(self.sleepy * self.wan.random.random(), self._wake_up)

    def _wake_up(self) -> None:
        inbound, self._inbound = self._inbound, []
        for key, data in inbound:
            if key in self.pipes:
                self._take(key, data)

    def _take(self, key: int, data: bytes) -> None:
        self.core.heard(key, self.wan.now)
        for frame in self.readers[key].feed(data):
            self.core.receive(key, frame, self.wan.now)
        self.wan.poke()


class Wan:
    """Two ends, `a` and `b`, and the links between them."""

    def __init__(
        self, links: Sequence[Link], settings: Settings | None = None, seed: int = 0, *, tells_tcp: bool = False
    ) -> None:
        self.tells_tcp = tells_tcp
        """The cores are told what TCP has in flight, as the transport does on Linux."""
        self.now = 1000.0
        self.random = random.Random(seed)
        self.links = list(links)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._poked = False
        settings = settings or Settings()
        self.a = End(self, SessionCore(settings, "site b", self.now))
        self.b = End(self, SessionCore(settings, "site a", self.now))
        for key in range(len(self.links)):
            self._dial(key)

    # -- time

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._count), do))

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self.at(self.now + seconds, do)

    def poke(self) -> None:
        if not self._poked:
            self._poked = True
            self.at(self.now, self._work)

    def _work(self) -> None:
        self._poked = False
        self.a.work()
        self.b.work()

    def run(self, until: Callable[[], bool] = lambda: False, limit_s: float = 60.0) -> bool:
        """Run until the condition holds (True) or `limit_s` virtual seconds have passed (False)."""
        end = self.now + limit_s
        self.poke()
        while not until():
            if not self._events or self._events[0][0] > end:
                self.now = end
                return until()
            self.now, _, do = heapq.heappop(self._events)
            do()
        return True

    # -- faults

    def set_up(self, key: int, up: bool) -> None:
        """Take a link down, or up again."""
        link = self.links[key]
        if link.up == up:
            return
        link.up = up
        if up:
            for end in (self.a, self.b):
                if key in end.pipes:
                    self.after(link.delay, end.pipes[key].resume)

    def cut(self, key: int, *, seen_by_a: float = 0.0, seen_by_b: float = 0.0) -> None:
        """The connection breaks; what is under way is lost. Each end sees it so many seconds later."""
        for end, later in ((self.a, seen_by_a), (self.b, seen_by_b)):
            pipe = end.pipes.get(key)
            if pipe is not None:
                pipe.alive = False
                self.after(later, lambda end=end, pipe=pipe: self._gone(end, key, pipe, "reset"))

    def lost(self, end: End, key: int, why: str) -> None:
        """An end gives up its connection; the other sees it if the link is up."""
        other = self.b if end is self.a else self.a
        theirs, ours = other.pipes.get(key), end.pipes[key]
        ours.alive = False
        self._gone(end, key, ours, why)
        if theirs is not None and self.links[key].up:
            self.after(self.links[key].delay, lambda: self._gone(other, key, theirs, "closed"))

    def _gone(self, end: End, key: int, pipe: Pipe, why: str) -> None:
        if end.pipes.get(key) is not pipe:
            return
        pipe.alive = False
        del end.pipes[key]
        end.core.path_down(key, self.now, why)
        if end is self.a:
            self.after(0.2, lambda: self._dial(key))
        self.poke()

    def _dial(self, key: int) -> None:
        link = self.links[key]
        over = (State.ENDED, State.FAILED)
        if self.a.core.state in over or self.b.core.state in over:
            # Nobody is there any more: who has said goodbye is content with that (it is refused, or stops lingering).
            for end in (self.a, self.b):
                if end.core.state is State.PARTING:
                    end.core.end()
            return
        if not link.up:
            self.after(1.0, lambda: self._dial(key))
            return
        rtt = 2 * link.delay
        self.after(rtt, lambda: self._join(self.b, key, rtt))
        self.after(rtt + link.delay, lambda: self._join(self.a, key, rtt))

    def _join(self, end: End, key: int, rtt: float) -> None:
        other = self.b if end is self.a else self.a
        if key in end.pipes:
            end.pipes[key].alive = False  # the listener had not noticed that the old one is dead
        elif end is self.a and key not in self.b.pipes:
            self.after(0.2, lambda: self._dial(key))  # broken between the two: dial again
            return
        generation = Pipe(
            self, self.links[key], lambda data: self._carry(other, key, generation, data), lambda: self._more(end, key)
        )
        end.pipes[key] = generation
        end.readers[key] = FrameReader()
        end.core.path_up(key, f"path {key}", self.now, rtt, self.links[key].cost if end is self.a else 0)
        self.poke()

    def _carry(self, to: End, key: int, pipe: Pipe, data: bytes) -> None:
        if key in to.pipes and pipe.alive:
            to.receive(key, data)

    def _more(self, end: End, key: int) -> None:
        pipe = end.pipes.get(key)
        if pipe is not None and pipe.backlog < QUEUE:
            end.pump(key, pipe)
