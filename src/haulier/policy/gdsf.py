"""GreedyDual-Size-Frequency, with the true cost of fetching a thing again.

L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs, 1998:
priority = L + uses * cost / size, where L is the priority of the last victim, so that what was valuable long ago ages.
Cost is seconds: bytes over the rate from the nearest holder. Chunks have equal sizes, so it is cost that tells them
apart: what a neighbour on a fast link holds goes before what would have to come over the wide area.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, ClassVar, Final

from haulier.policy.model import GDSF_NAME, Item, Key
from haulier.policy.ranked import Ranked

_AGES_MOST: Final = 256


class Gdsf:
    """See the module. `now` of an access need not be told; it serves to restore the age of items."""

    name: ClassVar[str] = GDSF_NAME

    def __init__(self, capacity: int = 0) -> None:
        self._ranked = Ranked()
        self._items: dict[Key, tuple[int, int, float]] = {}  # uses, size, cost
        self._floor = 0.0
        self._ages: list[tuple[float, float]] = []
        """(time, floor from then on), ascending."""

    def _rank(self, key: Key, floor: float) -> None:
        uses, size, cost = self._items[key]
        self._ranked.set(key, floor + uses * cost / max(size, 1))

    def insert(self, item: Item) -> None:
        self._items[item.key] = (1 + item.hits, item.size, item.cost)
        self._rank(item.key, self._floor)

    def hit(self, key: Key, cost: float | None = None) -> None:
        uses, size, before = self._items[key]
        self._items[key] = (uses + 1, size, before if cost is None else cost)
        self._rank(key, self._floor)

    def remove(self, key: Key) -> None:
        self._items.pop(key, None)
        self._ranked.discard(key)

    def victim(self) -> Key:
        key, rank = self._ranked.pop()
        self._floor = max(self._floor, rank)
        del self._items[key]
        return key

    def restore(self, items: Iterable[Item]) -> None:
        times = [time for time, _ in self._ages]
        for item in sorted(items, key=lambda item: item.used):
            self._items[item.key] = (1 + item.hits, item.size, item.cost)
            at = bisect_right(times, item.used)
            self._rank(item.key, self._ages[at - 1][1] if at else 0.0)

    def mark(self, now: float) -> None:
        """Remember how high the floor is at `now`: items that are restored age by it."""
        if not self._ages or (now > self._ages[-1][0] and self._floor > self._ages[-1][1]):
            self._ages.append((now, self._floor))
        if len(self._ages) > _AGES_MOST:
            del self._ages[1:-1:2]

    def memory(self) -> dict[str, Any]:
        return {"ages": [list(age) for age in self._ages]}

    def remember(self, memory: dict[str, Any]) -> None:
        try:
            ages = [(float(time), float(floor)) for time, floor in memory["ages"]]
        except (KeyError, TypeError, ValueError):
            return
        if ages == sorted(ages) and len(ages) <= 2 * _AGES_MOST:
            self._ages = ages
            self._floor = ages[-1][1] if ages else 0.0
