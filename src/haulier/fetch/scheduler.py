"""Which source is asked for which chunk, and when. Pure: events in, requests out, the clock passed in.

Events are the methods up, lost, pong, holdings, absent, arrived and lied; `poll` gives the requests that follow from
them. Rules:

- A chunk is asked of a source that is known to hold it; of one that may (it cannot be asked, or has not answered yet)
  where nobody is known to, or at once when a guest waits for it. A hint of somebody else counts as knowing; a "have
  not" corrects it.
- Each source has at most a window of bytes outstanding (rates.py), and as many wanted chunks go to it as it has room
  for: faster sources empty the list faster. While a guest's demand is under way the rest keeps to a fraction.
- A source that costs something is asked only for what no cheaper one that answers holds.
- Demand goes first: to the source from which it should arrive soonest, beyond the window, and ahead of what was asked.
- What is late, and the tail of a transfer when somebody has nothing else to do, is asked of a second source.
- A source that gives nothing for long is passed over; what it owed is asked elsewhere. One that gave wrong bytes is
  never asked again.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from haulier.fetch.rates import Rate

INQUIRY: Final = 1024
"""Fingerprints in one question "which of these have you"."""
INQUIRIES: Final = 2
AGAIN_S: Final = 5.0
"""After so long sources are asked again whether they hold by now what nobody held."""
PROBE_S: Final = 1.0
STALL_S: Final = 2.0
TWICE: Final = 2
"""One chunk is asked of at most so many sources at a time."""
BATCH: Final = 64
EASE: Final = 0.25
"""Share of the window that others keep while a guest waits."""
SCAN: Final = 64
LOOK_S: Final = 0.02
"""How often it is looked for what is late."""


class Urgency(enum.IntEnum):
    """Why a chunk is wanted: a guest waits for it; it will probably be wanted next; it is missing."""

    DEMAND = 0
    SOON = 1
    BULK = 2


@dataclass(frozen=True)
class Ask:
    """Ask `source` for these chunks."""

    source: str
    fingerprints: tuple[bytes, ...]
    urgent: bool = False


@dataclass(frozen=True)
class Hurry:
    """Chunks asked of `source` before are urgent now."""

    source: str
    fingerprints: tuple[bytes, ...]


@dataclass(frozen=True)
class Inquire:
    """Ask `source` which of these it holds."""

    source: str
    fingerprints: tuple[bytes, ...]


@dataclass(frozen=True)
class Probe:
    """Measure the round trip to `source`."""

    source: str


Request = Ask | Hurry | Inquire | Probe


@dataclass
class _Want:
    urgency: Urgency
    number: int
    since: float
    at: dict[str, float] = field(default_factory=dict)
    """Sources that were asked, and when."""
    hurried: bool = False


@dataclass(eq=False)
class _Source:
    name: str
    cost: float
    tells: bool
    rate: Rate = field(default_factory=Rate)
    up: bool = False
    dropped: bool = False
    has: set[bytes] = field(default_factory=set)
    lacks: dict[bytes, float] = field(default_factory=dict)
    out: dict[bytes, tuple[float, float, bool]] = field(default_factory=dict)
    """Outstanding: fingerprint -> (asked at, expected at, urgent)."""
    queues: list[list[tuple[int, bytes]]] = field(default_factory=lambda: [[], [], []])
    """Wanted chunks that it (probably) holds, by urgency, as heaps in the order of wanting."""
    unasked: deque[bytes] = field(default_factory=deque)
    inquiries: int = 0
    heard: float = 0.0
    probed: float = 0.0
    stalled: bool = False
    lies: int = 0
    chunks: int = 0
    wasted: int = 0

    @property
    def usable(self) -> bool:
        return self.up and not self.dropped and not self.stalled

    def outstanding(self) -> float:
        return len(self.out) * self.rate.chunk_bytes

    def wait_for_one(self, ahead: float) -> float:
        """Seconds until a chunk asked now is here, with `ahead` bytes before it."""
        bps = self.rate.bps or 1e6
        return self.rate.rtt + (ahead + self.rate.chunk_bytes) / bps


@dataclass(frozen=True)
class SourceFacts:
    """What a source did so far. `bps` is bytes a second, `rtt` seconds."""

    name: str
    up: bool
    dropped: bool
    bps: float
    rtt: float
    chunks: int
    bytes: int
    wasted: int
    """Chunks that another source had brought already."""


class Scheduler:
    """See the module. Not for several threads at once."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self._wants: dict[bytes, _Want] = {}
        self._demands: set[bytes] = set()
        self._numbers = itertools.count()
        self._again = 0.0
        self._looked = float("-inf")
        self._hurries: list[Hurry] = []
        self.eased_until = 0.0
        """Until then only demand uses whole windows."""

    # -- sources

    def add_source(self, name: str, *, cost: float = 0.0, tells: bool = True, hint: Iterable[bytes] = ()) -> None:
        """A source that may come up. `tells`: it can be asked what it holds. `hint`: what it is said to hold."""
        if name in self._sources:
            self.hint(name, hint)
            return
        found = self._sources[name] = _Source(name, cost, tells)
        found.has.update(hint)
        for fp, want in sorted(self._wants.items(), key=lambda item: item[1].number):
            self._offer(found, fp, want)

    def remove_source(self, name: str, now: float) -> None:
        """It is no source any more."""
        if name in self._sources:
            self.lost(name, now)
            del self._sources[name]

    def hint(self, name: str, fingerprints: Iterable[bytes]) -> None:
        """Somebody says that `name` holds these."""
        source = self._sources[name]
        for fp in fingerprints:
            self._holds(source, fp)

    def sources(self) -> list[SourceFacts]:
        return [
            SourceFacts(s.name, s.up, s.dropped, s.rate.bps, s.rate.rtt, s.chunks, s.rate.arrived, s.wasted)
            for s in self._sources.values()
        ]

    # -- wants

    @property
    def wanted(self) -> int:
        """Chunks that have not come yet."""
        return len(self._wants)

    def is_wanted(self, fp: bytes) -> bool:
        return fp in self._wants

    def want(self, fingerprints: Iterable[bytes], urgency: Urgency, now: float) -> None:
        """Have these fetched. One that is wanted already may only become more urgent."""
        for fp in fingerprints:
            want = self._wants.get(fp)
            if want is None:
                want = self._wants[fp] = _Want(urgency, next(self._numbers), now)
            elif urgency < want.urgency:
                want.urgency = urgency
            else:
                continue
            if urgency is Urgency.DEMAND:
                self._demands.add(fp)
            for source in self._sources.values():
                self._offer(source, fp, want)

    def forget(self, fingerprints: Iterable[bytes]) -> None:
        """These need not come any more."""
        for fp in fingerprints:
            self._wants.pop(fp, None)
            self._demands.discard(fp)

    def forget_background(self) -> None:
        """Nothing need come any more but what somebody waits for."""
        self.forget([fp for fp, want in self._wants.items() if want.urgency is not Urgency.DEMAND])

    def stuck(self) -> list[bytes]:
        """Wanted chunks that nobody who answers is known to hold or asked for."""
        return [fp for fp, want in self._wants.items() if not want.at and not self._live_holders(fp)]

    # -- events

    def up(self, name: str, now: float, rtt: float) -> None:
        """Connected; a small question was answered after `rtt` seconds."""
        source = self._sources[name]
        if source.dropped:
            return
        source.up, source.stalled, source.heard, source.probed = True, False, now, now
        source.rate.pong(now, rtt)
        source.inquiries = 0
        source.lacks.clear()
        source.unasked.clear()
        for fp, want in sorted(self._wants.items(), key=lambda item: item[1].number):
            self._offer(source, fp, want)

    def lost(self, name: str, now: float) -> None:
        """The connection is gone; what was asked of it is asked of others."""
        source = self._sources[name]
        source.up = False
        source.rate.idle()
        owed, source.out = list(source.out), {}
        for fp in owed:
            self._release(source, fp)

    def pong(self, name: str, now: float, rtt: float) -> None:
        source = self._sources[name]
        source.rate.pong(now, rtt)
        self._alive(source, now)

    def holdings(self, name: str, held: Iterable[bytes], not_held: Iterable[bytes], now: float) -> None:
        """An inquiry was answered."""
        source = self._sources[name]
        source.inquiries = max(0, source.inquiries - 1)
        self._alive(source, now)
        for fp in held:
            self._holds(source, fp)
        for fp in not_held:
            source.has.discard(fp)
            source.lacks[fp] = now

    def absent(self, name: str, fingerprints: Iterable[bytes], now: float) -> None:
        """It has not got what it was asked for, whatever was said before."""
        source = self._sources[name]
        self._alive(source, now)
        for fp in fingerprints:
            source.has.discard(fp)
            source.lacks[fp] = now
            if source.out.pop(fp, None) is not None:
                self._release(source, fp)
        self._idle(source)

    def arrived(self, name: str, fp: bytes, wire_bytes: int, now: float) -> bool:
        """A chunk came and is what it says. False if nobody waits for it (any more)."""
        source = self._sources[name]
        source.out.pop(fp, None)
        source.has.add(fp)
        source.rate.came(now, wire_bytes)
        self._alive(source, now)
        self._idle(source)
        source.chunks += 1
        want = self._wants.pop(fp, None)
        self._demands.discard(fp)
        if want is None:
            source.wasted += 1
            return False
        return True

    def lied(self, name: str, now: float) -> None:
        """It gave bytes that do not match their fingerprint: never asked again."""
        source = self._sources[name]
        source.lies += 1
        source.dropped = True
        self.lost(name, now)
        source.has.clear()

    # -- requests

    def poll(self, now: float) -> list[Request]:
        """What to send now."""
        found: list[Request] = list(self._hurries)
        self._hurries = []
        for source in self._sources.values():
            self._watch(source, now)
        found += self._probes(now)
        found += self._inquiries(now)
        asks: dict[tuple[str, bool], list[bytes]] = {}
        for fp in list(self._demands):
            self._ask_demand(fp, now, asks, found)
        for urgency in (Urgency.SOON, Urgency.BULK):
            for source in sorted(self._sources.values(), key=lambda s: (s.cost, s.wait_for_one(s.outstanding()))):
                self._fill(source, urgency, now, asks)
        self._ask_twice(now, asks)
        for (name, urgent), fps in asks.items():
            found += [Ask(name, tuple(fps[at : at + BATCH]), urgent) for at in range(0, len(fps), BATCH)]
        return found

    # -- inside

    def _offer(self, source: _Source, fp: bytes, want: _Want) -> None:
        """Put a want where `source` will see it."""
        if source.dropped or fp in source.lacks:
            return
        if fp in source.has or not source.tells:
            heapq.heappush(source.queues[want.urgency], (want.number, fp))
        else:
            source.unasked.append(fp)

    def _holds(self, source: _Source, fp: bytes) -> None:
        source.lacks.pop(fp, None)
        if fp in source.has:
            return
        source.has.add(fp)
        want = self._wants.get(fp)
        if want is not None:
            self._offer(source, fp, want)

    def _live_holders(self, fp: bytes) -> list[_Source]:
        return [s for s in self._sources.values() if s.usable and (fp in s.has or (not s.tells and fp not in s.lacks))]

    def _release(self, source: _Source, fp: bytes) -> None:
        """`source` will not bring it: others may be asked."""
        want = self._wants.get(fp)
        if want is None:
            return
        want.at.pop(source.name, None)
        want.hurried = False
        for other in self._sources.values():
            if other is not source and fp not in other.out:
                self._offer(other, fp, want)

    def _alive(self, source: _Source, now: float) -> None:
        source.heard = now
        if source.stalled:
            source.stalled = False
            for fp, want in self._wants.items():
                if not want.at:
                    self._offer(source, fp, want)

    def _idle(self, source: _Source) -> None:
        if not source.out:
            source.rate.idle()

    def _watch(self, source: _Source, now: float) -> None:
        """Pass over one that owes something and gives nothing."""
        if not source.usable or not source.out:
            return
        oldest = next(iter(source.out.values()))
        quiet = now - max(source.heard, oldest[0])
        if quiet < max(STALL_S, 6 * source.rate.rtt, 3 * (oldest[1] - oldest[0])):
            return
        source.stalled = True
        source.rate.idle()
        owed, source.out = list(source.out), {}
        for fp in owed:
            self._release(source, fp)

    def _probes(self, now: float) -> list[Request]:
        found: list[Request] = []
        for source in self._sources.values():
            if source.up and not source.dropped and now - source.probed > PROBE_S and (source.out or source.stalled):
                source.probed = now
                found.append(Probe(source.name))
        return found

    def _inquiries(self, now: float) -> list[Request]:
        if now - self._again > AGAIN_S:
            self._again = now
            self._ask_again(now)
        found: list[Request] = []
        for source in self._sources.values():
            while source.usable and source.tells and source.unasked and source.inquiries < INQUIRIES:
                batch: list[bytes] = []
                seen = set()
                while source.unasked and len(batch) < INQUIRY:
                    fp = source.unasked.popleft()
                    if fp in self._wants and fp not in source.has and fp not in source.lacks and fp not in seen:
                        seen.add(fp)
                        batch.append(fp)
                if batch:
                    source.inquiries += 1
                    found.append(Inquire(source.name, tuple(batch)))
        return found

    def _ask_again(self, now: float) -> None:
        """Nobody held some: by now somebody may."""
        lost = list(itertools.islice(self.stuck(), INQUIRY))
        for source in self._sources.values():
            if not source.usable:
                continue
            for fp in lost:
                if now - source.lacks.get(fp, now) >= AGAIN_S:
                    del source.lacks[fp]
                    self._offer(source, fp, self._wants[fp])

    def _ask_demand(
        self, fp: bytes, now: float, asks: dict[tuple[str, bool], list[bytes]], found: list[Request]
    ) -> None:
        want = self._wants[fp]
        if want.at:
            if want.hurried:
                return
            # Asked for before somebody waited: let it overtake what is still queued there.
            want.hurried = True
            for name in want.at:
                source = self._sources.get(name)
                if source is not None and fp in source.out and not source.out[fp][2]:
                    found.append(Hurry(name, (fp,)))
            return
        holders = self._live_holders(fp)
        if not holders:
            holders = [s for s in self._sources.values() if s.usable and fp not in s.lacks]
        if not holders:
            return
        least = min(s.cost for s in holders)
        urgent = [s for s in holders if s.cost == least]
        best = min(urgent, key=lambda s: s.wait_for_one(sum(s.rate.chunk_bytes for o in s.out.values() if o[2])))
        self._ask(best, fp, want, now, True, asks)
        want.hurried = True

    def _fill(self, source: _Source, urgency: Urgency, now: float, asks: dict[tuple[str, bool], list[bytes]]) -> None:
        if not source.usable:
            return
        room = source.rate.window * (EASE if now < self.eased_until or self._demands else 1.0)
        queue = source.queues[urgency]
        aside: list[tuple[int, bytes]] = []
        # At least one chunk is under way even where the window is small, or nothing would ever be learnt.
        while (
            queue and len(aside) < SCAN and (not source.out or source.outstanding() + source.rate.chunk_bytes <= room)
        ):
            item = heapq.heappop(queue)
            fp = item[1]
            want = self._wants.get(fp)
            if want is None or want.at or want.urgency != urgency or fp in source.lacks:
                continue
            if source.cost and any(s.cost < source.cost for s in self._live_holders(fp)):
                aside.append(item)
                continue
            self._ask(source, fp, want, now, False, asks)
        for item in aside:
            heapq.heappush(queue, item)

    def _ask(
        self,
        source: _Source,
        fp: bytes,
        want: _Want,
        now: float,
        urgent: bool,
        asks: dict[tuple[str, bool], list[bytes]],
    ) -> None:
        ahead = sum(source.rate.chunk_bytes for o in source.out.values() if o[2]) if urgent else source.outstanding()
        source.rate.busy(now)
        source.out[fp] = (now, now + source.wait_for_one(ahead), urgent)
        want.at[source.name] = now
        asks.setdefault((source.name, urgent), []).append(fp)

    def _ask_twice(self, now: float, asks: dict[tuple[str, bool], list[bytes]]) -> None:
        """What is late, and what somebody with nothing else to do would bring sooner."""
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        free = [s for s in self._sources.values() if s.usable and s.outstanding() + s.rate.chunk_bytes <= s.rate.window]
        idle = {s.name for s in free if not any(s.queues[u] for u in (Urgency.SOON, Urgency.BULK))}
        for source in self._sources.values():
            if not source.usable or not any(other is not source for other in free):
                continue
            late = 0
            for fp, (at, expected, urgent) in list(source.out.items())[:SCAN]:
                want = self._wants.get(fp)
                if want is None or len(want.at) >= TWICE:
                    continue
                overdue = now > at + 2 * (expected - at) + 0.2
                if not overdue and not idle:
                    continue
                for other in self._live_holders(fp):
                    if other is source or other not in free or other.name in want.at or fp in other.out:
                        continue
                    sooner = now + other.wait_for_one(other.outstanding()) < expected - 0.5 * source.rate.rtt
                    rests = other.name in idle and not other.cost
                    if (overdue and other.cost <= source.cost) or (rests and sooner):
                        self._ask(other, fp, want, now, urgent or want.urgency is Urgency.DEMAND, asks)
                        late += 1
                        break
                if late >= 4:
                    break


def unique(fingerprints: Sequence[bytes]) -> list[bytes]:
    """Each once, in order."""
    return list(dict.fromkeys(fingerprints))
