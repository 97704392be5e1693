"""The coordinated policy: what a site gives up is what the whole fleet misses least.

The loss of evicting thing k of site s, in seconds a unit of demand, over its size:

    demand here * cost(here, next holder)
      + for every other site whose nearest holder this is: demand there * (cost from its next holder - cost from here)

So what is popular is kept near where it is used, a fourth copy next door is worth next to nothing, and the last copy
this side of a slow link is worth what it saves to everybody. It is the marginal gain of facility location, the form in
which cooperative placement is known to be well solved greedily (Korupolu, Plaxton, Rajaraman, "Placement Algorithms
for Hierarchical Cooperative Caching", J. Algorithms 2001). Demand is counted per site with exponential decay; what is
wanted anywhere is expected, in part, everywhere: that is what a site alone cannot know. What a planned handoff will
need can be told in advance (`expect`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from haulier.policy.model import COORDINATED_NAME, Forgetful, Item, Key
from haulier.policy.ranked import Ranked

SHARED: Final = 0.5
"""Of the demand at an average site, how much is expected at each."""
ONCE: Final = 0.8
"""Of the first use: how little it says that there will be another. Most of what is read once is never read again."""
_STALE: Final = 1.02
_FLAT: Final = 600.0
"""Exponents are kept below this, and scaled down when they reach it."""


class Fleet:
    """Who holds what, who wants what, and what a byte costs from where.

    `costs[r][s]` are seconds a byte from site s to site r, `origin[r]` from the origin, which holds everything (a far
    site, or an object store). `half_life` is in units of the times that `access` is told.
    """

    def __init__(self, costs: Sequence[Sequence[float]], origin: Sequence[float], half_life: float) -> None:
        self.origin = list(origin)
        self.costs = [list(row) for row in costs]
        self._near = [
            sorted((s for s in range(len(costs)) if s != r and row[s] < origin[r]), key=row.__getitem__)
            for r, row in enumerate(self.costs)
        ]
        self.holders: defaultdict[Key, set[int]] = defaultdict(set)
        self._demand: defaultdict[Key, dict[int, float]] = defaultdict(dict)
        self._times: defaultdict[Key, float] = defaultdict(float)
        self._decay = math.log(2) / half_life
        self._base = self._now = 0.0
        self._mean = SHARED / max(len(costs), 1)

    def access(self, site: int, key: Key, now: float) -> None:
        """`key` was wanted at `site`."""
        self.expect(site, key, 1.0, now)

    def expect(self, site: int, key: Key, uses: float, now: float) -> None:
        """So many uses are expected soon (a handoff is planned, a workload is known to come back)."""
        if (now - self._base) * self._decay > _FLAT:
            scale = math.exp(-(now - self._base) * self._decay)
            for wants in self._demand.values():
                for who in wants:
                    wants[who] *= scale
            self._base = now
        self._now = max(self._now, now)
        self._times[key] += uses
        wants = self._demand[key]
        wants[site] = wants.get(site, 0.0) + uses * math.exp((now - self._base) * self._decay)

    def nearest(self, site: int, key: Key, without: int = -1) -> float:
        """Seconds a byte for `site` to fetch `key` from another holder than itself and `without`."""
        held = self.holders.get(key)
        if held:
            costs = self.costs[site]
            for other in self._near[site]:
                if other in held and other != without:
                    return costs[other]
        return self.origin[site]

    def loss(self, site: int, key: Key) -> float:
        """What evicting `key` at `site` would cost the fleet, in (scaled) seconds a byte."""
        wants = self._demand.get(key)
        if not wants:
            return 0.0
        shared = self._mean * sum(wants.values())
        lost = (wants.get(site, 0.0) + shared) * self.nearest(site, key)
        held = self.holders.get(key, set())
        for other in range(len(self.costs)):
            if other == site or other in held:
                continue
            here = self.costs[other][site]
            instead = self.nearest(other, key, without=site)
            if instead > here:
                lost += (wants.get(other, 0.0) + shared) * (instead - here)
        times = self._times[key]
        return lost * max(times - ONCE, 0.0) / times

    def seconds(self, sizes: Mapping[Key, int], kept: Sequence[Iterable[Key]]) -> float:
        """What all demand takes to fetch where site s has `kept[s]`, in (scaled) seconds. `holders` is left empty."""
        self.holders.clear()
        for site, keys in enumerate(kept):
            for key in keys:
                self.holders[key].add(site)
        found = 0.0
        for key, wants in self._demand.items():
            times = self._times[key]
            shared = self._mean * sum(wants.values())
            held = self.holders.get(key, set())
            again = max(times - ONCE, 0.0) / times * sizes[key]
            for site in range(len(self.costs)):
                if site not in held:
                    found += again * (wants.get(site, 0.0) + shared) * self.nearest(site, key)
        self.holders.clear()
        # demand is kept scaled by what has passed since the first
        last = self._now
        return found * math.exp(-(last - self._base) * self._decay)


class Coordinated(Forgetful):
    """The policy of one site of a fleet; all of them share `fleet`, which is told of every access (see `Fleet`)."""

    name: ClassVar[str] = COORDINATED_NAME

    def __init__(self, fleet: Fleet, site: int) -> None:
        self._fleet = fleet
        self._site = site
        self._ranked = Ranked()

    def insert(self, item: Item) -> None:
        self._fleet.holders[item.key].add(self._site)
        self.touch(item.key)

    def hit(self, key: Key, cost: float | None = None) -> None:
        self.touch(key)

    def touch(self, key: Key) -> None:
        """The worth of `key` may have changed: it was used, or a copy was made elsewhere."""
        self._ranked.set(key, self._fleet.loss(self._site, key))

    def remove(self, key: Key) -> None:
        self._ranked.discard(key)
        self._fleet.holders[key].discard(self._site)

    def victim(self) -> Key:
        while True:
            key, rank = self._ranked.pop()
            now = self._fleet.loss(self._site, key)
            if now > rank * _STALE and len(self._ranked):
                _, next_rank = self._ranked.lowest()
                if now > next_rank:
                    self._ranked.set(key, now)  # worth more than when it was looked at last
                    continue
            self._fleet.holders[key].discard(self._site)
            return key

    def restore(self, items: Iterable[Item]) -> None:
        for item in items:
            self.insert(item)


@dataclass(frozen=True)
class Facts:
    """What a fleet knows of a thing: seconds a byte to fetch it again from the nearest other holder, other holders,
    and how often it was wanted lately anywhere (decayed).

    `plan` is 1 for what the coordinator's plan keeps here, -1 for copies that it does not want here, else 0.
    """

    refetch_s: float = 8 / 20e6
    copies: int = 0
    popularity: float = 0.0
    plan: int = 0


LOCAL_HALF_LIFE_S: Final = 86_400.0


class Informed(Forgetful):
    """The coordinated policy of a site that is told facts by a coordinator, instead of the whole fleet's books.

    The demand of others is taken to be spread evenly over the sites, and to be served evenly by those that hold a
    copy: so each copy but the last is worth its share of what everybody saves. Where the coordinator has a plan, what
    that keeps here goes last, and the copies that it does not want here go first.
    """

    name: ClassVar[str] = COORDINATED_NAME

    def __init__(self, facts: Callable[[Key], Facts], sites: int, now: float) -> None:
        self._facts = facts
        self._sites = max(sites, 1)
        self._now = now
        self._ranked = Ranked()
        self._uses: dict[Key, float] = {}

    def _rank(self, key: Key) -> None:
        known = self._facts(key)
        others = max(self._sites - 1 - known.copies, 0) / self._sites * known.popularity / (known.copies + 1)
        here = self._uses[key] + SHARED * known.popularity / self._sites
        self._ranked.set(key, (known.plan, (here + others) * known.refetch_s))

    def insert(self, item: Item) -> None:
        age = max(self._now - item.used, 0.0)
        self._uses[item.key] = (1 + item.hits) * 0.5 ** min(age / LOCAL_HALF_LIFE_S, _FLAT)
        self._rank(item.key)

    def hit(self, key: Key, cost: float | None = None) -> None:
        self._uses[key] += 1
        self._rank(key)

    def remove(self, key: Key) -> None:
        self._ranked.discard(key)
        self._uses.pop(key, None)

    def victim(self) -> Key:
        key, _ = self._ranked.pop()
        del self._uses[key]
        return key


def place(
    fleet: Fleet, sizes: Mapping[Key, int], budgets: Sequence[int], have: Mapping[int, Iterable[Key]] | None = None
) -> list[set[Key]]:
    """Which site had best keep what, within its budget in bytes: the plan of all sites at once.

    Greedy by gain over size; a gain can only shrink as copies are made, so each is computed again when its turn comes
    (lazy greedy). `have` is held already and stays: pinned things. `fleet.holders` is taken as empty, and left so.
    """
    kept: list[set[Key]] = [set() for _ in budgets]
    room = list(budgets)
    fleet.holders.clear()
    for site, keys in (have or {}).items():
        for key in keys:
            kept[site].add(key)
            fleet.holders[key].add(site)
            room[site] -= sizes[key]
    ranked = Ranked()
    for key in sizes:
        for site in range(len(budgets)):
            if key not in kept[site]:
                ranked.set((site, key), -fleet.loss(site, key))
    while len(ranked):
        (site, key), rank = ranked.pop()  # type: ignore[misc]
        if sizes[key] > room[site] or rank >= 0.0:
            continue
        gain = fleet.loss(site, key)
        if len(ranked) and -gain > ranked.lowest()[1] + 1e-15:
            ranked.set((site, key), -gain)
            continue
        kept[site].add(key)
        fleet.holders[key].add(site)
        room[site] -= sizes[key]
    fleet.holders.clear()
    return kept
