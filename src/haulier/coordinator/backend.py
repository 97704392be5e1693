"""What the coordinator asks of a database, and the SQL that both kinds understand alike.

The chunk dictionary (fingerprint -> dense id) is the large table and is reached by three calls only, which each back
end does in its own best way. Everything else is a handful of small tables behind `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from haulier.coordinator.bitmaps import MAX_IDS, UNKNOWN, Ids
from haulier.errors import Conflict, NoRoom

T = TypeVar("T")
Value = str | int | float | bytes | None

SCHEMA_VERSION: Final = 1

TABLES: Final = (
    "meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "counters (name TEXT PRIMARY KEY, value BIGINT NOT NULL)",
    "sites (site TEXT PRIMARY KEY, control TEXT NOT NULL, bulk TEXT NOT NULL, budget BIGINT NOT NULL,"
    " seen DOUBLE PRECISION NOT NULL, revision BIGINT NOT NULL)",
    "links (source TEXT NOT NULL, target TEXT NOT NULL, rate_bps DOUBLE PRECISION NOT NULL,"
    " rtt_s DOUBLE PRECISION NOT NULL, measured DOUBLE PRECISION NOT NULL, PRIMARY KEY (source, target))",
    "holdings (site TEXT NOT NULL, slice BIGINT NOT NULL, bits BYTES NOT NULL, PRIMARY KEY (site, slice))",
    "manifests (digest BYTES PRIMARY KEY, size BIGINT NOT NULL, bits BYTES NOT NULL)",
    "names (site TEXT NOT NULL, name TEXT NOT NULL, digest BYTES NOT NULL, size BIGINT NOT NULL,"
    " complete BIGINT NOT NULL, layer TEXT NOT NULL, parent BYTES NOT NULL, PRIMARY KEY (site, name))",
    "guests (site TEXT NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL, owner TEXT NOT NULL, epoch BIGINT NOT NULL,"
    " manifest TEXT NOT NULL, since DOUBLE PRECISION NOT NULL, PRIMARY KEY (site, name))",
    "popularity (slice BIGINT PRIMARY KEY, saved DOUBLE PRECISION NOT NULL, counts BYTES NOT NULL)",
)
"""BYTES stands for the back end's type of byte strings. `chunks` (fp, id) is the back end's own."""


class TakenOver(Conflict):
    """The database was out of reach for a while: what is in memory must be loaded again."""


class Rows(Protocol):
    """A transaction under way. Parameters are written as ``?``."""

    def all(self, sql: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        ...

    def do(self, sql: str, values: Sequence[Value] = ()) -> None:
        """A statement."""
        ...

    def many(self, sql: str, rows: Iterable[Sequence[Value]]) -> None:
        """The same statement for each row of values."""
        ...


class Backend(Protocol):
    """One database. All methods may be called from any thread; what fails, failed whole and may be tried again."""

    where: str
    """Names the database in messages, without secrets."""

    def run(self, work: Callable[[Rows], T]) -> T:
        """Runs `work` in a transaction, durable on return. It may be run again, so it must not count on being first.

        Raises PeerError, naming the server, if that cannot be reached even after some retries; NoRoom; Corrupt.
        """
        ...

    def lookup(self, fingerprints: Sequence[bytes]) -> Ids:
        """Ids, aligned; UNKNOWN for those that the dictionary has not. Raises as `run`."""
        ...

    def insert(self, fingerprints: Sequence[bytes], first: int) -> int:
        """Adds distinct fingerprints with ids from `first` on; those that are there keep their ids. How many were new.

        Durable on return. Raises as `run`; some may be in then, which harms nobody.
        """
        ...

    def scan(self, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        """Up to `limit` entries of the dictionary behind the fingerprint `after`, in order."""
        ...

    def facts(self) -> dict[str, Any]:
        """For the status: kind, where, bytes on disk."""
        ...

    def close(self) -> None: ...


def intern(backend: Backend, fingerprints: Sequence[bytes]) -> Ids:
    """Ids of all of `fingerprints`, new ones given in order of appearance.

    The range of new ids is taken in a transaction of its own: a crash leaves a gap, never an id that is given twice.
    NoRoom when the ids are used up.
    """
    ids = backend.lookup(fingerprints)
    unknown = np.flatnonzero(ids < 0).tolist()
    if not unknown:
        return ids
    fresh = list(dict.fromkeys(fingerprints[i] for i in unknown))

    def take(rows: Rows) -> int:
        rows.do(
            "INSERT INTO counters VALUES ('id', ?) ON CONFLICT (name) DO UPDATE SET value = counters.value + ?",
            (len(fresh), len(fresh)),
        )
        return int(rows.all("SELECT value FROM counters WHERE name = 'id'")[0][0])

    end = backend.run(take)
    if end > MAX_IDS:
        raise NoRoom(f"{backend.where} has given all of its {MAX_IDS} chunk ids: set up a second coordinator")
    if backend.insert(fresh, end - len(fresh)) == len(fresh):
        given = dict(zip(fresh, range(end - len(fresh), end), strict=True))
    else:
        # another writer, or an earlier attempt of this one, has entered some of them
        given = dict(zip(fresh, backend.lookup(fresh).tolist(), strict=True))
    for i in unknown:
        ids[i] = given[fingerprints[i]]
    return ids


def aligned(fingerprints: Sequence[bytes], found: dict[bytes, int]) -> Ids:
    """`found` in the order of `fingerprints`."""
    get = found.get
    return np.fromiter((get(fp, UNKNOWN) for fp in fingerprints), dtype=np.int64, count=len(fingerprints))
