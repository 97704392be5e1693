"""The back end for fleets: PostgreSQL 14 or later, by way of psycopg (the extra ``postgres``).

One connection, held by one coordinator at a time (an advisory lock says so). The URL may name several hosts: the one
that accepts writes is used, so that a standby which is promoted takes over. A broken connection is opened again and
the transaction, which did not commit or does the same once more, is run again.

The dictionary ``chunks`` is a plain table, or one partitioned by hash over foreign tables on other servers (shards.py);
queries are the same. Without a unique key over all partitions, each partition's own key decides: equal fingerprints
have equal hashes and so the same partition.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from haulier.coordinator.backend import SCHEMA_VERSION, TABLES, Rows, T, TakenOver, Value, aligned
from haulier.coordinator.bitmaps import Ids
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, PeerError, UsageError

log = logging.getLogger(__name__)

RETRY_S: Final = 10.0
"""How long a call waits for a server that restarts, or for a standby to take over."""
_PAUSE_S: Final = 0.25
_CONNECT_S: Final = 3
_LOCK: Final = 0x6861756C
"""Key of the advisory lock ("haul")."""
_LOOKUP: Final = 16384
_INSERT: Final = 16384
_SKIP: Final = 1 << 20
"""Ids passed over after a standby was promoted."""
_SERVER: Final = re.compile(r'server "([^"]{1,63})"')


class _Rows:
    def __init__(self, cursor: psycopg.Cursor[Any]) -> None:
        self._cursor = cursor

    def all(self, sql: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        return self._cursor.execute(_marks(sql), values).fetchall()

    def do(self, sql: str, values: Sequence[Value] = ()) -> None:
        self._cursor.execute(_marks(sql), values)

    def many(self, sql: str, rows: Iterable[Sequence[Value]]) -> None:
        self._cursor.executemany(_marks(sql), rows)


def _marks(sql: str) -> bytes:
    return sql.replace("?", "%b").replace("%b::", "%s::").encode()


class PostgresBackend:
    """The database at `url`; tables are made if they are not there.

    Raises PeerError, naming the servers, when none of them accepts writes; Conflict while another coordinator works
    on the database.
    """

    def __init__(self, url: str, retry_s: float = RETRY_S) -> None:
        self._url = url
        self._retry_s = retry_s
        try:
            words = conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            # libpq's own words repeat the URL, in which there may be a password
            raise UsageError("the database's URL cannot be read: write postgresql://USER@HOST:PORT/NAME") from None
        hosts, ports = str(words.get("host") or "localhost").split(","), str(words.get("port") or 5432).split(",")
        ports = ports * len(hosts) if len(ports) == 1 else ports
        self._servers = ", ".join(f"{host}:{port}" for host, port in zip(hosts, ports, strict=False))
        self.where = f"PostgreSQL database {words.get('dbname') or words.get('user') or ''!s} at {self._servers}"
        self._lock = threading.RLock()
        self._db: psycopg.Connection[Any] | None = None
        self._connected = False
        self._down_since: float | None = None
        self.run(lambda rows: None)

    # -- the connection

    def _connect(self) -> psycopg.Connection[Any]:
        # a server that vanished must not hold us for the two hours that TCP would wait
        settings: dict[str, Any] = {"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 3}
        settings |= {"tcp_user_timeout": 15000, "connect_timeout": _CONNECT_S, "target_session_attrs": "read-write"}
        settings |= {"application_name": "haulier"}
        given = conninfo_to_dict(self._url)
        db = psycopg.connect(make_conninfo(**{**settings, **given}), autocommit=True)
        try:
            self._take(db)
        except BaseException:
            db.close()
            raise
        return db

    def _take(self, db: psycopg.Connection[Any]) -> None:
        if not _one(db, "SELECT pg_try_advisory_lock(%s)", (_LOCK,)):
            raise Conflict(f"another coordinator works on {self.where}: this one takes over when that one ends")
        self._make_tables(db)
        with db.transaction():
            # a standby that was promoted may lack the last ids that its primary gave, while shards have them
            timeline = _one(db, "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)")
            known = _one(db, "SELECT value FROM meta WHERE name = 'timeline'")
            if timeline != known:
                put = "INSERT INTO meta VALUES ('timeline', %s) ON CONFLICT (name) DO UPDATE SET value=excluded.value"
                db.execute(put.encode(), (timeline,))
                if known is not None:
                    db.execute("UPDATE counters SET value = value + %s WHERE name = 'id'", (_SKIP,))
        db.execute("SET enable_partition_pruning = off")  # it would look at each of 16384 fingerprints first
        if self._connected:
            # somebody else may have written meanwhile, or a standby may lack the last that was written
            raise TakenOver(f"the connection to {self.where} was lost: loading anew")
        self._connected = True

    def _make_tables(self, db: psycopg.Connection[Any]) -> None:
        with db.transaction():
            if _one(db, "SELECT to_regclass('meta') IS NOT NULL"):
                version = int(_one(db, "SELECT value FROM meta WHERE name = 'schema'") or 0)
                if version != SCHEMA_VERSION:
                    raise Corrupt(f"{self.where} is of version {version}, known is {SCHEMA_VERSION}: update haulier")
                return
            for table in TABLES:
                db.execute(f"CREATE TABLE {table.replace('BYTES', 'BYTEA')}".encode())
            # whoever spreads the dictionary has made it before
            db.execute("CREATE TABLE IF NOT EXISTS chunks (fp BYTEA PRIMARY KEY, id BIGINT NOT NULL)")
            db.execute("INSERT INTO meta VALUES ('schema', %s)", (str(SCHEMA_VERSION),))

    def _with(self, work: Callable[[psycopg.Connection[Any]], T]) -> T:
        """Runs `work` with a connection; again, with a new one, where the old one or a server behind it broke."""
        if not self._lock.acquire(timeout=2 * self._retry_s):
            raise PeerError(f"{self.where} is busy or does not answer: try again later")
        try:
            # whoever comes after a wait that was in vain does not wait as long once more
            end = (self._down_since or time.monotonic()) + self._retry_s
            while True:
                try:
                    if self._db is None:
                        self._db = self._connect()
                    found = work(self._db)
                except TakenOver:
                    raise
                except (psycopg.OperationalError, pg.ReadOnlySqlTransaction, Conflict) as error:
                    # a Conflict may be the session of our own lost connection, which the server has not noticed yet
                    if self._db is not None and not (_is_remote(error) and not self._db.broken):
                        self._db.close()
                        self._db = None
                    if isinstance(error, pg.DiskFull) or time.monotonic() > end:
                        self._down_since = self._down_since or time.monotonic() - self._retry_s
                        raise self._error(error) from error
                except psycopg.Error as error:
                    raise self._error(error) from error
                else:
                    self._down_since = None
                    return found
                time.sleep(_PAUSE_S)
        finally:
            self._lock.release()

    def _error(self, error: Exception) -> HaulierError:
        if isinstance(error, HaulierError):
            return error
        text = " ".join(str(error).split())[:500]
        if isinstance(error, pg.DiskFull):
            return NoRoom(f"no room left for {self.where} ({text}): free some space there, then try again")
        found = _SERVER.search(text)
        if found:
            return PeerError(
                f"{self.where} cannot reach its foreign server {found[1]!r} ({text}): start that server; "
                "what it holds is not lost"
            )
        if isinstance(error, (psycopg.OperationalError, pg.ReadOnlySqlTransaction)):
            return PeerError(f"{self.where} cannot be reached, or takes no writes ({text}): is the server running?")
        return HaulierError(f"{self.where} refused a statement: {text}")

    # -- the protocol

    def run(self, work: Callable[[Rows], T]) -> T:
        def once(db: psycopg.Connection[Any]) -> T:
            with db.transaction(), db.cursor(binary=True) as cursor:
                return work(_Rows(cursor))

        return self._with(once)

    def lookup(self, fingerprints: Sequence[bytes]) -> Ids:
        wanted = sorted(set(fingerprints))
        found: dict[bytes, int] = {}

        def look(part: list[bytes]) -> Callable[[psycopg.Connection[Any]], list[Any]]:
            def once(db: psycopg.Connection[Any]) -> list[Any]:
                with db.cursor(binary=True) as cursor:
                    return cursor.execute("SELECT fp, id FROM chunks WHERE fp = ANY(%b)", (part,)).fetchall()

            return once

        for start in range(0, len(wanted), _LOOKUP):
            found.update(self._with(look(wanted[start : start + _LOOKUP])))
        return aligned(fingerprints, found)

    def insert(self, fingerprints: Sequence[bytes], first: int) -> int:
        def put(fps: Sequence[bytes], ids: list[int]) -> Callable[[psycopg.Connection[Any]], int]:
            def once(db: psycopg.Connection[Any]) -> int:
                with db.transaction(), db.cursor(binary=True) as cursor:
                    cursor.execute(
                        "INSERT INTO chunks SELECT * FROM unnest(%b::bytea[], %b::int8[]) ON CONFLICT DO NOTHING",
                        (list(fps), ids),
                    )
                    return cursor.rowcount

            return once

        new = 0
        for start in range(0, len(fingerprints), _INSERT):
            part = fingerprints[start : start + _INSERT]
            new += self._with(put(part, list(range(first + start, first + start + len(part)))))
        return new

    def scan(self, after: bytes, limit: int) -> list[tuple[bytes, int]]:
        def once(db: psycopg.Connection[Any]) -> list[tuple[bytes, int]]:
            with db.cursor(binary=True) as cursor:
                query = "SELECT fp, id FROM chunks WHERE fp > %b ORDER BY fp LIMIT %s"
                return [(bytes(fp), number) for fp, number in cursor.execute(query, (after, limit))]

        return self._with(once)

    def facts(self) -> dict[str, Any]:
        def once(db: psycopg.Connection[Any]) -> dict[str, Any]:
            size = int(_one(db, "SELECT pg_database_size(current_database())"))
            address = f"{db.info.host}:{db.info.port}"
            servers = db.execute(
                "SELECT s.srvname, s.srvoptions FROM pg_foreign_server s"
                " JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw WHERE w.fdwname = 'postgres_fdw' ORDER BY 1"
            ).fetchall()
            return {
                "kind": "postgresql",
                "where": self._servers,
                "server": address,
                "bytes": size,
                "shards": [{"name": name, "options": options or []} for name, options in servers],
            }

        return self._with(once)

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None


def _is_remote(error: BaseException) -> bool:
    """Whether a server behind ours failed, while our own connection is sound."""
    return isinstance(error, psycopg.Error) and _SERVER.search(str(error)) is not None


def _one(db: psycopg.Connection[Any], sql: str, values: Sequence[Any] = ()) -> Any:
    row = db.execute(sql.encode(), values).fetchone()
    return row[0] if row else None
