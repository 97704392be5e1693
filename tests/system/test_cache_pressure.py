"""A store that is full: what a running guest needs is never evicted, a guest that arrives finds room, one that left
comes back cheaply while there is room for what it left."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.handoff.residence import manifest_name
from haulier.lab.scenario import Template, wan
from haulier.units import CHUNK
from tests.system.stage import Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(600)]

ROOM = CHUNK + 64
JUNK = 300


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "cache", [wan("200mbit", "5ms")]) as standing:
        standing.run_guest()
        yield standing


def junk(standing: Stage, site: str, chunks: int = JUNK) -> list[bytes]:
    """Chunks that some past guest left at `site`."""
    with ChunkStore(standing.site(site).site.store) as store:
        fps = [store.put(os.urandom(CHUNK)) for _ in range(chunks)]
        store.save_manifest("retained/past", Manifest(chunks * CHUNK, b"".join(fps)), pinned=False)
        store.drop_manifest("retained/past")
    return fps


def left(standing: Stage, site: str, fps: list[bytes] | frozenset[bytes]) -> int:
    with ChunkStore(standing.site(site).site.store) as store:
        return len(fps) - len(store.missing(fps))


def disk(standing: Stage, site: str) -> frozenset[bytes]:
    with ChunkStore(standing.site(site).site.store) as store:
        return store.load_manifest(manifest_name("web1")).unique()


def whole(standing: Stage, site: str) -> None:
    """The guest's disk is all there and right, the guest works, and the store agrees with itself."""
    needed = disk(standing, site)
    assert left(standing, site, needed) == len(needed) > 1000
    verify = standing.site(site).facts("verify", "web1", timeout=300)
    assert verify["ok"] and verify["chunks_bad"] == 0, verify
    standing.assert_right()
    with ChunkStore(standing.site(site).site.store) as store:
        assert store.check(deep=False).ok


def test_eviction_under_pressure_leaves_a_running_guest_alone(standing: Stage) -> None:
    oslo = standing.site("oslo")
    for policy in ("gdsf", "s3-fifo"):
        oslo.facts("cache", "budget", "0")
        past = junk(standing, "oslo")
        assert oslo.facts("cache", "policy", policy)["policy"] == policy
        before = oslo.facts("cache", "show")
        assert before["cached"] == JUNK * ROOM and before["used"] == before["referenced"] + before["cached"]
        facts = oslo.facts("cache", "budget", str(before["used"] - 100 * ROOM))
        assert facts["used"] <= facts["budget"] and facts["referenced"] == before["referenced"]
        assert left(standing, "oslo", past) <= JUNK - 100
        facts = oslo.facts("cache", "budget", "1M")  # far less than what is in use
        assert facts["cached"] == 0 and facts["over"] == facts["referenced"] - 10**6
        assert left(standing, "oslo", past) == 0
    whole(standing, "oslo")
    would, did = oslo.facts("gc", "--dry-run", "--all"), oslo.facts("gc", "--all")
    assert would["store"]["chunks"] == did["store"]["chunks"] == 0


def test_a_guest_that_arrives_drives_out_the_cache_and_nothing_else(standing: Stage) -> None:
    lisbon, oslo = standing.site("lisbon"), standing.site("oslo")
    oslo.facts("cache", "budget", "0")
    past = junk(standing, "lisbon")
    kept = lisbon.facts("cache", "show")["referenced"]
    lisbon.facts("cache", "policy", "lru")
    lisbon.facts("cache", "budget", str(kept + (JUNK + 4) * ROOM))
    report = standing.begin("web1").done()
    assert report["target"] == "lisbon"
    whole(standing, "lisbon")
    facts = lisbon.facts("cache", "budget", str(kept + (JUNK + 4) * ROOM))  # now, not within seconds
    assert facts["referenced"] > kept and facts["used"] <= facts["budget"]
    assert left(standing, "lisbon", past) < JUNK
    whole(standing, "lisbon")
    # What it left at oslo is cached there, so that the way back is short; until room is needed.
    cached = oslo.facts("cache", "show")["cached"]
    assert cached > 0
    assert oslo.facts("cache", "budget", "1M")["cached"] == 0
    done = standing.site("lisbon").haulier("handoff", "web1", "--to", "oslo", "--json", check=False)
    assert done.returncode == 6 and "budget" in done.stdout
    assert standing.home() == "lisbon"
