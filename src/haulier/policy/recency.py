"""The policies that know nothing of sizes and costs: LRU and LFU."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from haulier.policy.model import LFU_NAME, LRU_NAME, Forgetful, Item, Key
from haulier.policy.ranked import Ranked


class Lru(Forgetful):
    """Least recently used goes first."""

    name: ClassVar[str] = LRU_NAME

    def __init__(self, capacity: int = 0) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def insert(self, item: Item) -> None:
        self._order[item.key] = None
        self._order.move_to_end(item.key)

    def hit(self, key: Key, cost: float | None = None) -> None:
        self._order.move_to_end(key)

    def remove(self, key: Key) -> None:
        self._order.pop(key, None)

    def victim(self) -> Key:
        if not self._order:
            raise LookupError("nothing is kept")
        return self._order.popitem(last=False)[0]


class Lfu(Forgetful):
    """Least often used since it came goes first; of those, the least recently used."""

    name: ClassVar[str] = LFU_NAME

    def __init__(self, capacity: int = 0) -> None:
        self._ranked = Ranked()
        self._uses: dict[Key, int] = {}

    def insert(self, item: Item) -> None:
        self._uses[item.key] = 1 + item.hits
        self._ranked.set(item.key, self._uses[item.key])

    def hit(self, key: Key, cost: float | None = None) -> None:
        self._uses[key] += 1
        self._ranked.set(key, self._uses[key])

    def remove(self, key: Key) -> None:
        self._uses.pop(key, None)
        self._ranked.discard(key)

    def victim(self) -> Key:
        key, _ = self._ranked.pop()
        del self._uses[key]
        return key
