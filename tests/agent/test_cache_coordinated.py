"""The coordinated policy with a real coordinator, embedded in one of two agents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from haulier.agent.cache import Change
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.cli.main import main
from haulier.coordinator.client import CoordinatorClient
from haulier.policy.choice import choose
from haulier.policy.coordinated import Facts
from haulier.policy.model import Item
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


def test_the_plan_decides_and_without_it_a_site_goes_on(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oslo keeps both images for good; lisbon has room for one and a half, and wants the second."""
    oslo = make_site(short / "o", "oslo").set(coordinator="here")
    with running(oslo) as at_oslo:
        lisbon = join(oslo, short / "l", "lisbon").set(coordinator=f"https://oslo@{oslo.control}")
        with running(lisbon) as at_lisbon:
            datas = {name: [os.urandom(CHUNK) for _ in range(8)] for name in ("web", "db")}
            web, db = (keep(at_oslo.store, name, datas[name]) for name in ("web", "db"))
            # the one that lisbon wants was used there longest ago
            for fps in (cached(at_lisbon.store, datas["db"]), cached(at_lisbon.store, datas["web"])):
                assert fps in (web, db)
            at_lisbon.cache.change(Change(policy="coordinated", budget=17 * ROOM))
            lisbon_asks = CoordinatorClient.of(lisbon)
            assert lisbon_asks is not None

            def planned() -> bool:
                lisbon_asks.holders(db, "lisbon")
                lisbon_asks.plan()
                facts = lisbon_asks.facts([*web, *db], "lisbon")
                return at_lisbon.cache.prices.of(db)[db[0]].plan == 1 and all(each.plan for each in facts)

            wait_for(planned, 90, "a plan for both sites")
            room = {each["site"]: each["room"] for each in lisbon_asks.plan()["sites"]}["lisbon"]
            assert room == 17 * ROOM
            with pytest.raises(SystemExit, match=r"^0$"):
                main(["coordinator", "plan", "--root", str(lisbon.root), "--json"])
            shown = json.loads(capsys.readouterr().out)
            assert shown["coordinator"] == "oslo" and {each["site"] for each in shown["sites"]} == {"oslo", "lisbon"}
            with pytest.raises(SystemExit, match=r"^0$"):
                main(["coordinator", "plan", "--root", str(lisbon.root)])
            assert "image/db" in capsys.readouterr().out
            # the policy: what the plan keeps goes last, even to the last chunk
            facts = {fp: Facts(plan=-1 if fp in web else 1, refetch_s=1e-9 if fp in db else 1.0) for fp in [*web, *db]}
            choice = choose(
                "coordinated",
                [Item(fp, 1) for fp in [*db, *web]],
                8,
                capacity=8,
                now=0.0,
                facts=facts.__getitem__,  # type: ignore[index]
            )
            assert set(choice.victims) == set(web)
            # nothing referenced goes for a plan, and nothing is fetched
            at_oslo.cache.change(Change(policy="coordinated", budget=4 * ROOM))
            assert at_oslo.store.missing([*web, *db]) == []
            at_lisbon.cache.change(Change(budget=9 * ROOM))
            assert at_lisbon.store.missing(db) == [] and len(at_lisbon.store.missing(web)) >= 7
            # and a coordinator that does not answer stops nobody
            lisbon.set(coordinator="https://127.0.0.1:1")
            at_lisbon.cache.change(Change(budget=4 * ROOM))
            assert 0 < at_lisbon.cache.facts()["used"] <= 4 * ROOM


def keep(store: ChunkStore, name: str, datas: list[bytes]) -> list[bytes]:
    fps = [store.put(data) for data in datas]
    store.save_manifest(f"image/{name}", Manifest(len(fps) * CHUNK, b"".join(fps)))
    return fps
