"""Links that fail in the middle, several paths, and two guests at once."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from haulier.lab.scenario import Template, wan
from tests.system.stage import Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(400)]
OUTAGE_S = 20.0
HEAVY = {"random_share": 0.9}
"""Memory that does not compress, so that there is time for something to happen."""


@pytest.fixture(scope="module")
def running(made: Template) -> Iterator[Stage]:
    with stage(made, "links", [wan("20mbit", "25ms"), wan("15mbit", "40ms")]) as standing:
        standing.run_guest("web1", **HEAVY)
        yield standing


@pytest.fixture
def standing(running: Stage) -> Iterator[Stage]:
    yield running
    running.set_link(up=True)


def test_both_paths_carry_their_share(standing: Stage) -> None:
    handoff = standing.begin()
    report = handoff.done()
    paths = report["wire"]["paths"]
    assert len(paths) == 2
    total = sum(path["acked"] for path in paths)
    assert min(path["acked"] for path in paths) > 0.15 * total, paths
    assert report["rate_bps"] > 21e6, "more than the faster of the two paths has"
    standing.assert_clean(handoff, handoff.target)
    standing.assert_right()


@pytest.mark.parametrize("which", [0, 1], ids=["the control path too", "the other"])
def test_one_path_of_two_fails_in_the_middle(standing: Stage, which: int) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"memory"})
    handoff.wait_sent(1.0)
    with standing.cut(standing.links()[which]):
        report = handoff.done()
        assert len(report["wire"]["paths"]) == 2
        assert all(path["sent"] > 50_000 for path in report["wire"]["paths"]), "both were used before"
    standing.assert_clean(handoff, handoff.target)
    standing.assert_right()


def test_all_paths_fail_for_20_seconds_in_the_middle(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"memory"})
    handoff.wait_sent(1.0)
    sent = handoff.status(handoff.source)["wire_bytes"]
    with standing.cut():
        began = time.monotonic()
        # The length of the outage is what is tested.
        time.sleep(OUTAGE_S)
        assert handoff.command.poll() is None
        standing.scenario.route(handoff.source)
        facts = standing.site(handoff.source).client.guest("web1")
        assert facts["status"] == "running", "the guest does not mind"
        away = time.monotonic() - began
    report = handoff.done()
    assert report["total_s"] > away >= OUTAGE_S
    assert report["wire"]["sent"] > sent, "the same handoff went on"
    standing.assert_clean(handoff, handoff.target)
    standing.assert_right()


def test_an_outage_during_the_switchover(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"switchover"})
    with standing.cut():
        time.sleep(5)
        assert handoff.command.poll() is None
    report = handoff.done()
    assert report["downtime_ms"] > 1000
    standing.assert_clean(handoff, handoff.target)
    standing.assert_right()


def test_two_guests_are_handed_over_at_once(standing: Stage) -> None:
    home = standing.home("web1")
    if home != "oslo":
        standing.begin("web1").done()
    standing.run_guest("web2", "10.77.0.11/24", **HEAVY)
    both = [standing.begin(name, source="oslo") for name in ("web1", "web2")]
    reports = [handoff.done() for handoff in both]
    begun = [report["phases"][0]["at"] for report in reports]
    ended = [report["running_at"] for report in reports]
    assert max(begun) < min(ended), "they were under way at the same time"
    for handoff in both:
        assert standing.home(handoff.guest) == "lisbon"
        standing.assert_clean(handoff, "lisbon")
        standing.assert_right(handoff.guest)
    # And back, in opposite directions.
    back = [standing.begin("web1"), standing.begin("web2")]
    for handoff in back:
        handoff.done()
        standing.assert_right(handoff.guest)
    assert standing.at("oslo") == ["web1", "web2"]
