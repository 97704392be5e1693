"""For how long nothing has gone on at the other site although the link would have carried it. Pure: numbers in."""

from __future__ import annotations

from typing import Final

GAP_S: Final = 5.0
"""Nobody looked for so long: it was this process, or its host, that stood still."""


class Standstill:
    """`note` is called every now and then, from any thread: at least every GAP_S, or no time counts."""

    def __init__(self) -> None:
        self._since = self._looked = 0.0
        self._moved: tuple[int, ...] = ()

    def note(self, now: float, waits: bool, moved: tuple[int, ...]) -> float:
        """Seconds for which the other site has been waited for (`waits`) with nothing of `moved` changing."""
        if not waits or moved != self._moved or now - self._looked > GAP_S:
            self._since, self._moved = now, moved
        self._looked = now
        return now - self._since
