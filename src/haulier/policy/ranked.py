"""Keys in the order of their ranks, which may change at any time."""

from __future__ import annotations

import heapq
from typing import Any, Final

from haulier.policy.model import Key

_SLACK: Final = 64


class Ranked:
    """The key of the lowest rank first; of equal ranks the one that was set first. All steps take O(log n)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Key]] = []
        self._now: dict[Key, tuple[Any, int]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._now)

    def __contains__(self, key: Key) -> bool:
        return key in self._now

    def set(self, key: Key, rank: Any) -> None:
        self._count += 1
        self._now[key] = (rank, self._count)
        heapq.heappush(self._heap, (rank, self._count, key))
        if len(self._heap) > 4 * len(self._now) + _SLACK:
            self._heap = [(rank, count, key) for key, (rank, count) in self._now.items()]
            heapq.heapify(self._heap)

    def discard(self, key: Key) -> None:
        self._now.pop(key, None)

    def lowest(self) -> tuple[Key, Any]:
        """The lowest key and its rank; LookupError when there is none."""
        while self._heap:
            rank, count, key = self._heap[0]
            if self._now.get(key) == (rank, count):
                return key, rank
            heapq.heappop(self._heap)
        raise LookupError("nothing is ranked")

    def pop(self) -> tuple[Key, Any]:
        """Like `lowest`, and takes it out."""
        key, rank = self.lowest()
        heapq.heappop(self._heap)
        del self._now[key]
        return key, rank
