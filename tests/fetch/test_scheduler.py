"""The scheduler against simulated links: no clock but the simulation's own."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.fetch.scheduler import Ask, Hurry, Inquire, Probe, Scheduler, Urgency

WIRE = 30_000


def fp(number: int) -> bytes:
    return number.to_bytes(32, "little")


@dataclass
class Link:
    """A source behind a link: rate in bytes a second, one round trip, what it holds."""

    rate: float
    rtt: float
    holds: set[bytes]
    tells: bool = True
    cost: float = 0.0
    up: bool = True
    silent: bool = False
    lies: bool = False
    free_at: float = 0.0
    queue: list[bytes] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)


class World:
    """Links, a scheduler and a simulated clock."""

    def __init__(self, links: dict[str, Link]) -> None:
        self.links = links
        self.now = 0.0
        self.scheduler = Scheduler()
        self.events: list[tuple[float, int, str, object]] = []
        self.count = itertools.count()
        self.came: dict[bytes, float] = {}
        self.by: dict[bytes, str] = {}
        for name, link in links.items():
            self.scheduler.add_source(name, cost=link.cost, tells=link.tells)
            self.scheduler.up(name, 0.0, link.rtt)

    def at(self, when: float, what: str, value: object) -> None:
        heapq.heappush(self.events, (when, next(self.count), what, value))

    def _start(self, name: str) -> None:
        """The source sends what is queued, one after the other."""
        link = self.links[name]
        while link.queue and link.free_at <= self.now + 1e-9:
            chunk = link.queue.pop(0)
            link.free_at = self.now + WIRE / link.rate
            self.at(link.free_at, "sent", name)
            kind = "data" if chunk in link.holds else "absent"
            self.at(link.free_at + link.rtt / 2, kind, (name, chunk))

    def _poll(self) -> None:
        for request in self.scheduler.poll(self.now):
            link = self.links[request.source]
            if not link.up or link.silent:
                continue
            if isinstance(request, Ask):
                link.asked += request.fingerprints
                self.at(self.now + link.rtt / 2, "ask", (request.source, request.fingerprints, request.urgent))
            elif isinstance(request, Hurry):
                self.at(self.now + link.rtt / 2, "hurry", (request.source, request.fingerprints))
            elif isinstance(request, Inquire):
                self.at(self.now + link.rtt, "holdings", (request.source, request.fingerprints))
            elif isinstance(request, Probe):
                self.at(self.now + link.rtt, "pong", request.source)

    def step(self, what: str, value: object) -> None:
        scheduler = self.scheduler
        if what == "sent":
            self._start(str(value))
        elif what == "pong":
            scheduler.pong(str(value), self.now, self.links[str(value)].rtt)
        elif isinstance(value, tuple):
            name, rest = value[0], value[1]
            link = self.links[name]
            if not link.up or (link.silent and what != "call"):
                return
            if what == "ask":
                link.queue[:] = [*rest, *link.queue] if value[2] else [*link.queue, *rest]
                self._start(name)
            elif what == "hurry":
                for chunk in rest:
                    if chunk in link.queue:
                        link.queue.remove(chunk)
                        link.queue.insert(0, chunk)
            elif what == "holdings":
                held = [chunk for chunk in rest if chunk in link.holds]
                scheduler.holdings(name, held, [chunk for chunk in rest if chunk not in link.holds], self.now)
            elif what == "absent":
                scheduler.absent(name, [rest], self.now)
            elif what == "data" and link.lies:
                scheduler.lied(name, self.now)
            elif what == "data" and scheduler.arrived(name, rest, WIRE, self.now):
                self.came[rest] = self.now
                self.by[rest] = name
        elif callable(value):
            value()

    def run(self, until: float = 600.0, stop: int | None = None) -> float:
        """Until all that is wanted has come (or `stop` chunks), `until` seconds at most; the time."""
        tick = self.now
        while self.scheduler.wanted and self.now < until and (stop is None or len(self.came) < stop):
            if self.events and self.events[0][0] <= tick:
                self.now, _, what, value = heapq.heappop(self.events)
                self.step(what, value)
            else:
                self.now = tick
                tick += 0.05
            self._poll()
        return self.now

    def want(self, count: int, urgency: Urgency = Urgency.BULK, first: int = 0) -> None:
        self.scheduler.want([fp(n) for n in range(first, first + count)], urgency, self.now)

    def share(self, name: str) -> int:
        return sum(1 for source in self.by.values() if source == name)


ALL = {fp(n) for n in range(5000)}


def three(*settings: tuple[float, float]) -> World:
    return World({str(n): Link(mbps * 125_000, rtt, set(ALL)) for n, (mbps, rtt) in enumerate(settings)})


@pytest.mark.parametrize(
    ("settings", "least"),
    [(((40, 0.02), (40, 0.05), (40, 0.08)), 0.93), (((60, 0.02), (30, 0.05), (10, 0.15)), 0.93), (((20, 0.2),), 0.9)],
)
def test_sources_together_give_the_sum_of_their_links(settings: tuple[tuple[float, float], ...], least: float) -> None:
    world = three(*settings)
    count = 3000
    world.want(count)
    total = sum(mbps for mbps, _ in settings) * 125_000
    took = world.run()
    assert len(world.came) == count
    assert count * WIRE / took >= least * total
    assert sum(source.wasted for source in world.scheduler.sources()) <= 20


def test_the_window_is_about_one_and_a_half_bandwidth_delay_products() -> None:
    world = three((40, 0.08))
    world.want(4000)
    world.run(until=5)
    (source,) = world.scheduler._sources.values()
    product = 5_000_000 * 0.08
    assert 1.2 * product <= source.rate.window <= 1.9 * product + 2 * WIRE


def test_a_source_that_dies_is_replaced() -> None:
    world = three((40, 0.02), (40, 0.05), (40, 0.08))
    world.want(3000)

    def die() -> None:
        world.links["1"].up = False
        world.scheduler.lost("1", world.now)

    world.at(2.0, "call", die)
    took = world.run()
    assert len(world.came) == 3000
    assert took <= 2 + (3000 * WIRE - 2 * 15e6 * 0.9) / 10e6 * 1.08


def test_one_that_falls_silent_is_passed_over_and_taken_back() -> None:
    world = three((40, 0.02), (40, 0.05))
    world.want(3000)

    def silence() -> None:
        world.links["1"].silent = True

    def speak() -> None:
        world.links["1"].silent = False
        world.links["1"].queue.clear()

    world.at(1.0, "call", silence)
    world.at(6.0, "call", speak)
    world.run(until=5.5)
    before = world.share("1")
    assert world.share("0") > 0
    took = world.run()
    assert len(world.came) == 3000
    assert world.share("1") > before
    assert took < 3000 * WIRE / 5e6


def test_a_liar_is_never_asked_again() -> None:
    world = three((40, 0.02), (40, 0.02))
    world.links["1"].lies = True
    world.want(500)
    world.run()
    assert len(world.came) == 500
    assert set(world.by.values()) == {"0"}
    asked = len(world.links["1"].asked)
    world.want(500, first=500)
    world.run()
    assert len(world.links["1"].asked) == asked
    assert [source.dropped for source in world.scheduler.sources()] == [False, True]


def test_demand_overtakes_bulk() -> None:
    world = three((10, 0.05))
    world.want(2000)
    world.run(until=3)
    world.want(1, Urgency.DEMAND, first=4000)
    world.want(1, Urgency.DEMAND, first=1999)
    world.run(until=4)
    # A round trip, what the link holds already, and the two themselves; the window alone would be 90 kB more.
    for number in (4000, 1999):
        assert world.came[fp(number)] <= 3.05 + 0.05 + 0.05 + 6 * WIRE / 1.25e6


def test_what_was_asked_for_before_is_hurried() -> None:
    world = three((2, 0.05))
    world.want(100)
    world.run(until=2)
    (source,) = world.scheduler._sources.values()
    queued = list(source.out)[-1]
    world.scheduler.want([queued], Urgency.DEMAND, world.now)
    assert Hurry("0", (queued,)) in world.scheduler.poll(world.now)
    assert not any(isinstance(request, Hurry) for request in world.scheduler.poll(world.now))


def test_a_have_not_corrects_a_hint() -> None:
    world = three((40, 0.02), (40, 0.05))
    world.links["0"].holds = set()
    world.scheduler.hint("0", [fp(n) for n in range(200)])
    world.want(200)
    world.run()
    assert len(world.came) == 200
    assert set(world.by.values()) == {"1"}


def test_one_that_costs_is_asked_only_for_what_no_other_holds() -> None:
    half = {fp(n) for n in range(1000)}
    world = World({"site": Link(5e6, 0.05, half), "s3": Link(50e6, 0.02, set(ALL), tells=False, cost=1)})
    world.run(until=0.5)
    world.want(2000)
    world.run()
    assert len(world.came) == 2000
    # At the very beginning nobody knows what the site holds.
    assert world.share("site") >= 800
    assert {world.by[fp(n)] for n in range(1000, 2000)} == {"s3"}


def test_a_late_tail_is_asked_for_twice() -> None:
    world = three((40, 0.02), (40, 0.02))
    world.want(300)

    def slow() -> None:
        world.links["1"].rate = 10_000

    world.at(0.3, "call", slow)
    assert world.run() < 4
    assert len(world.came) == 300


def test_what_nobody_held_comes_when_somebody_does() -> None:
    world = three((40, 0.02))
    world.links["0"].holds = set()
    world.want(10)
    world.run(until=3)
    assert len(world.scheduler.stuck()) == 10
    world.links["0"].holds = set(ALL)
    world.run(until=30)
    assert len(world.came) == 10


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 5))
def test_whatever_happens_everything_that_somebody_holds_comes(seed: int, count: int) -> None:
    chosen = random.Random(seed)
    links = {
        str(n): Link(
            chosen.uniform(1e5, 1e7),
            chosen.uniform(0.001, 0.3),
            {fp(i) for i in range(300) if chosen.random() < 0.6},
            tells=chosen.random() < 0.7,
            cost=chosen.choice([0, 0, 1]),
        )
        for n in range(count)
    }
    links["0"].lies = count > 1 and chosen.random() < 0.3
    steady = Link(1e6, 0.05, {fp(i) for i in range(300)})
    world = World({**links, "steady": steady})
    for number in range(300):
        world.scheduler.want([fp(number)], chosen.choice(list(Urgency)), 0.0)

    def flip(name: str) -> None:
        link = links[name]
        link.up = not link.up
        link.queue.clear()
        if link.up:
            world.scheduler.up(name, world.now, link.rtt)
        else:
            world.scheduler.lost(name, world.now)

    for name in links:
        for _ in range(chosen.randrange(4)):
            world.at(chosen.uniform(0, 8), "call", lambda name=name: flip(name))
    world.run(until=120)
    assert len(world.came) == 300
    assert all(world.by[chunk] == "steady" or chunk in links[world.by[chunk]].holds for chunk in world.came)
