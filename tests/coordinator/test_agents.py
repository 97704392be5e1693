"""Real agents that report to a real coordinator, embedded in one of them or on its own, over mutual TLS."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from haulier.agent.client import Client
from haulier.agent.server import Agent
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.coordinator import messages as m
from haulier.coordinator.client import CoordinatorClient
from haulier.errors import NotTrusted, PeerError, UnknownThing
from haulier.fetch.holders import hints_for
from haulier.units import CHUNK
from tests.agent.conftest import short
from tests.chunks.samples import chunk
from tests.support.agents import CLI, CoordinatorProcess, free_port, join, make_site, running
from tests.support.waiting import wait_for

__all__ = ["short"]

T = TypeVar("T")


def put_image(agent: Agent, name: str, seeds: range) -> list[bytes]:
    with agent.store.sibling() as store:
        fps = [store.put(chunk(seed)) for seed in seeds]
        store.save_manifest(f"image/{name}", Manifest(len(fps) * CHUNK, b"".join(fps)))
    return fps


@pytest.fixture
def fleet(short: Path) -> Iterator[tuple[Agent, Agent]]:
    """oslo's agent has the coordinator in it; lisbon uses that one."""
    oslo = make_site(short / "o", "oslo").set(coordinator="here")
    with running(oslo) as at_oslo:
        lisbon = join(oslo, short / "l", "lisbon").set(coordinator=f"https://oslo@{oslo.control}")
        with running(lisbon) as at_lisbon:
            yield at_oslo, at_lisbon


def client(site: Site) -> CoordinatorClient:
    found = CoordinatorClient.of(site)
    assert found is not None
    return found


def chunks(site: Site, of: str) -> int:
    return {each["name"]: each["chunks"] for each in client(site).sites()}.get(of, -1)


def test_sites_report_and_ask(fleet: tuple[Agent, Agent]) -> None:
    oslo, lisbon = fleet
    fps = put_image(oslo, "web", range(20))
    put_image(lisbon, "part", range(10, 14))
    wait_for(lambda: chunks(lisbon.site, "oslo") == 20 and chunks(lisbon.site, "lisbon") == 4, 90)
    asked = client(lisbon.site)
    assert asked.lacking("lisbon", fps) == [*range(10), *range(14, 20)]
    assert asked.lacking("oslo", fps) == []
    (check,) = [c for c in Client.local(lisbon.site).get("/v1/doctor")["checks"] if c["name"] == "coordinator"]
    assert check["ok"] and "knows 2 sites" in check["found"]
    (source,) = asked.holders(fps, "lisbon")
    assert (source.site, source.control, source.positions.tolist()) == ("oslo", oslo.site.control, list(range(20)))
    assert source.cost_s == pytest.approx(20 * CHUNK * 8 / source.rate_bps + source.rtt_s)
    assert [(image["name"], image["sites"]) for image in asked.images()] == [("part", ["lisbon"]), ("web", ["oslo"])]
    # and what is gone is reported, too
    lisbon.store.drop_manifest("image/part")
    lisbon.store.gc()
    wait_for(lambda: chunks(lisbon.site, "lisbon") == 0, 90)
    assert [image["name"] for image in asked.images()] == ["web"]


def test_the_coordinator_on_its_own_killed_absent_and_empty(short: Path) -> None:
    oslo = make_site(short / "o", "oslo")
    coordinator = CoordinatorProcess(oslo)
    oslo = oslo.set(coordinator=coordinator.url)
    # it is not there at first: agents start and work all the same
    with running(oslo) as at_oslo:
        lisbon = join(oslo, short / "l", "lisbon").set(coordinator=coordinator.url)
        with running(lisbon) as at_lisbon:
            asked = client(lisbon)
            fps = put_image(at_oslo, "web", range(12))
            with pytest.raises(PeerError, match="does not answer"):
                asked.holders(fps, "lisbon")
            with coordinator:
                wait_for(lambda: chunks(lisbon, "oslo") == 12, 90)
                assert [s.site for s in asked.holders(fps, "lisbon")] == ["oslo"]
                assert coordinator.end(signal.SIGKILL) == -signal.SIGKILL
                # what changes meanwhile is caught up with
                put_image(at_lisbon, "part", range(4))
                at_oslo.store.drop_manifest("image/web")
                at_oslo.store.gc()
                coordinator.start()
                wait_for(lambda: (chunks(lisbon, "oslo"), chunks(lisbon, "lisbon")) == (0, 4), 90)
                assert [(i["name"], i["sites"]) for i in asked.images()] == [("part", ["lisbon"])]
                # and one that has lost everything is told everything
                coordinator.end()
                shutil.rmtree(oslo.root / "coordinator")
                put_image(at_oslo, "web", range(8))
                coordinator.start()
                wait_for(lambda: (chunks(lisbon, "oslo"), chunks(lisbon, "lisbon")) == (8, 4), 90)


