"""The embedded back end: one SQLite file in WAL mode, for one coordinator process."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from haulier.coordinator.backend import SCHEMA_VERSION, TABLES, Rows, T, Value, aligned
from haulier.coordinator.bitmaps import Ids
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom

_BATCH: Final = 900  # below SQLite's historic limit of 999 variables a statement
_IN: Final = f"SELECT fp, id FROM chunks WHERE fp IN ({','.join('?' * _BATCH)})"


class _Rows:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def all(self, sql: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        return self._db.execute(sql, values).fetchall()

    def do(self, sql: str, values: Sequence[Value] = ()) -> None:
        self._db.execute(sql, values)

    def many(self, sql: str, rows: Iterable[Sequence[Value]]) -> None:
        self._db.executemany(sql, rows)


class SqliteBackend:
    """The database file at `path`, made if it is not there. Conflict if another process has it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = f"the coordinator's database {path}"
        self._lock = threading.RLock()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite's own locks end with a transaction; the bitmaps in memory need the file for themselves for longer
        self._guard = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._guard)
            raise Conflict(f"{self.where} is in use by another coordinator: stop that one first") from None
        try:
            self._db = self._open()
        except BaseException:
            os.close(self._guard)
            raise

    def _open(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode=WAL")
            # what a power cut takes is reported again: sites see by their revision that it is gone
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA cache_size=-65536")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise Corrupt(f"{self.where} is of version {version}, known is {SCHEMA_VERSION}: update haulier")
            if version < SCHEMA_VERSION:
                db.execute("BEGIN IMMEDIATE")
                for table in TABLES:
                    db.execute(f"CREATE TABLE {table.replace('BYTES', 'BLOB')}")
                db.execute("CREATE TABLE chunks (fp BLOB PRIMARY KEY, id INTEGER NOT NULL) WITHOUT ROWID")
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error
        return db

    def _error(self, error: sqlite3.Error) -> HaulierError:
        text = str(error)
        if "full" in text:
            return NoRoom(f"no room left for {self.where}: free some space on that disk, then try again")
        if isinstance(error, sqlite3.OperationalError):
            return HaulierError(f"{self.where} cannot be used: {text}")
        return Corrupt(f"{self.where} is damaged ({text}): move it away; sites report anew what they hold")

    def run(self, work: Callable[[Rows], T]) -> T:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                found = work(_Rows(self._db))
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise self._error(error) from error
                raise
        return found

    def lookup(self, fingerprints: Sequence[bytes]) -> Ids:
        found: dict[bytes, int] = {}
        # in the order of the tree, neighbours lie on the same page
        wanted = sorted(set(fingerprints))
        wanted += [b""] * (-len(wanted) % _BATCH)
        with self._lock:
            try:
                for start in range(0, len(wanted), _BATCH):
                    found.update(self._db.execute(_IN, wanted[start : start + _BATCH]))
            except sqlite3.Error as error:
                raise self._error(error) from error
        return aligned(fingerprints, found)

    def insert(self, fingerprints: Sequence[bytes], first: int) -> int:
        rows = sorted(zip(fingerprints, range(first, first + len(fingerprints)), strict=True))

        def put(_: Rows) -> int:
            return self._db.executemany("INSERT OR IGNORE INTO chunks VALUES (?,?)", rows).rowcount

        return self.run(put)

    def scan(self, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        return self.run(
            lambda rows: [
                (bytes(fp), int(number))
                for fp, number in rows.all("SELECT fp, id FROM chunks WHERE fp > ? ORDER BY fp LIMIT ?", (after, limit))
            ]
        )

    def facts(self) -> dict[str, Any]:
        size = sum(path.stat().st_size for path in self.path.parent.glob(self.path.name + "*"))
        return {"kind": "sqlite", "where": str(self.path), "bytes": size}

    def close(self) -> None:
        with self._lock:
            self._db.close()
            os.close(self._guard)
