"""The store's index: one SQLite file in WAL mode, shared by every process that has the store open.

Two connections a process: readers never wait for this process's own commit. Errors of SQLite leave here as ours.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from haulier.chunks.packs import Location
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, UsageError
from haulier.units import MIB

SCHEMA_VERSION: Final = 2
_BUSY_MS: Final = 30_000
_BATCH: Final = 900  # below SQLite's historic limit of 999 variables a statement

_SCHEMA: Final = """
CREATE TABLE store (id BLOB NOT NULL);
CREATE TABLE packs (id INTEGER PRIMARY KEY AUTOINCREMENT, tail INTEGER NOT NULL);
CREATE TABLE chunks (
    fp BLOB PRIMARY KEY, pack INTEGER NOT NULL, offset INTEGER NOT NULL, stored INTEGER NOT NULL, codec INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE refs (fp BLOB PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE manifests (
    name TEXT PRIMARY KEY, data BLOB NOT NULL, complete INTEGER NOT NULL, meta TEXT NOT NULL, saved REAL NOT NULL
);
CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, renewed REAL NOT NULL);
CREATE TABLE leased (fp BLOB, lease INTEGER, PRIMARY KEY (fp, lease)) WITHOUT ROWID;
"""
_STEPS: Final = {
    2: """
ALTER TABLE chunks ADD COLUMN came INTEGER NOT NULL DEFAULT 0;
ALTER TABLE chunks ADD COLUMN used INTEGER NOT NULL DEFAULT 0;
ALTER TABLE chunks ADD COLUMN hits INTEGER NOT NULL DEFAULT 0;
ALTER TABLE chunks ADD COLUMN queue INTEGER NOT NULL DEFAULT 0;
ALTER TABLE manifests ADD COLUMN pinned INTEGER NOT NULL DEFAULT 1;
CREATE TABLE ghosts (fp BLOB PRIMARY KEY, gone INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID
"""
}
"""What brings an index of the version before to this one."""
DOUBTED: Final = 2
"""`complete` of a manifest that was, until a chunk of it was found damaged: who asks looks whether all is here again.

Unlike 0 it says that all of it belongs here, so that what it lacks is missed, and healed."""
SAME_USE_S: Final = 300
"""Accesses of a chunk this close together are one use: a handoff names a chunk in several of its phases."""


class Index:
    """Connections to the index file. `read` and `write` are context managers, safe from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader_lock = threading.Lock()
        self._writer_lock = threading.RLock()
        with self._errors():
            self._writer = self._open()
            self._reader = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute(f"PRAGMA journal_size_limit={16 * MIB}")
        db.execute("PRAGMA temp_store=MEMORY")
        db.execute("PRAGMA cache_size=-16384")
        return db

    def create(self, store: bytes) -> bool:
        """Make the tables where there are none; True when made. Raises Corrupt for another version's file."""
        with self.write() as db:
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version == SCHEMA_VERSION:
                return False
            if version > SCHEMA_VERSION:
                raise Corrupt(f"{self.path} is of version {version}, known is {SCHEMA_VERSION}; update haulier")
            made = version == 0
            for step in range(version + 1, SCHEMA_VERSION + 1):
                for statement in (_SCHEMA if step == 1 else _STEPS[step]).split(";"):
                    db.execute(statement)
            if made:
                db.execute("INSERT INTO store VALUES (?)", (store,))
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        return made

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "full" in text or ("I/O error" in text and shutil.disk_usage(self.path.parent).free < MIB):
                raise NoRoom(
                    f"no room left to write {self.path}; free some space on that disk, then try again"
                ) from error
            if "locked" in text or "busy" in text:
                raise Conflict(f"{self.path} stayed locked for {_BUSY_MS // 1000} s; try again") from error
            raise HaulierError(f"{self.path} cannot be used: {text}") from error
        except sqlite3.ProgrammingError as error:
            raise UsageError(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise Corrupt(f"{self.path} is damaged: {error}; move it away and run haulier doctor") from error

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """The reading connection; each statement sees what is committed by then."""
        with self._reader_lock, self._errors():
            yield self._reader

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: durable when the block ends, undone when it raises. Within one, part of that one."""
        with self._writer_lock, self._errors():
            if self._writer.in_transaction:
                yield self._writer
                return
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own that sees one moment, for long scans."""
        with self._errors():
            db = self._open()
            try:
                db.execute("BEGIN")
                yield db
            finally:
                db.close()

    def close(self) -> None:
        """Close both connections."""
        with self._reader_lock, self._writer_lock:
            self._reader.close()
            self._writer.close()


def locate(db: sqlite3.Connection, fp: bytes) -> Location | None:
    """Where a committed chunk is."""
    row = db.execute("SELECT pack, offset, stored, codec FROM chunks WHERE fp=?", (fp,)).fetchone()
    return Location(*row) if row else None


def present(db: sqlite3.Connection, fps: Sequence[bytes]) -> set[bytes]:
    """Those of `fps` that have a row."""
    found: set[bytes] = set()
    for start in range(0, len(fps), _BATCH):
        batch = fps[start : start + _BATCH]
        marks = ",".join("?" * len(batch))
        found.update(row[0] for row in db.execute(f"SELECT fp FROM chunks WHERE fp IN ({marks})", batch))
    return found


def enter(db: sqlite3.Connection, places: Iterable[tuple[bytes, Location]], now: float) -> None:
    """Rows for chunks that have come; those that are there stay as they are."""
    db.executemany(
        "INSERT OR IGNORE INTO chunks (fp, pack, offset, stored, codec, came, used) VALUES (?,?,?,?,?,?,?)",
        ((fp, *at, int(now), int(now)) for fp, at in places),
    )


def count_uses(db: sqlite3.Connection, fps: Iterable[bytes], now: float) -> None:
    """Each of `fps` was used at `now`."""
    db.executemany(
        f"UPDATE chunks SET hits = hits + (used <= ? - {SAME_USE_S}), used = max(used, ?) WHERE fp = ?",
        ((int(now), int(now), fp) for fp in fps),
    )


def read_note(db: sqlite3.Connection, key: str) -> str:
    """What was noted under `key`; "" when nothing was."""
    row = db.execute("SELECT value FROM notes WHERE key=?", (key,)).fetchone()
    return str(row[0]) if row else ""


def write_note(db: sqlite3.Connection, key: str, value: str) -> None:
    """Note `value` under `key`."""
    db.execute("INSERT OR REPLACE INTO notes VALUES (?,?)", (key, value))


def set_tail(db: sqlite3.Connection, pack: int, tail: int) -> None:
    """Record a pack's committed length, whether or not its row is still there."""
    db.execute("INSERT INTO packs VALUES (?,?) ON CONFLICT (id) DO UPDATE SET tail=excluded.tail", (pack, tail))


def count_references(db: sqlite3.Connection, added: Iterable[bytes], removed: Iterable[bytes]) -> None:
    """Take manifests' references up and down; a chunk without any has no row."""
    db.executemany(
        "INSERT INTO refs VALUES (?,1) ON CONFLICT (fp) DO UPDATE SET count=count+1", ((fp,) for fp in added)
    )
    gone = [(fp,) for fp in removed]
    db.executemany("UPDATE refs SET count=count-1 WHERE fp=?", gone)
    db.executemany("DELETE FROM refs WHERE fp=? AND count<=0", gone)


def renew_lease(db: sqlite3.Connection, name: str, now: float) -> int:
    """Make or renew a lease; its id."""
    db.execute(
        "INSERT INTO leases (name, renewed) VALUES (?,?) ON CONFLICT (name) DO UPDATE SET renewed=excluded.renewed",
        (name, now),
    )
    return int(db.execute("SELECT id FROM leases WHERE name=?", (name,)).fetchone()[0])


def end_lease(db: sqlite3.Connection, name: str) -> bool:
    """Forget a lease and its claims; False when there is none."""
    row = db.execute("SELECT id FROM leases WHERE name=?", (name,)).fetchone()
    if row is None:
        return False
    db.execute("DELETE FROM leased WHERE lease=?", row)
    db.execute("DELETE FROM leases WHERE id=?", row)
    return True