def test_settings_are_taken_up_while_the_agent_runs(fleet: tuple[Agent, Agent], short: Path) -> None:
    oslo, _ = fleet
    rome = join(oslo.site, short / "r", "rome")
    with running(rome) as at_rome:
        put_image(at_rome, "web", range(3))
        assert CoordinatorClient.of(rome) is None
        with pytest.raises(UnknownThing, match="no coordinator"):
            CoordinatorClient.near(rome)
        done = subprocess.run(
            [*CLI, "coordinator", "use", f"https://{oslo.site.control}", "--root", str(rome.root), "--json"],
            capture_output=True,
            check=True,
        )
        assert json.loads(done.stdout)["restart_agent"] is False
        wait_for(lambda: chunks(oslo.site, "rome") == 3, 90)
        shown = subprocess.run(
            [*CLI, "coordinator", "status", "--root", str(rome.root), "--json"], capture_output=True, check=True
        )
        facts = json.loads(shown.stdout)
        assert facts["coordinator"] == "oslo" and facts["database"]["kind"] == "sqlite"
        assert {s["name"] for s in facts["sites"]} >= {"oslo", "rome"}


def test_a_site_speaks_for_itself_only_and_forgetting_is_the_operators(fleet: tuple[Agent, Agent]) -> None:
    oslo, lisbon = fleet
    asked = client(lisbon.site)
    entry = m.GuestEntry(name="web1", state="owner", owner="oslo", epoch=9)
    asked.report_guests(m.GuestsReport(guests=[entry]))
    (guest,) = asked.guests()
    assert list(guest["sites"]) == ["lisbon"]
    with pytest.raises(NotTrusted, match="for the operator"):
        asked.forget("oslo")
    # another site's certificate at the coordinator's address is refused
    wrong = lisbon.site.set(coordinator=f"https://lisbon@{oslo.site.control}")
    with pytest.raises(NotTrusted):
        client(wrong).sites()
    with pytest.raises(UnknownThing, match="runs no coordinator"):
        client(lisbon.site.set(coordinator="here")).sites()


def test_a_lasting_lack_of_the_database_stops_nobody(short: Path) -> None:
    url = f"postgresql://haulier@127.0.0.1:{free_port()}/x"
    oslo = make_site(short / "o", "oslo").set(coordinator="here", database=url)
    assert (oslo.root / "site.toml").stat().st_mode & 0o077 == 0
    with running(oslo):
        assert Client.local(oslo).site()["name"] == "oslo"
        with pytest.raises(PeerError, match="cannot be reached"):
            client(oslo).sites()
        assert Client.local(oslo).guests() == []
        (check,) = [c for c in Client.local(oslo).get("/v1/doctor")["checks"] if c["name"] == "coordinator"]
        assert not check["ok"] and "cannot be reached" in check["found"]


def test_measured_links_are_reported(fleet: tuple[Agent, Agent]) -> None:
    oslo, lisbon = fleet
    lisbon.reporter.note_link("oslo", 8e6, 0.05)
    oslo.reporter.note_link("oslo", 1.0, 1.0)  # itself: no link
    wait_for(lambda: client(oslo.site).links(), 90)
    (link,) = client(oslo.site).links()
    assert (link["from"], link["to"], link["rate_bps"], link["rtt_s"]) == ("lisbon", "oslo", 8e6, 0.05)
    fps = put_image(lisbon, "web", range(10))
    wait_for(lambda: chunks(oslo.site, "lisbon") == 10 and client(oslo.site).images(), 90)
    (source,) = client(oslo.site).holders(fps, "oslo")
    assert source.cost_s == pytest.approx(10 * CHUNK * 8 / 8e6 + 0.05)
    # as `haulier.fetch` asks
    assert hints_for(oslo.site, fps[:3]) == {"lisbon": fps[:3]}
    digest = lisbon.store.load_manifest("image/web").digest
    survey = wait_for(lambda: known(lambda: client(oslo.site).image_holders(digest, "oslo")), 90)
    assert (survey.chunks, survey.lacking, survey.unheld) == (10, 10, 0)


def known(ask: Callable[[], T]) -> T | None:
    """None while the coordinator does not know the manifest."""
    try:
        return ask()
    except UnknownThing:
        return None
