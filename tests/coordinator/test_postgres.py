"""PostgreSQL servers that die: what is down is said, what was acknowledged is there afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg
import pytest

from haulier.coordinator import messages as m
from haulier.coordinator.backend import Backend, intern
from haulier.coordinator.host import Host, open_backend
from haulier.coordinator.postgres import PostgresBackend
from haulier.coordinator.service import Coordinator
from haulier.coordinator.shards import spread
from haulier.errors import Conflict, PeerError, UsageError
from tests.coordinator.samples import Site, fps
from tests.support.agents import free_port
from tests.support.postgres import Server, Servers
from tests.support.waiting import wait_for


class Reporter(threading.Thread):
    """A site that goes on reporting, each chunk until it is acknowledged, whatever dies meanwhile."""

    def __init__(self, host: Host, batches: int, size: int = 100) -> None:
        super().__init__()
        self._host = host
        self._batches = batches
        self.size = size
        self.acknowledged = 0
        self.failures: list[str] = []
        self.wrong: BaseException | None = None

    def run(self) -> None:
        try:
            while self.acknowledged < self._batches:
                self._step()
        except BaseException as error:
            self.wrong = error

    def _step(self) -> None:
        start = self.acknowledged * self.size
        try:
            self._host.use(lambda c: self._report(c, start))
            self.acknowledged += 1
        except PeerError as error:
            self.failures.append(str(error))

    def _report(self, coordinator: Coordinator, start: int) -> None:
        site = Site(coordinator, "oslo")
        # as an agent that saw by the revision that something may have been lost: everything anew
        site.report(range(start, start + self.size))

    def check(self) -> None:
        assert self.wrong is None, self.wrong


def host(url: str, retry_s: float = 1.0) -> Host:
    return Host(lambda: PostgresBackend(url, retry_s=retry_s))


def held(coordinator: Coordinator, count: int) -> int:
    answer = coordinator.lacking(m.LackingQuery(site="oslo", fingerprints=m.join(fps(range(count)))))
    return count - sum(byte.bit_count() for byte in answer.lacking)


def test_a_server_that_is_killed_and_restarted(pg: Servers) -> None:
    server = pg.new("alone")
    at = host(server.url)
    reporter = Reporter(at, 60)
    reporter.start()
    wait_for(lambda: reporter.acknowledged > 5)
    server.kill()
    wait_for(lambda: reporter.failures)
    assert f"127.0.0.1:{server.port}" in reporter.failures[0] and "cannot be reached" in reporter.failures[0]
    server.start()
    reporter.join(60)
    reporter.check()
    at.close()
    again = host(server.url)
    assert again.use(lambda c: held(c, 6000)) == 6000
    again.close()


def test_a_shard_that_is_killed_and_restarted(pg: Servers) -> None:
    server, shards = pg.new("head"), [pg.new(f"part{n}") for n in range(3)]
    assert spread(server.url, [shard.url for shard in shards]) == [f"haulier_shard{n}" for n in range(3)]
    at = host(server.url)
    reporter = Reporter(at, 40)
    reporter.start()
    wait_for(lambda: reporter.acknowledged > 5)
    shards[1].kill()
    wait_for(lambda: reporter.failures)
    assert "haulier_shard1" in reporter.failures[0] and "start that server" in reporter.failures[0]
    # what needs no dictionary is answered meanwhile
    assert at.use(lambda c: c.status())["chunks"]["held"] >= 500
    shards[1].start()
    reporter.join(60)
    reporter.check()
    found = at.use(lambda c: held(c, 4000))
    at.close()
    again = host(server.url)
    assert found == again.use(lambda c: held(c, 4000)) == 4000
    ids = again.use(lambda c: c.backend.lookup(fps(range(4000))))
    assert len(set(ids.tolist())) == 4000
    again.close()
    counts = []
    for shard in shards:
        with psycopg.connect(shard.url) as db:
            counts += [row[0] for row in db.execute("SELECT count(*) FROM haulier_chunks")]
    assert sum(counts) == 4000 and min(counts) > 1000, counts


def test_a_standby_takes_over(pg: Servers) -> None:
    primary = pg.new("primary")
    with psycopg.connect(primary.url, autocommit=True) as db:
        # what was acknowledged must be at the standby, too: for the test, and so in the documents
        db.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
    standby = pg.standby(primary, "standby")
    with psycopg.connect(primary.url, autocommit=True) as db:
        db.execute("SELECT pg_reload_conf()")
        wait_for(lambda: db.execute("SELECT sync_state FROM pg_stat_replication").fetchone() == ("sync",))
    # as an operator writes it: both, in any order; the one that takes writes is found
    url = f"postgresql://haulier@127.0.0.1:{standby.port},127.0.0.1:{primary.port}/postgres"
    at = host(url)
    reporter = Reporter(at, 60)
    reporter.start()
    wait_for(lambda: reporter.acknowledged > 5)
    primary.kill()
    wait_for(lambda: reporter.failures)
    assert f"127.0.0.1:{standby.port}, 127.0.0.1:{primary.port}" in reporter.failures[0]
    with psycopg.connect(standby.url, autocommit=True) as db:
        db.execute("SELECT 1")
    standby.promote()
    alone(standby)
    reporter.join(60)
    reporter.check()
    assert at.use(lambda c: held(c, 6000)) == 6000
    assert at.use(lambda c: c.status())["database"]["server"] == f"127.0.0.1:{standby.port}"
    # ids that the primary may have given at last, and the standby never heard of, are not given again
    ids = at.use(lambda c: c.backend.lookup(fps(range(6000))))
    assert len(set(ids.tolist())) == 6000 and ids.max() > 1 << 20
    at.close()


def alone(server: Server) -> None:
    """No longer waits for a standby of its own."""
    wait_for(lambda: _writes(server))
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("ALTER SYSTEM RESET synchronous_standby_names")
        db.execute("SELECT pg_reload_conf()")


def _writes(server: Server) -> bool:
    with psycopg.connect(server.url) as db:
        return db.execute("SELECT NOT pg_is_in_recovery()").fetchone() == (True,)


def test_a_second_coordinator_takes_over(pg: Servers) -> None:
    server = pg.new("shared")
    first, second = host(server.url), host(server.url)
    first.use(lambda c: Site(c, "oslo").report(range(10)))
    with pytest.raises(Conflict, match="another coordinator works on"):
        second.use(lambda c: c.status())
    # the first one's connection is cut: the second is faster, works, and ends
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
    wait_for(lambda: not _fails(lambda: second.use(lambda c: Site(c, "oslo").report(range(10, 20)))), 20)
    second.close()
    assert first.use(lambda c: held(c, 20)) == 20
    first.close()


def _fails(work: Callable[[], object]) -> bool:
    try:
        work()
    except Conflict:
        return True
    return False


def test_bad_urls_and_dead_servers() -> None:
    port = free_port()
    with pytest.raises(PeerError, match=f"127.0.0.1:{port} cannot be reached"):
        PostgresBackend(f"postgresql://haulier@127.0.0.1:{port}/x", retry_s=0)
    with pytest.raises(UsageError, match="cannot be read"):
        PostgresBackend("postgresql://[", retry_s=0)
    with pytest.raises(UsageError, match="bad database 'mysql"):
        open_backend(None, "mysql://x")  # type: ignore[arg-type]
    try:
        PostgresBackend(f"postgresql://haulier:hunter2@127.0.0.1:{port}/x", retry_s=0)
    except PeerError as error:
        assert "hunter2" not in str(error)


def test_spreading_what_is_in_use_is_refused(pg: Servers) -> None:
    used, empty = pg.new("used"), pg.new("empty")
    backend: Backend = PostgresBackend(used.url)
    intern(backend, fps(range(3)))
    with pytest.raises(Conflict, match="holds chunks already"):
        spread(used.url, [empty.url])
    backend.close()
    with psycopg.connect(empty.url, autocommit=True) as db:
        db.execute("INSERT INTO haulier_chunks VALUES ('x', 1)")
    with pytest.raises(Conflict, match="another dictionary"):
        spread(used.url, [empty.url])
    with pytest.raises(PeerError, match=r"shard 0 at 127.0.0.1:\d+ cannot be reached"):
        spread(used.url, [f"postgresql://haulier@127.0.0.1:{free_port()}/postgres"])
    with pytest.raises(UsageError):
        spread(used.url, [])
