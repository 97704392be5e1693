"""When to look again at a path that brings bulk all the time: not at every packet.

The kernel of whoever receives acknowledges every second packet, if what came before was read at once; what waits a few
milliseconds to be read is acknowledged together. At 10 Mbit/s that, and fewer acks of our own, are 1.3 % of all bytes,
all of them in the direction that has less to spare where a line is asymmetric.
"""

from __future__ import annotations

import math
from typing import Final

LEAST: Final = 2048
"""Bytes at once that are bulk."""
MOST: Final = 48 * 1024
"""Where more comes between two looks the link is fast enough for the kernel to do the same by itself."""
STEADY_S: Final = 1.0
STEADY_RTTS: Final = 15
"""Bulk has to have come for so long, and so many round trips, in which a sender finds what the path carries ..."""
QUIET_S: Final = 0.2
"""... without a pause of so long: what is short, or is an answer, is read at once."""
LOOK_S: Final = 0.010
SHARE: Final = 0.25
"""Of a round trip: the sender's window has room for half of one more than it needs."""


class Leisure:
    """One connection's. Times in seconds."""

    def __init__(self) -> None:
        self._since = self._last = -math.inf

    def note(self, now: float, count: int, rtt: float) -> float:
        """`count` bytes were read at once; how long the next look may wait. `rtt`: the shortest known, 0 for none."""
        if count < LEAST:
            return 0.0
        if now - self._last > QUIET_S:
            self._since = now
        self._last = now
        if count > MOST or now - self._since < max(STEADY_S, STEADY_RTTS * rtt):
            return 0.0
        return min(LOOK_S, SHARE * rtt)
