"""When to freeze a container: pure, numbers in, a decision out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LEAST_S: Final = 0.06
"""A last transfer of less is not worth another round, whatever was asked for."""
SHARE: Final = 0.25
"""Of the downtime asked for, what the last transfer may take; dump and restore take the rest."""
MOST_ROUNDS: Final = 40
STALLED: Final = 0.85
"""A round that has more than this share of the one before has not become shorter."""


@dataclass(frozen=True, slots=True)
class Round:
    """`seconds` it took, `wire` bytes it sent, `rate_bps` of the link (0: not known)."""

    seconds: float
    wire: int
    rate_bps: float


class Rounds:
    """Decides after each round whether it was the last one before the container is frozen."""

    def __init__(self, downtime_s: float) -> None:
        self._aim = max(LEAST_S, SHARE * downtime_s)
        self._rounds: list[Round] = []
        self._stalled = 0
        self.forecast = float("inf")
        """Seconds that a last transfer would take now."""

    def add(self, done: Round) -> bool:
        """True when the container should be frozen now.

        What changes in the next round takes as long as the next round does: a short round leaves less to be sent, so
        the forecast is what was sent per second of the last round, for a round as long as the last transfer will be.
        """
        before = self._rounds[-1] if self._rounds else None
        self._rounds.append(done)
        rate = max(done.rate_bps, 64e3)
        transfer = done.wire * 8 / rate
        self.forecast = min(transfer, transfer * max(0.3, min(1.0, self._aim * 4 / max(done.seconds, 1e-3))))
        if before is None:
            # The first round sends all there is; it tells nothing of what the next one will have.
            return False
        if self.forecast <= self._aim or len(self._rounds) >= MOST_ROUNDS:
            return True
        self._stalled = self._stalled + 1 if done.wire >= STALLED * before.wire else 0
        return self._stalled >= 2
