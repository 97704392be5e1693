"""One suite that every back end has to pass: SQLite, PostgreSQL, PostgreSQL with its dictionary on three servers."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from haulier.coordinator.backend import Rows, intern
from haulier.coordinator.service import Coordinator
from haulier.errors import Conflict
from tests.coordinator.conftest import Place
from tests.coordinator.samples import Clock, Site, fps, manifest


def test_ids_are_dense_in_order_and_stay(place: Place) -> None:
    backend = place.open()
    names = fps(range(40_000))
    assert intern(backend, names).tolist() == list(range(40_000))
    assert intern(backend, names[::-1][:50]).tolist() == list(range(39_999, 39_949, -1))
    assert backend.lookup([names[7], fps([-1])[0], names[7], names[39_999]]).tolist() == [7, -1, 7, 39_999]
    backend.close()
    backend = place.open()
    # known and new ones mixed, one twice: the new ones go on where the last ended
    mixed = [names[3], *fps([50_000]), names[4], *fps([50_001, 50_000])]
    assert intern(backend, mixed).tolist() == [3, 40_000, 4, 40_001, 40_000]
    assert backend.lookup([]).tolist() == []
    backend.close()


def test_an_interrupted_insert_leaves_gaps_and_never_two_ids(place: Place) -> None:
    backend = place.open()
    names = fps(range(10))
    # as by a coordinator that died after a part of its batch had become durable
    assert backend.insert(names[4:6], 100) == 2
    backend.run(lambda rows: rows.do("INSERT INTO counters VALUES ('id', 200)"))
    ids = intern(backend, names).tolist()
    assert ids[4:6] == [100, 101] and len(set(ids)) == 10 and min(ids[:4] + ids[6:]) >= 200
    assert backend.lookup(names).tolist() == ids
    assert backend.insert(names, 500) == 0
    backend.close()


def test_a_transaction_is_whole_or_nothing(place: Place) -> None:
    backend = place.open()

    def half(rows: Rows) -> None:
        rows.do("INSERT INTO meta VALUES ('a', '1')")
        rows.many("INSERT INTO manifests VALUES (?,?,?)", [(b"\0\xff", 1 << 40, b""), (b"\1", 0, b"\0" * 100_000)])
        raise KeyError("crash")

    with pytest.raises(KeyError):
        backend.run(half)
    assert backend.run(lambda rows: rows.all("SELECT * FROM meta WHERE name='a'")) == []
    with pytest.raises(KeyError):
        backend.run(lambda rows: {}["x"])
    with pytest.raises(KeyError):
        half(_Kept(backend))
    found = backend.run(lambda rows: rows.all("SELECT digest, size, bits FROM manifests ORDER BY digest"))
    assert [(bytes(d), s, bytes(b)) for d, s, b in found] == [(b"\0\xff", 1 << 40, b""), (b"\1", 0, b"\0" * 100_000)]
    backend.close()


class _Kept:
    """Runs each statement in a transaction of its own."""

    def __init__(self, backend) -> None:
        self._backend = backend

    def do(self, *words) -> None:
        self._backend.run(lambda rows: rows.do(*words))

    def many(self, *words) -> None:
        self._backend.run(lambda rows: rows.many(*words))


def test_scan_gives_all_in_order(place: Place) -> None:
    backend = place.open()
    names = fps(range(1000))
    intern(backend, names)
    found: list[tuple[bytes, int]] = []
    while page := backend.scan(found[-1][0] if found else b"", 300):
        found += page
    assert found == sorted(zip(names, range(1000), strict=True))
    backend.close()


def test_one_coordinator_a_database(place: Place) -> None:
    backend = place.open()
    quick = place.open if place.kind == "sqlite" else lambda: type(backend)(place.url, retry_s=0.5)  # type: ignore[call-arg, arg-type]
    with pytest.raises(Conflict, match="another coordinator"):
        quick()
    backend.close()
    quick().close()


def test_threads_may_share_it(place: Place) -> None:
    backend = place.open()
    names = fps(range(2000))
    found: list[list[int]] = []

    def work(start: int) -> None:
        # all threads want overlapping chunks at once
        found.append(intern(backend, names[start : start + 1000]).tolist())

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 250, 500, 750, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = backend.lookup(names)
    assert len(np.unique(ids)) == 2000 and ids.min() >= 0
    assert sorted(map(tuple, found)) == sorted(tuple(ids[s : s + 1000].tolist()) for s in (0, 250, 500, 750, 1000))
    backend.close()


def test_everything_is_there_again_after_a_restart(place: Place) -> None:
    clock = Clock()
    backend = place.open()
    one = Coordinator(backend, clock)
    oslo, lisbon = Site(one, "oslo"), Site(one, "lisbon")
    digest = oslo.has_manifest("image/web", range(100))
    oslo.report(complete=[digest], replace=True)
    lisbon.report(range(50, 200))
    lisbon.report([], range(60, 70))
    from haulier.coordinator import messages as m

    guest = m.GuestEntry(name="web1", state="owner", owner="oslo", epoch=3, manifest="guest/web1")
    one.guest_report("oslo", m.GuestsReport(replace=True, guests=[guest]))
    one.link_report("oslo", m.LinksReport(links=[m.LinkEntry(source="lisbon", rate_bps=5e6, rtt_s=0.2, measured=9.0)]))
    query = m.HoldersQuery(fingerprints=m.join(fps(range(200))), site="rome")
    asked = one.holders(query)
    before = one.status()
    one.close()
    backend.close()

    backend = place.open()
    again = Coordinator(backend, clock)
    after = again.status()
    assert after["database"]["id"] == before["database"]["id"]
    for part in ("sites", "links", "images", "guests", "chunks"):
        assert after[part] == before[part], part
    assert again.holders(query) == asked
    facts = again.facts(m.FactsQuery(fingerprints=m.join(fps([0, 60, 75, 150, 999])), site="oslo"))
    assert (facts.references, facts.copies) == ([1, 1, 1, 0, 0], [1, 1, 2, 1, 0])
    assert facts.popularity == pytest.approx([2, 2, 2, 2, 0], rel=1e-2)
    assert again.index.manifests[manifest(range(100)).digest] == one.index.manifests[digest]
    again.close()
    backend.close()
