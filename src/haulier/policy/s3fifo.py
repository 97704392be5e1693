"""S3-FIFO: three queues, and what is used only once leaves soon.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, R. Vigfusson, "FIFO queues are all you need for cache eviction", SOSP 2023. A small
queue of a tenth of the room takes what is new; what was used at least twice while there goes on to the main queue, the
rest leaves and is remembered in a ghost queue, and goes straight to the main queue should it come back. The main queue
gives what was used since another round. Whole-image reads (a backup, a verification) never get past the small queue.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import ClassVar, Final

from haulier.policy.model import S3FIFO_NAME, Forgetful, Item, Key

SMALL: Final = 0.1
GHOST: Final = 0.9
THRESHOLD: Final = 2
_FREQUENCY_MOST: Final = 3


class _Queue:
    """Keys with [size, frequency], oldest first, and their bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0
        self.entries: OrderedDict[Key, tuple[int, int]] = OrderedDict()

    def add(self, key: Key, size: int, frequency: int = 0) -> None:
        self.drop(key)
        self.entries[key] = (size, frequency)
        self.bytes += size

    def drop(self, key: Key) -> bool:
        found = self.entries.pop(key, None)
        if found is not None:
            self.bytes -= found[0]
        return found is not None

    def oldest(self) -> tuple[Key, int, int]:
        key, (size, frequency) = self.entries.popitem(last=False)
        self.bytes -= size
        return key, size, frequency


class S3Fifo(Forgetful):
    """See the module. `capacity` is in bytes, as are the queues."""

    name: ClassVar[str] = S3FIFO_NAME

    def __init__(self, capacity: int) -> None:
        self._small = _Queue(int(capacity * SMALL))
        self._main = _Queue(capacity - int(capacity * SMALL))
        self._ghost = _Queue(int(capacity * GHOST))
        self._full = False
        self.moved: dict[Key, int] = {}
        """What went to the main queue or got another round there, with its frequency from then on."""

    def insert(self, item: Item) -> None:
        if self._ghost.drop(item.key):
            self._main.add(item.key, item.size)
        elif not self._full and self._small.bytes >= self._small.most:
            self._main.add(item.key, item.size)  # until the first eviction there is no reason to be choosy
        else:
            self._small.add(item.key, item.size)

    def hit(self, key: Key, cost: float | None = None) -> None:
        for queue in (self._small, self._main):
            found = queue.entries.get(key)
            if found is not None:
                queue.entries[key] = (found[0], min(found[1] + 1, _FREQUENCY_MOST))
                return
        raise KeyError(key)

    def remove(self, key: Key) -> None:
        self._small.drop(key)
        self._main.drop(key)

    def victim(self) -> Key:
        self._full = True
        while self._small.entries or self._main.entries:
            if self._main.bytes > self._main.most or not self._small.entries:
                return self._from_main()
            key, size, frequency = self._small.oldest()
            if frequency >= THRESHOLD:
                self._main.add(key, size)
                self.moved[key] = 0
                continue
            self._remember(key, size)
            return key
        raise LookupError("nothing is kept")

    def _from_main(self) -> Key:
        while True:
            key, size, frequency = self._main.oldest()
            if frequency == 0:
                return key
            self._main.add(key, size, frequency - 1)
            self.moved[key] = frequency - 1

    def _remember(self, key: Key, size: int) -> None:
        if size > self._ghost.most:
            return
        self._ghost.add(key, size)
        while self._ghost.bytes > self._ghost.most:
            self._ghost.oldest()

    def is_main(self, key: Key) -> bool:
        """Whether `key` has left the small queue for the main one."""
        return key in self._main.entries

    def ghosts(self) -> list[Key]:
        """What has left lately, oldest first."""
        return list(self._ghost.entries)

    def restore(self, items: Iterable[Item]) -> None:
        for item in sorted(items, key=lambda item: item.came):
            queue = self._main if item.main else self._small
            queue.add(item.key, item.size, min(item.hits, _FREQUENCY_MOST))
