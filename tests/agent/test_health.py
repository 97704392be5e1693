"""doctor, repair and the scrubber of an agent, with another site to heal from."""

from __future__ import annotations

import os
import random

import pytest

from haulier.agent import health as health_module
from haulier.agent.health import Health
from haulier.chunks.manifest import Manifest
from haulier.chunks.scrub import lacking, read_pass, write_pass
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, PeerError, UsageError
from haulier.units import CHUNK
from tests.agent.conftest import Fleet
from tests.chunks.samples import flip, place
from tests.support.goldens import decay, snapshot


@pytest.fixture
def health(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Health:
    """Oslo's, whose agent does nothing by itself."""
    monkeypatch.setattr(health_module, "STALL_S", 1.0)
    agent = fleet.at_oslo
    agent._stopping.set()
    for loop in agent._loops:
        loop.join(10)
    return agent.health


def fill(fleet: Fleet, chunks: int, *, there: int) -> list[bytes]:
    """A manifest of new chunks at oslo; lisbon has the first `there` of them."""
    store, dice = fleet.at_oslo.store, random.Random(7)
    datas = [dice.randbytes(CHUNK) for _ in range(chunks)]
    fps = [store.put(data) for data in datas]
    store.save_manifest("guest/web1", Manifest(chunks * CHUNK, b"".join(fps)))
    other = fleet.at_lisbon.store
    for data in datas[:there]:
        other.put(data)
    other.commit()
    return fps


def damage(store: ChunkStore, fps: list[bytes]) -> None:
    for fp in fps:
        path, offset = place(store, fp)
        flip(path, offset + 100)


def test_flipped_bits_are_healed_from_another_site(fleet: Fleet, health: Health) -> None:
    fps = fill(fleet, 12, there=12)
    damage(health.store, [fps[2], fps[9]])
    done = fleet.client.wait(fleet.client.post("/v1/scrub", {}))
    assert (done["chunks"], done["corrupt"], done["healed"], done["lost"]) == (12, 2, 2, [])
    assert health.store.check().ok and health.store.leases() == []
    assert read_pass(health.store).healed == 2
    again = fleet.client.wait(fleet.client.post("/v1/scrub", {"rate": 1e9}))
    assert (again["corrupt"], again["healed"]) == (0, 0)


def test_what_nobody_has_is_lost_and_said_until_it_is_back(fleet: Fleet, health: Health) -> None:
    fps = fill(fleet, 6, there=3)
    data = health.store.get(fps[5])
    damage(health.store, [fps[1], fps[5]])
    done = fleet.client.wait(fleet.client.post("/v1/scrub", {}))
    assert (done["corrupt"], done["healed"], done["lost"]) == (2, 1, [fps[5].hex()])
    ok, found = health.check()
    assert not ok and "1 chunks that are needed are missing" in found
    checks = {check["name"]: check for check in fleet.client.get("/v1/doctor")["checks"]}
    assert not checks["store"]["ok"] and "doctor --repair" in checks["store"]["advice"]
    fleet.at_lisbon.store.put(data)
    fleet.at_lisbon.store.commit()
    repaired = fleet.client.wait(fleet.client.post("/v1/doctor/repair"))
    assert repaired["ok"] and repaired["lost"] == []
    assert health.check()[0] and health.store.get(fps[5]) == data


def test_a_source_that_lies_heals_nothing(fleet: Fleet, health: Health) -> None:
    fps = fill(fleet, 4, there=4)
    damage(health.store, [fps[0]])
    damage(fleet.at_lisbon.store, [fps[0]])
    done = fleet.client.wait(fleet.client.post("/v1/scrub", {}))
    assert (done["healed"], done["lost"]) == (0, [fps[0].hex()])


def test_repair_counts_references_anew(fleet: Fleet, health: Health) -> None:
    fps = fill(fleet, 5, there=0)
    with health.store.index.write() as db:
        db.execute("UPDATE refs SET count=7 WHERE fp=?", (fps[1],))
        db.execute("DELETE FROM refs WHERE fp=?", (fps[2],))
    assert health.facts()["wrong_references"] == 2
    assert "2 reference counts differ" in health.check()[1]
    done = fleet.client.wait(fleet.client.post("/v1/doctor/repair"))
    assert done["ok"] and done["found"]["wrong_references"] == 2
    assert health.check()[0]


def test_the_agent_scrubs_by_itself_a_little_at_a_time(
    fleet: Fleet, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    fps = fill(fleet, 12, there=12)
    monkeypatch.setattr(health_module, "STEP_LEAST", 5 * CHUNK)
    damage(health.store, [fps[7]])
    seen = []
    for _ in range(3):
        health.tick()
        seen.append((read_pass(health.store).chunks, read_pass(health.store).healed))
    assert [chunks for chunks, _ in seen] == [5, 10, 13]  # the healed one, in its new place, too
    assert seen[-1][1] == 1 and health.store.check().ok
    health.tick()  # the next pass is not due
    assert read_pass(health.store).chunks == 13
    state = read_pass(health.store)
    state.ended -= health_module.PASS_S
    write_pass(health.store, state)
    health.tick()
    assert read_pass(health.store).chunks == 5


def test_healing_is_tried_again(fleet: Fleet, health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    fps = fill(fleet, 3, there=0)
    data = {fp: health.store.get(fp) for fp in fps}
    asked: list[list[bytes]] = []

    def bring(wanted: list[bytes]) -> None:
        asked.append(wanted)
        if len(asked) == 1:
            raise PeerError("nobody answers")
        for fp in wanted:
            health.store.put(data[fp], lease="heal")

    monkeypatch.setattr(health, "_fetch", bring)
    damage(health.store, [fps[0]])
    health.tick()
    assert lacking(health.store) == [fps[0]]
    health.tick()
    assert len(asked) == 1
    monkeypatch.setattr(health_module, "HEAL_AGAIN_S", -1.0)
    state = read_pass(health.store)
    state.ended -= health_module.PASS_S
    write_pass(health.store, state)
    health.tick()
    assert lacking(health.store) == [] and asked == [[fps[0]]] * 2


def test_two_passes_at_once_are_refused_and_so_are_odd_rates(fleet: Fleet, health: Health) -> None:
    with health.core.alone("the scrubber", "busy"):
        health.tick()
        assert read_pass(health.store).begun == 0
        with pytest.raises(Conflict):
            fleet.client.wait(fleet.client.post("/v1/scrub", {}))
    with pytest.raises(UsageError):
        fleet.client.post("/v1/scrub", {"rate": -1})
    assert not list(health.store.packs.iterdir())


def test_the_agent_reads_golden_snapshots_again(health: Health) -> None:
    root = health.core.site.golden
    golden = snapshot(root)
    decay(golden)
    health.tick()
    assert golden.path.exists(), "it was read when it was made"
    os.utime(golden.path / "memory.digest", (0, 0))
    health.tick()
    assert not golden.path.exists() and list(root.glob(".damaged-*"))
