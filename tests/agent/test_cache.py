"""The cache of a site: budget, policy, pins, and what stands against an offer."""

from __future__ import annotations

import os
import tomllib
from typing import Any

import pytest

from haulier.agent import cache as cache_module
from haulier.agent import prices
from haulier.agent.cache import Cache, Change, PinRequest
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.coordinator.client import ChunkFacts
from haulier.errors import Conflict, PeerError, UnknownThing, UsageError
from haulier.policy.coordinated import Facts
from haulier.policy.model import NAMES
from haulier.units import CHUNK
from tests.agent.conftest import Fleet

ROOM = CHUNK + 64


@pytest.fixture
def cache(fleet: Fleet) -> Cache:
    """Oslo's, whose agent does nothing by itself."""
    agent = fleet.at_oslo
    agent._stopping.set()
    for loop in agent._loops:
        loop.join(10)
    return agent.cache


def fill(store: ChunkStore, name: str, chunks: int) -> list[bytes]:
    """A manifest of new chunks."""
    fps = [store.put(os.urandom(CHUNK)) for _ in range(chunks)]
    store.save_manifest(name, Manifest(chunks * CHUNK, b"".join(fps)))
    return fps


def left(store: ChunkStore, fps: list[bytes]) -> int:
    return len(fps) - len(store.missing(fps))


def age(store: ChunkStore, fps: list[bytes], seconds: int) -> None:
    with store.index.write() as db:
        db.executemany("UPDATE chunks SET came=came-?, used=used-? WHERE fp=?", ((seconds, seconds, fp) for fp in fps))


@pytest.mark.parametrize("policy", NAMES)
def test_what_is_over_the_budget_goes_and_what_is_in_use_stays(cache: Cache, policy: str) -> None:
    store = cache.store
    used, kept = fill(store, "guest/web1", 10), fill(store, "image/deb", 10)
    past, leased = fill(store, "old", 30), [store.put(os.urandom(CHUNK), lease="handoff/h1") for _ in range(5)]
    store.commit()
    store.drop_manifest("old")
    assert cache.upkeep() is None  # no limit
    assert left(store, past) == 30
    cache.change(Change(policy=policy, budget=40 * ROOM))
    assert (left(store, used), left(store, kept), left(store, leased)) == (10, 10, 5)
    assert 13 <= left(store, past) <= 15  # 25 are in use; a little more than needed goes
    facts = cache.facts()
    assert facts["used"] <= 40 * ROOM and facts["referenced"] == 25 * ROOM and facts["over"] == 0
    assert facts["evicted_chunks"] == 30 - left(store, past) == facts["evicted_bytes"] // ROOM
    assert store.check().ok
    cache.change(Change(budget=20 * ROOM))
    facts = cache.facts()
    assert (facts["cached"], facts["over"], facts["policy"]) == (0, 5 * ROOM, policy)
    assert (left(store, used), left(store, kept), left(store, leased)) == (10, 10, 5)


def test_the_least_recently_used_goes_first(cache: Cache) -> None:
    store = cache.store
    old, new = fill(store, "old", 10), fill(store, "new", 10)
    age(store, old, 2000)
    age(store, new, 1000)
    for name in ("old", "new"):
        store.drop_manifest(name)
    store.touch(old[:3])
    cache.change(Change(policy="lru", budget=13 * ROOM))
    assert (left(store, old[:3]), left(store, old[3:]), left(store, new)) == (3, 0, 9)  # a little more than needed


def test_gdsf_gives_up_what_is_cheap_to_fetch_again(fleet: Fleet, cache: Cache) -> None:
    """Lisbon has half of it, so that is the cheap half."""
    store = cache.store
    both, only = fill(store, "both", 10), fill(store, "only", 10)
    for fp in both:
        fleet.at_lisbon.store.put(store.get(fp))
    fleet.at_lisbon.store.commit()
    for name in ("both", "only"):
        store.drop_manifest(name)
    facts = cache.prices.of([*both, *only])
    assert facts[both[0]].copies == 1 and facts[only[0]].copies == 0
    assert facts[both[0]].refetch_s < facts[only[0]].refetch_s
    cache.change(Change(policy="gdsf", budget=10 * ROOM))
    assert left(store, both) == 0 and left(store, only) >= 9


