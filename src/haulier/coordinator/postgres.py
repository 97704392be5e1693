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
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from haulier.coordinator.backend import SCHEMA_VERSION, TABLES, Rows, T, TakenOver, Value, aligned
from haulier.coordinator.bitmaps import Ids
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, PeerError, Unsupported

try:
    import psycopg
    from psycopg import errors as pg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
except ImportError:
    raise Unsupported("PostgreSQL needs psycopg: install haulier with its extra, 'haulier[postgres]'") from None

log = logging.getLogger(__name__)

RETRY_S: Final = 10.0
"""How long a call waits for a server that restarts, or for a standby to take over."""
_PAUSE_S: Final = 0.25
_CONNECT_S: Final = 3
_LOCK: Final = 0x6861756C
"""Key of the advisory lock ("haul")."""
_LOOKUP: Final = 16384
_INSERT: Final = 16384
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
        except psycopg.ProgrammingError as error:
            raise Unsupported(
                f"the database's URL cannot be read ({error}): write postgresql://USER@HOST:PORT/NAME"
            ) from None
        hosts, ports = str(words.get("host") or "localhost").split(","), str(words.get("port") or 5432).split(",")
        ports = ports * len(hosts) if len(ports) == 1 else ports
        self._servers = ", ".join(f"{host}:{port}" for host, port in zip(hosts, ports, strict=False))
        self.where = f"PostgreSQL database {words.get('dbname') or words.get('user') or ''!s} at {self._servers}"
        self._lock = threading.RLock()
        self._db: psycopg.Connection[Any] | None = None
        self._holder = ""
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
            raise Conflict(f"another coordinator works on {self.where}: this one waits, and takes over when that ends")
        self._make_tables(db)
        with db.transaction():
            holder = _one(db, "SELECT value FROM meta WHERE name = 'holder'")
            if self._holder and holder != self._holder:
                raise TakenOver(f"another coordinator has worked on {self.where} meanwhile: loading anew")
            self._holder = self._holder or secrets.token_hex(8)
            db.execute(
                "INSERT INTO meta VALUES ('holder', %s) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (self._holder,),
            )

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
        end = time.monotonic() + self._retry_s
        with self._lock:
            while True:
                try:
                    if self._db is None:
                        self._db = self._connect()
                    return work(self._db)
                except TakenOver:
                    raise
                except (psycopg.OperationalError, pg.ReadOnlySqlTransaction, Conflict) as error:
                    # a Conflict is the session of our own broken connection, which the server has not noticed yet
                    if self._db is not None and (self._db.broken or not _is_remote(error)):
                        self._db.close()
                        self._db = None
                    if isinstance(error, pg.DiskFull) or time.monotonic() > end:
                        raise self._error(error) from error
                except psycopg.Error as error:
                    raise self._error(error) from error
                time.sleep(_PAUSE_S)

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
