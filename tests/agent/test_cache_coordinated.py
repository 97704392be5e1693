"""The coordinated policy with a real coordinator, embedded in one of two agents."""

from __future__ import annotations

import os
from pathlib import Path

from haulier.agent.cache import Change
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.coordinator.client import CoordinatorClient
from haulier.units import CHUNK
from tests.support.agents import join, make_site, running
from tests.support.waiting import wait_for

ROOM = CHUNK + 64


def cached(store: ChunkStore, datas: list[bytes]) -> list[bytes]:
    fps = [store.put(data) for data in datas]
    store.save_manifest("past", Manifest(len(fps) * CHUNK, b"".join(fps)), pinned=False)
    store.drop_manifest("past")
    return fps


def test_what_is_next_door_goes_and_the_last_copy_stays(short: Path) -> None:
    oslo = make_site(short / "o", "oslo").set(coordinator="here")
    with running(oslo) as at_oslo:
        lisbon = join(oslo, short / "l", "lisbon").set(coordinator=f"https://oslo@{oslo.control}")
        with running(lisbon) as at_lisbon:
            datas = [os.urandom(CHUNK) for _ in range(8)]
            both, only = cached(at_oslo.store, datas), cached(at_oslo.store, [os.urandom(CHUNK) for _ in range(8)])
            cached(at_lisbon.store, datas)
            coordinator = CoordinatorClient.of(lisbon)
            assert coordinator is not None

            def known() -> bool:
                facts = coordinator.facts([*both, *only], "oslo")
                return [each.copies for each in facts] == [2] * 8 + [1] * 8

            wait_for(known, 90, "what the coordinator says of copies")
            facts = at_oslo.cache.prices.of([*both, *only])
            assert facts[both[0]].copies == 1 and facts[both[0]].refetch_s < facts[only[0]].refetch_s
            at_oslo.cache.change(Change(policy="coordinated", budget=9 * ROOM))
            assert at_oslo.store.missing(only) == []
            assert len(at_oslo.store.missing(both)) >= 7
            # without the coordinator the sites themselves are asked
            oslo.set(coordinator="https://127.0.0.1:1")
            assert at_oslo.cache.prices.of(only)[only[0]].copies == 0