def test_s3_fifo_knows_what_comes_back(cache: Cache) -> None:
    store = cache.store
    cache.change(Change(policy="s3-fifo", budget=20 * ROOM))
    first = fill(store, "a", 30)
    store.drop_manifest("a")
    datas = {fp: store.get(fp) for fp in first}
    cache.upkeep()
    back = [fp for fp in first if not store.has(fp)][:3]
    age(store, first, 100)
    with store.index.write() as db:
        db.execute("UPDATE ghosts SET gone=gone-50")
    for fp in back:
        store.put(datas[fp])
    store.save_manifest("b", Manifest(3 * CHUNK, b"".join(back)))
    store.drop_manifest("b")
    scan = fill(store, "scan", 25)
    store.drop_manifest("scan")
    cache.upkeep()
    assert left(store, back) == 3 and left(store, scan) < 25
    assert store.room().used <= 20 * ROOM


def test_settings_are_kept(fleet: Fleet) -> None:
    fleet.client.post("/v1/cache", {"policy": "s3-fifo", "budget": 123_456})
    site = Site.load(fleet.oslo.root)
    assert (site.cache_policy, site.store_budget) == ("s3-fifo", 123_456)
    assert tomllib.loads((site.root / "site.toml").read_text())["name"] == "oslo"
    assert fleet.client.get("/v1/cache")["policy"] == "s3-fifo"
    for wrong in ({"policy": "best"}, {"budget": -1}, {"budget": 1 << 61}, {"policy": 7}):
        with pytest.raises(UsageError):
            fleet.client.post("/v1/cache", wrong)
    assert Site.load(fleet.oslo.root) == site


def test_an_image_is_pinned_until_it_is_let_go(fleet: Fleet, cache: Cache) -> None:
    store = cache.store
    fps = fill(store, "image/deb", 6)
    lisbon = fleet.at_lisbon
    for fp in fps:
        lisbon.store.put(store.get(fp))
    lisbon.store.commit()
    with pytest.raises(Conflict, match="no other site has all of image 'deb' pinned"):
        cache.pin("deb", PinRequest(pinned=False))  # there it is cache, which may go
    lisbon.store.save_manifest("image/deb", store.load_manifest("image/deb"))
    assert cache.pin("deb", PinRequest(pinned=False)) == {"name": "deb", "pinned": False, "chunks": 6, "here": 6}
    cache.change(Change(policy="lru", budget=4 * ROOM))
    assert cache.facts()["images"] == [{"name": "deb", "pinned": False, "chunks": 6, "here": 3}]
    assert cache.pin("deb", PinRequest(pinned=True))["pinned"]
    cache.change(Change(budget=1))
    assert cache.facts()["images"][0]["here"] == 3
    with pytest.raises(UnknownThing):
        cache.pin("none", PinRequest(pinned=True))
    assert cache.pin("deb", PinRequest(pinned=False, force=True))["here"] == 3


def test_two_sites_that_let_go_of_an_image_at_once_both_keep_it(
    fleet: Fleet, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache.store, "image/deb", 6)
    elsewhere = cache._check_elsewhere
    answers = iter([None, elsewhere])  # the other has let go of it when it is asked again

    def asked(*words: Any) -> None:
        ask = next(answers)
        if ask is not None:
            ask(*words)

    monkeypatch.setattr(cache, "_check_elsewhere", asked)
    with pytest.raises(Conflict, match="no other site has all of image 'deb' pinned"):
        cache.pin("deb", PinRequest(pinned=False))
    assert cache.store.is_pinned("image/deb")


def collect(fleet: Fleet, **request: bool) -> dict[str, Any]:
    return dict(fleet.client.wait(fleet.client.post("/v1/gc", request))["store"])


def test_gc_takes_what_is_not_worth_its_room_and_a_dry_run_says_so_exactly(fleet: Fleet, cache: Cache) -> None:
    store = cache.store
    store.add_lease("handoff/over")
    ended = [store.put(os.urandom(CHUNK), lease="handoff/over") for _ in range(4)]
    store.commit()
    old, new = fill(store, "old", 5), fill(store, "new", 8)
    age(store, old, 40 * 86400)
    store.drop_manifest("old")
    store.drop_manifest("new")
    cache.budget, cache.policy = 10 * ROOM, "lru"
    would, did = collect(fleet, dry_run=True), collect(fleet, dry_run=False)
    assert left(store, old) == 0
    assert {**did, "dry_run": True} | {"freed": 0, "compacted": 0, "removed": 0} == would
    assert (did["chunks"], did["cached"]) == (7, 10)
    assert left(store, ended) + left(store, new) == 10
    assert collect(fleet, dry_run=False)["chunks"] == 0
    assert collect(fleet, dry_run=True, everything=True)["chunks"] == 10
    cache.budget = 0
    assert collect(fleet, dry_run=False)["chunks"] == 10


