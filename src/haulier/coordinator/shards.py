"""Spreads the chunk dictionary over several PostgreSQL servers, with PostgreSQL's own means: one table, partitioned by
hash, whose partitions are foreign tables. Done once, on an empty database; afterwards nobody here knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from haulier.errors import Conflict, PeerError, UsageError

TABLE: Final = "haulier_chunks"
"""At each shard."""
MOST: Final = 256
_CONNECT_S: Final = 3


def spread(database: str, shards: Sequence[str]) -> list[str]:
    """Makes the tables at `shards` (URLs) and in `database` the foreign tables that lead to them; names of the servers.

    PeerError if one cannot be reached, Conflict if there are chunks in the database already: nothing changes then
    but empty tables at shards. The role of `database` must be a superuser, or each shard's URL hold a password.
    """
    import psycopg
    from psycopg import sql
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    if not 1 <= len(shards) <= MOST:
        raise UsageError(f"{len(shards)} shards: give 1 to {MOST}")
    ways: list[dict[str, Any]] = []
    where = ""
    try:
        for number, url in enumerate(shards):
            way: dict[str, Any] = dict(conninfo_to_dict(url))
            where = f"shard {number} at {way.get('host') or 'localhost'}:{way.get('port') or 5432}"
            with psycopg.connect(make_conninfo(**{"connect_timeout": _CONNECT_S, **way}), autocommit=True) as db:
                db.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} (fp BYTEA PRIMARY KEY, id BIGINT NOT NULL)".encode())
                if db.execute(f"SELECT 1 FROM {TABLE} LIMIT 1".encode()).fetchone():
                    raise Conflict(f"{where} holds chunks of another dictionary: give it an empty database")
            ways.append(way)
        where = "the database"
        names = [f"haulier_shard{number}" for number in range(len(ways))]
        with psycopg.connect(database, connect_timeout=_CONNECT_S) as db:
            if db.execute("SELECT to_regclass('chunks') IS NOT NULL").fetchone() == (True,):
                if db.execute("SELECT 1 FROM chunks LIMIT 1").fetchone():
                    raise Conflict("the database holds chunks already: spread an empty one, which sites fill")
                db.execute("DROP TABLE chunks")
            db.execute("CREATE EXTENSION IF NOT EXISTS postgres_fdw")
            db.execute("CREATE TABLE chunks (fp BYTEA NOT NULL, id BIGINT NOT NULL) PARTITION BY HASH (fp)")
            for number, (name, way) in enumerate(zip(names, ways, strict=True)):
                server: dict[str, Any] = {
                    key: way[key] for key in ("host", "port", "dbname", "sslmode", "sslrootcert") if key in way
                }
                # asynchronous: all shards are asked at once; the sizes save round trips for lists of 16384
                server |= {"connect_timeout": _CONNECT_S, "async_capable": "true", "batch_size": 4096}
                server |= {"fetch_size": 20000, "keepalives_idle": 5, "tcp_user_timeout": 15000}
                role: dict[str, Any] = {key: way[key] for key in ("user", "password") if key in way}
                options = sql.SQL("CREATE SERVER {} FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({})")
                db.execute(options.format(sql.Identifier(name), _options(server)))
                mapping = sql.SQL("CREATE USER MAPPING FOR CURRENT_USER SERVER {} OPTIONS ({})")
                db.execute(mapping.format(sql.Identifier(name), _options(role)))
                part = sql.SQL(
                    "CREATE FOREIGN TABLE {} PARTITION OF chunks FOR VALUES WITH (MODULUS {}, REMAINDER {})"
                    " SERVER {} OPTIONS (table_name {})"
                )
                db.execute(
                    part.format(
                        sql.Identifier(f"chunks_{number}"), len(ways), number, sql.Identifier(name), sql.Literal(TABLE)
                    )
                )
    except psycopg.OperationalError as error:
        raise PeerError(f"{where} cannot be reached ({' '.join(str(error).split())[:300]}): is it running?") from None
    except psycopg.Error as error:
        raise UsageError(f"{where} refused ({' '.join(str(error).split())[:300]}); see docs/coordinator.md") from None
    return names


def _options(values: dict[str, Any]) -> Any:
    from psycopg import sql

    return sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(key), sql.Literal(str(value))) for key, value in values.items()
    )
