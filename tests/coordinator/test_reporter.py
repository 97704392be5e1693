"""What an agent reports, step by step, to a coordinator that fails when it is told to."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.agent.routes import Call
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.coordinator import routes
from haulier.coordinator.client import CoordinatorClient
from haulier.coordinator.host import Host
from haulier.coordinator.reporter import Reporter
from haulier.coordinator.service import Coordinator
from haulier.coordinator.sqlite import SqliteBackend
from haulier.errors import PeerError
from haulier.handoff.journal import HandoffRow, Journal
from haulier.units import CHUNK
from tests.chunks.samples import chunk
from tests.coordinator.samples import fps


class Wire:
    """In place of a `Client`: straight to the routes, as site oslo; `fail_at` counts calls that are still answered."""

    where = "the coordinator"

    def __init__(self, host: Host, site: Site) -> None:
        self.coordinator: Host | None = host
        self.site = site
        self.fail_at: int | None = None
        self.lose_answers = False
        self.said: list[str] = []

    def post(self, path: str, body: Any, timeout: float = 0) -> dict[str, Any]:
        import msgspec

        self._maybe_fail()
        route = next(r for r in routes.TABLE if r.path == path and r.method == "POST")
        self.said.append(path.rpartition("/")[2])
        answer = route.handler(self, Call("oslo", {}, msgspec.json.encode(body), {}))
        if self.lose_answers and path.endswith("/holdings"):
            raise PeerError("the coordinator did not answer")
        return answer

    def _maybe_fail(self) -> None:
        if self.fail_at is not None:
            if self.fail_at == 0:
                raise PeerError("the coordinator is not there")
            self.fail_at -= 1


@dataclasses.dataclass
class Bench:
    site: Site
    store: ChunkStore
    journal: Journal
    reporter: Reporter
    wire: Wire
    host: Host
    now: list[float]

    def step(self) -> None:
        self.now[0] += 100
        self.reporter.step()

    def held(self) -> int:
        return self.host.use(lambda c: len(c.index.of_site("oslo")))

    def put(self, name: str, seeds: range) -> None:
        with self.store.sibling() as store:
            table = b"".join(store.put(chunk(seed)) for seed in seeds)
            store.save_manifest(name, Manifest(len(seeds) * CHUNK, table))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    site = Site(tmp_path / "site", "oslo", "127.0.0.1:1", coordinator="https://127.0.0.1:1")
    site.save()
    host = Host(lambda: SqliteBackend(tmp_path / "coordinator" / "index.sqlite"))
    wire = Wire(host, site)
    monkeypatch.setattr(CoordinatorClient, "of", lambda site: CoordinatorClient(wire))
    now = [0.0]
    with ChunkStore(site.store) as store, Journal(site.journal) as journal:
        yield Bench(site, store, journal, Reporter(site, journal, store, lambda: now[0]), wire, host, now)
    host.close()


def test_only_what_changed_is_said(bench: Bench) -> None:
    bench.put("image/web", range(10))
    bench.step()
    assert bench.held() == 10
    first = list(bench.wire.said)
    assert first == ["hello", "guests", "manifests", "manifest", "holdings"]
    bench.step()
    assert bench.wire.said[len(first) :] == ["hello"]
    bench.put("guest/x", range(5, 12))
    bench.step()
    assert bench.held() == 12
    bench.store.drop_manifest("image/web")
    bench.store.gc()
    bench.step()
    assert bench.held() == 7
    assert bench.host.use(lambda c: list(c.fleet.names["oslo"])) == ["guest/x"]


@pytest.mark.parametrize("fail_at", range(8))
@pytest.mark.parametrize("lose", [False, True])
def test_a_failure_anywhere_is_made_up_for(bench: Bench, fail_at: int, lose: bool) -> None:
    bench.put("image/web", range(10))
    bench.step()
    bench.store.put(chunk(50))
    bench.store.commit()
    bench.put("guest/x", range(5, 12))
    bench.wire.fail_at, bench.wire.lose_answers = fail_at, lose
    bench.step()
    bench.wire.fail_at, bench.wire.lose_answers = None, False
    bench.store.drop_manifest("image/web")
    bench.step()
    bench.step()
    assert bench.held() == 13
    bench.put("image/new", range(3, 6))
    bench.step()
    assert bench.held() == 13
    assert bench.host.use(lambda c: sorted(c.fleet.names["oslo"])) == ["guest/x", "image/new"]


def test_a_coordinator_with_older_data_is_told_anew(bench: Bench) -> None:
    bench.put("image/web", range(10))
    bench.step()

    def older(c: Coordinator) -> None:
        import msgspec

        from haulier.coordinator import bitmaps

        c.index.holdings["oslo"] = bitmaps.empty()
        c.fleet.sites["oslo"] = msgspec.structs.replace(c.fleet.sites["oslo"], revision=0)

    bench.host.use(older)
    bench.step()
    assert bench.held() == 10


def test_others_settings_and_nonsense_do_no_harm(bench: Bench) -> None:
    bench.put("image/web", range(4))
    path = bench.site.root / "site.toml"
    text = path.read_text()
    bench.step()
    path.write_text(text.replace("https://127.0.0.1:1", "ftp://x"))
    bench.put("image/more", range(4, 6))
    bench.step()
    assert bench.held() == 6, "goes on with what it has"
    path.write_text(text)
    bench.step()
    assert fps([1])[0] not in bench.host.use(lambda c: c.unreferenced("oslo", b"")).fingerprints


def handed(bench: Bench, name: str, ended: float, rate_bps: float) -> None:
    """A handoff to lisbon that is over, and what it reported."""
    bench.journal.add_handoff(
        HandoffRow(name, "web1", "source", "lisbon", "ended", created=ended, ended=ended, outcome="done")
    )
    root = bench.site.handoff_root(name)
    root.mkdir(parents=True)
    (root / "report.json").write_text(json.dumps({"rate_bps": rate_bps, "rtt_s": 0.05}))


def test_links_are_learnt_from_handoffs_that_ended_once_there_is_a_coordinator(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    real = bench.journal.handoffs

    def handoffs(*of: Any, **more: Any) -> list[HandoffRow]:
        asked.append(more)
        return real(*of, **more)

    monkeypatch.setattr(bench.journal, "handoffs", handoffs)
    client = CoordinatorClient(bench.wire)
    monkeypatch.setattr(CoordinatorClient, "of", lambda site: client if site.coordinator else None)
    bench.site.set(coordinator="")
    now = time.time()
    handed(bench, "before", now - 3600, 1e6)
    handed(bench, "second", now + 2, 3e6)
    handed(bench, "first", now + 1, 2e6)
    bench.step()
    assert asked == [], "nobody wants to know"
    bench.site.set(coordinator="https://127.0.0.1:1")
    for _ in range(2):
        bench.step()
    links = bench.host.use(lambda c: dict(c.fleet.links["lisbon"]))
    assert {site: (link.rate_bps, link.measured) for site, link in links.items()} == {"oslo": (3e6, now + 2)}
    assert {"ended_after": now + 2} in asked, "no report is read again"
