"""The dictionary of chunks in front of the database: what was looked up lately is remembered, 24 bytes a chunk.

Remembered are the first 16 bytes of a fingerprint and its id. Two chunks with the same 16 bytes would take 2^64 tries
to make. An id never changes, so nothing has to be taken back. Kept as a few sorted runs, merged as they grow (as in a
log-structured merge tree).
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from haulier.chunks.fingerprint import ZERO
from haulier.coordinator import backend as database
from haulier.coordinator.backend import Backend
from haulier.coordinator.bitmaps import UNKNOWN, Ids
from haulier.coordinator.messages import split
from haulier.units import FINGERPRINT

MOST: Final = 4 << 20
"""Chunks remembered: 100 MB."""
_WORDS: Final = FINGERPRINT // 8
_ZERO: Final = np.frombuffer(ZERO, dtype="<u8")

Words = NDArray[np.uint64]


class _Run(NamedTuple):
    """Sorted by `first`, the first 8 bytes; `second` are the next 8."""

    first: Words
    second: Words
    ids: Ids


class Dictionary:
    """`lookup` and `intern` of a back end, for fingerprints as one byte string. Raises as the back end does."""

    def __init__(self, backend: Backend, most: int = MOST) -> None:
        self._backend = backend
        self._most = most
        self._runs: tuple[_Run, ...] = ()
        self._lock = threading.Lock()

    def lookup(self, data: bytes) -> Ids:
        """Ids, aligned; UNKNOWN for chunks that nobody reported. UsageError for a part of a fingerprint."""
        return self._ids(data, make=False)

    def intern(self, data: bytes) -> Ids:
        """Ids of all, new ones given in order of appearance; UNKNOWN only for the zero chunk."""
        return self._ids(data, make=True)

    def _ids(self, data: bytes, make: bool) -> Ids:
        if len(data) % FINGERPRINT:
            split(data)
        words = np.frombuffer(data, dtype="<u8").reshape(-1, _WORDS)
        ids = self._recall(words)
        asked = np.flatnonzero((ids < 0) & (words != _ZERO).any(axis=1))
        if len(asked):
            rows = words[asked]
            names = split(rows.tobytes())
            found = database.intern(self._backend, names) if make else self._backend.lookup(names)
            ids[asked] = found
            known = found >= 0
            self._remember(rows[known], found[known])
        return ids

    def _recall(self, words: Words) -> Ids:
        ids = np.full(len(words), UNKNOWN, dtype=np.int64)
        # neighbours in the run are then neighbours in memory
        order = np.argsort(words[:, 0])
        first, second = words[order, 0], words[order, 1]
        for run in self._runs:
            places = np.minimum(np.searchsorted(run.first, first), len(run.first) - 1)
            same = (run.first[places] == first) & (run.second[places] == second)
            ids[order[same]] = run.ids[places[same]]
        return ids

    def _remember(self, words: Words, ids: Ids) -> None:
        if not len(ids):
            return
        first, at = np.unique(words[:, 0], return_index=True)
        new = _Run(first, words[at, 1].astype(np.uint64), ids[at])
        with self._lock:
            runs = [*self._runs, new]
            while len(runs) > 1 and len(runs[-2].ids) < 2 * len(runs[-1].ids):
                runs[-2:] = [_merge(runs[-2], runs[-1])]
            if sum(len(run.ids) for run in runs) > self._most:
                runs = [new]
            self._runs = tuple(runs)


def _merge(a: _Run, b: _Run) -> _Run:
    first = np.concatenate([a.first, b.first])
    order = np.argsort(first, kind="stable")
    return _Run(first[order], np.concatenate([a.second, b.second])[order], np.concatenate([a.ids, b.ids])[order])
