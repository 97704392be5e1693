"""Handoffs while the coordinator, or a server of its database, is killed, comes back, or is not there at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from haulier.chunks.store import ChunkStore
from haulier.coordinator.client import CoordinatorClient
from haulier.coordinator.shards import spread
from haulier.errors import HaulierError
from haulier.lab.scenario import Template
from tests.support.agents import CoordinatorProcess
from tests.support.postgres import Server, servers
from tests.support.waiting import wait_for
from tests.system.stage import Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(400)]


@dataclass
class Standing:
    """The coordinator runs at oslo, on a PostgreSQL whose chunk dictionary is on three other servers."""

    stage: Stage
    coordinator: CoordinatorProcess
    shards: list[Server]

    def status(self) -> dict[str, Any]:
        return CoordinatorClient.near(self.stage.site("oslo").site).status()

    def knows(self, owner: str) -> bool:
        """Whether it has caught up: who owns the guest, and how many chunks each site holds."""
        try:
            facts = self.status()
        except HaulierError:
            return False
        held = {site["name"]: site["chunks"] for site in facts["sites"]}
        guests = {guest["name"]: (guest["owner"], guest["disputed"]) for guest in facts["guests"]}
        return guests.get("web1") == (owner, False) and all(held.get(s) == self.chunks(s) for s in ("oslo", "lisbon"))

    def chunks(self, site: str) -> int:
        with ChunkStore(self.stage.site(site).site.store, create=False) as store:
            return store.stats().chunks

    def caught_up(self, owner: str) -> None:
        try:
            wait_for(lambda: self.knows(owner), 60, f"the coordinator's knowledge that web1 is at {owner}")
        except AssertionError as error:
            logs = [self.stage.site(s).root / "agent.log" for s in ("oslo", "lisbon")]
            logs.append(self.stage.site("oslo").root / "coordinator.log")
            said = "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
            held = {site: self.chunks(site) for site in ("oslo", "lisbon")}
            raise AssertionError(f"{error}\n{held}\n{self.status()}\n{said}") from None


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Standing]:
    with servers() as machines, stage(made, "coord") as here:
        head, shards = machines.new("head"), [machines.new(f"shard{n}") for n in range(3)]
        spread(head.socket_url, [shard.socket_url for shard in shards])
        oslo = here.site("oslo")
        prefix = here.scenario.lab.command("oslo", [])
        coordinator = CoordinatorProcess(oslo.site, head.socket_url, prefix, oslo.site.control_host)
        with coordinator:
            for name in ("oslo", "lisbon"):
                here.site(name).haulier("coordinator", "use", coordinator.url)
            here.run_guest("web1")
            yield Standing(here, coordinator, shards)


def test_a_shard_is_killed_in_the_middle(standing: Standing) -> None:
    standing.caught_up("oslo")
    handoff = standing.stage.begin()
    handoff.wait_phase(handoff.source, {"disk", "memory"})
    standing.shards[1].kill()
    handoff.done()
    assert standing.stage.home() == "lisbon"
    standing.stage.assert_right()
    # guests and sites are not in the dictionary: it knows of the handoff all the same
    wait_for(lambda: standing.status()["guests"][0]["owner"] == "lisbon", 60)
    with ChunkStore(standing.stage.site("oslo").site.store, create=False) as store:
        wanted = list(store.load_manifest(store.manifest_names("image/")[0]).unique())
    asked = CoordinatorClient.near(standing.stage.site("oslo").site)
    # What it has answered before it remembers; what it was never asked lies in a shard.
    with pytest.raises(HaulierError, match="haulier_shard1"):
        asked.holders([os.urandom(32) for _ in range(64)], "lisbon")
    standing.shards[1].start()
    standing.caught_up("lisbon")
    (source,) = wait_for(lambda: asked.holders(wanted, "lisbon"), 60)
    assert source.site == "oslo" and source.held == len(wanted)


def test_the_coordinator_is_killed_in_the_middle_and_restarted(standing: Standing) -> None:
    handoff = standing.stage.begin()
    handoff.wait_phase(handoff.source, {"disk", "memory"})
    standing.coordinator.end(signal.SIGKILL)
    handoff.wait_phase(handoff.source, {"memory", "switchover"})
    standing.coordinator.start()
    handoff.done()
    assert standing.stage.home() == "oslo"
    standing.stage.assert_right()
    standing.caught_up("oslo")


def test_the_coordinator_is_not_there_at_all(standing: Standing) -> None:
    standing.coordinator.end()
    handoff = standing.stage.begin()
    handoff.done()
    assert standing.stage.home() == "lisbon"
    standing.stage.assert_right()
    standing.stage.assert_clean(handoff, "lisbon")
    standing.coordinator.start()
    standing.caught_up("lisbon")
    (guest,) = standing.status()["guests"]
    assert guest["epoch"] >= 4 and guest["sites"]["lisbon"]["state"] == "owner"
    # and the link's rate is known from the handoffs that were made
    assert {(link["from"], link["to"]) for link in standing.status()["links"]} == {
        ("oslo", "lisbon"),
        ("lisbon", "oslo"),
    }
