from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from haulier.coordinator.backend import Backend
from haulier.coordinator.postgres import PostgresBackend
from haulier.coordinator.shards import spread
from haulier.coordinator.sqlite import SqliteBackend
from tests.support.postgres import Server, Servers, servers


@pytest.fixture(scope="module")
def pg() -> Iterator[Servers]:
    with servers() as made:
        yield made


@dataclass
class Place:
    """Where a database is, so that it can be opened more than once."""

    kind: str
    path: Path
    url: str = ""

    def open(self) -> Backend:
        return PostgresBackend(self.url, retry_s=20) if self.url else SqliteBackend(self.path / "index.sqlite")


class Cluster:
    """One server for ordinary databases, one with three foreign shards; each started when first needed."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._plain: Server | None = None
        self._shards: list[Server] = []
        self._count = 0

    def url(self, kind: str) -> str:
        """Of a fresh database."""
        import psycopg

        self._count += 1
        name = f"t{self._count}"
        if self._plain is None:
            self._plain = self._servers.new("plain")
        if kind == "shards" and not self._shards:
            self._shards = [self._servers.new(f"shard{n}") for n in range(3)]
        for server in (self._plain, *self._shards) if kind == "shards" else (self._plain,):
            with psycopg.connect(server.url, autocommit=True) as db:
                db.execute(f"CREATE DATABASE {name}".encode())
        url = self._plain.url.replace("/postgres", f"/{name}")
        if kind == "shards":
            spread(url, [server.url.replace("/postgres", f"/{name}") for server in self._shards])
        return url


@pytest.fixture(scope="module")
def cluster(pg: Servers) -> Cluster:
    return Cluster(pg)


@pytest.fixture(params=["sqlite", "postgresql", "shards"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of database in turn."""
    with ExitStack():
        if request.param == "sqlite":
            yield Place("sqlite", tmp_path)
        else:
            yield Place(request.param, tmp_path, request.getfixturevalue("cluster").url(request.param))