def test_gc_without_a_budget_spares_what_still_belongs_to_something(fleet: Fleet, cache: Cache) -> None:
    store = cache.store
    moved, past = fill(store, "retained/web1", 5), fill(store, "past", 4)
    store.pin_manifest("retained/web1", False)
    store.drop_manifest("past")
    assert collect(fleet, dry_run=True)["chunks"] == collect(fleet)["chunks"] == 4
    assert (left(store, moved), left(store, past)) == (5, 0)
    age(store, moved[:2], 40 * 86400)
    assert collect(fleet)["chunks"] == 2
    assert collect(fleet, everything=True)["chunks"] == 3


def test_a_disk_that_is_nearly_full_makes_the_cache_give_way(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cache.store
    past = fill(store, "past", 10)
    store.drop_manifest("past")
    real = cache_module.shutil.disk_usage
    monkeypatch.setattr(
        cache_module.shutil, "disk_usage", lambda path: real(path)._replace(free=cache_module.LOW_DISK - 3 * ROOM)
    )
    cache.upkeep()
    assert left(store, past) == 7


def test_upkeep_yields_to_a_collection(cache: Cache) -> None:
    from haulier.chunks.collect import alone

    store = cache.store
    fill(store, "past", 10)
    store.drop_manifest("past")
    cache.budget = 5 * ROOM
    with alone(store):
        assert cache.upkeep() is None
    report = cache.upkeep()
    assert report is not None and report.chunks >= 5
    assert cache.upkeep() is None


def test_an_evicted_image_is_fetched_again_for_a_guest(fleet: Fleet, cache: Cache) -> None:
    agent, store = fleet.at_oslo, cache.store
    fps = fill(store, "image/deb", 6)
    image = store.load_manifest("image/deb")
    for fp in fps:
        fleet.at_lisbon.store.put(store.get(fp))
    fleet.at_lisbon.store.commit()
    fleet.at_lisbon.store.save_manifest("image/deb", image)
    cache.pin("deb", PinRequest(pinned=False))
    cache.change(Change(budget=2 * ROOM))
    assert left(store, fps) <= 2
    told: list[str] = []
    agent.guests._bring("run/web1", image, None, lambda share, text: told.append(text))
    assert left(store, fps) == 6 and store.leases() == ["run/web1"]
    cache.upkeep()
    assert left(store, fps) == 6  # kept until the guest has a manifest of its own
    agent.guests.adopt()
    assert store.leases() == []


def test_the_coordinator_says_what_chunks_cost(fleet: Fleet, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told:
        def facts(self, fps: list[bytes], for_site: str) -> list[ChunkFacts]:
            assert for_site == "oslo"
            return [ChunkFacts(0, n + 1, 3.0, (0.5, float("inf"))[n % 2]) for n in range(len(fps))]

    monkeypatch.setattr(prices.CoordinatorClient, "of", lambda site: Told())
    facts = cache.prices.of([b"a", b"b"])
    assert facts[b"a"] == Facts(0.5 / CHUNK, 0, 3.0)
    assert facts[b"b"] == Facts(prices.UNKNOWN_S, 1, 3.0)

    class Gone:
        def facts(self, fps: list[bytes], for_site: str) -> list[ChunkFacts]:
            raise PeerError("the coordinator does not answer")

    monkeypatch.setattr(prices.CoordinatorClient, "of", lambda site: Gone())
    assert cache.prices.of([os.urandom(32)]).popitem()[1].copies == 0
    assert cache.prices.of([]) == {}


def test_upkeep_rests_in_proportion(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    now, looked = [100.0], []

    def look() -> None:
        looked.append(now[0])
        now[0] += 3.0

    monkeypatch.setattr(cache, "_monotonic", lambda: now[0])
    monkeypatch.setattr(cache, "upkeep", look)
    for _ in range(40):
        cache.tick()
        now[0] += 5.0
    assert looked == [100.0, 163.0, 226.0, 289.0]
