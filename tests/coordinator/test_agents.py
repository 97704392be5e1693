"""Real agents that report to a real coordinator, embedded in one of them or on its own, over mutual TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.agent.server import Agent
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.coordinator.client import CoordinatorClient
from haulier.units import CHUNK
from tests.agent.conftest import short
from tests.chunks.samples import chunk
from tests.support.agents import join, make_site, running
from tests.support.waiting import wait_for

__all__ = ["short"]


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
    wait_for(lambda: chunks(lisbon.site, "oslo") == 20 and chunks(lisbon.site, "lisbon") == 4)
    asked = client(lisbon.site)
    assert asked.lacking("lisbon", fps) == [*range(10), *range(14, 20)]
    assert asked.lacking("oslo", fps) == []
    (source,) = asked.holders(fps, "lisbon")
    assert (source.site, source.control, source.positions.tolist()) == ("oslo", oslo.site.control, list(range(20)))
    assert source.cost_s == pytest.approx(20 * CHUNK * 8 / source.rate_bps + source.rtt_s)
    assert [(image["name"], image["sites"]) for image in asked.images()] == [("part", ["lisbon"]), ("web", ["oslo"])]
    # and what is gone is reported, too
    lisbon.store.drop_manifest("image/part")
    lisbon.store.gc()
    wait_for(lambda: chunks(lisbon.site, "lisbon") == 0)
    assert [image["name"] for image in asked.images()] == ["web"]
