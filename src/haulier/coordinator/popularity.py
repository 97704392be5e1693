"""How often each chunk was asked for lately: exponentially decayed counts by dense id. Pure: the time is passed in.

A count is stored multiplied by 2^(t / half-life), so that decay costs nothing (the forward decay of Cormode et al.,
2009); all are scaled down together before they overflow.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.coordinator.bitmaps import SLICE_BITS, Ids
from haulier.errors import Corrupt

HALF_LIFE_S: Final = 86400.0
_RESCALE: Final = 60.0
"""Half-lives after which the scale starts over; float32 overflows at 128."""
_SLICE: Final = 1 << SLICE_BITS


class Popularity:
    """Counts in slices that exist only where something was asked for: 4 bytes a chunk."""

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._half_life = half_life_s
        self._slices: dict[int, NDArray[np.float32]] = {}
        self._origin: float | None = None
        self._dirty: set[int] = set()

    def bump(self, ids: Ids, now: float) -> None:
        """One more request for each of `ids` (unknown ones are passed over)."""
        weight = self._scale(now)
        known = ids[ids >= 0]
        for number in np.unique(known >> SLICE_BITS).tolist():
            counts = self._slices.get(number)
            if counts is None:
                counts = self._slices[number] = np.zeros(_SLICE, dtype=np.float32)
            inside = known[known >> SLICE_BITS == number] & (_SLICE - 1)
            np.add.at(counts, inside, np.float32(weight))
            self._dirty.add(number)

    def of(self, ids: Ids, now: float) -> NDArray[np.float32]:
        """Requests a half-life or so, as they count now; 0 for unknown ids."""
        weight = self._scale(now)
        found = np.zeros(len(ids), dtype=np.float32)
        for number in np.unique(ids[ids >= 0] >> SLICE_BITS).tolist():
            counts = self._slices.get(number)
            if counts is not None:
                here = (ids >= 0) & (ids >> SLICE_BITS == number)
                found[here] = counts[ids[here] & (_SLICE - 1)] / np.float32(weight)
        return found

    def _scale(self, now: float) -> float:
        if self._origin is None:
            self._origin = now
        # a clock that was set back must not make the past weigh more
        age = max(now - self._origin, 0.0) / self._half_life
        if age > _RESCALE:
            shrink = np.float32(2.0 ** -min(age, 120.0))
            for counts in self._slices.values():
                counts *= shrink
            self._dirty.update(self._slices)
            self._origin, age = now, 0.0
        return float(2.0**age)

    # -- keeping it

    def take_changes(self, now: float) -> dict[int, bytes]:
        """Slices that changed since the last call, as of `now`; what `restore` takes."""
        weight = np.float32(self._scale(now))
        changes = {n: (self._slices[n] / weight).astype(np.float16).tobytes() for n in self._dirty}
        self._dirty.clear()
        return changes

    def restore(self, number: int, data: bytes, age_s: float, now: float) -> None:
        """A slice that was taken `age_s` ago. Corrupt if it is none."""
        if len(data) != _SLICE * 2:
            raise Corrupt(f"popularity slice {number} of {len(data)} bytes in the coordinator's database: delete it")
        faded = np.float32(self._scale(now) * 2.0 ** -(max(age_s, 0.0) / self._half_life))
        self._slices[number] = np.frombuffer(data, dtype=np.float16).astype(np.float32) * faded
