"""A guest that outruns the link goes before its memory; the rest follows, whatever of the workers dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from haulier.lab.scenario import Template, wan
from tests.support.waiting import wait_for
from tests.system.stage import Handoff, Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(600)]

WILD = {"pages_per_s": 3000, "hot_pages": 5000, "files_per_s": 0.5}
FIRST = ("--downtime", "20ms", "--allow", "post-copy")
"""So short a downtime that no gate comes within reach of it, however busy the machine is."""


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "postcopy", [wan("20mbit", "20ms")]) as standing:
        standing.run_guest(**WILD)
        yield standing


def arrived(standing: Stage, handoff: Handoff) -> None:
    assert standing.home() == handoff.target
    standing.assert_clean(handoff, handoff.target)
    standing.assert_right()


def test_a_guest_that_outruns_the_link_goes_before_its_memory(standing: Stage) -> None:
    handoff = standing.begin("web1", *FIRST)
    report = handoff.done()
    print(report["total_s"], report["downtime_ms"], report["switchover_ms"], report["measures"], report["post_copy"])
    assert [taken["what"] for taken in report["measures"]] == ["send the rest of its memory after it"]
    assert report["post_copy"]["requested_pages"] > 0 and report["post_copy"]["worst_wait_ms"] > 0
    assert set(handoff.settled().values()) == {"done"}
    arrived(standing, handoff)


@pytest.mark.full
@pytest.mark.parametrize("killed", [("source", "target"), ("source",), ("target",)], ids=["both", "source", "target"])
def test_workers_that_die_are_followed_by_others(standing: Stage, killed: tuple[str, ...]) -> None:
    handoff = standing.begin("web1", *FIRST)
    handoff.wait_state(handoff.source, ["serving"])
    for side in killed:
        handoff.kill_worker(getattr(handoff, side))
    code, result, err = handoff.result()
    assert code == 0, f"exit code {code}: {err}\n{handoff.logs()}"
    report = result["report"] or {}
    print(report.get("total_s"), report.get("downtime_ms"), report.get("post_copy"))
    # One that is left alone may have had all of it by then: there is nothing to go on with.
    if len(killed) == 2:
        assert report["post_copy"]["resumed"] is True
    assert set(handoff.settled().values()) == {"done"}
    arrived(standing, handoff)


@pytest.mark.full
def test_a_source_that_dies_takes_memory_with_it_and_nothing_of_the_disk(standing: Stage) -> None:
    handoff = standing.begin("web1", *FIRST)
    handoff.wait_state(handoff.source, ["serving"])
    for pid in standing.qemus(handoff.source, "web1"):
        os.kill(pid, signal.SIGKILL)
    code, result, err = handoff.result()
    assert code != 0 and "memory was whole" in err + str(result), (code, result, err)
    handoff.settled()
    wait_for(lambda: standing.owners("web1") == [handoff.target], 60, "one owner")
    site = standing.site(handoff.target)
    assert "web1" in site.haulier("guest", "start", "web1").stdout
    wait_for(lambda: site.client.guest("web1")["status"] == "running", 60, "the guest, booted from its disk")
    standing.assert_clean(handoff, handoff.target)
