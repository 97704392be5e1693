"""A handoff that was cut for good sends, when it is begun again, only what the target has not got."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from haulier.lab.scenario import Template, wan
from tests.support.waiting import wait_for
from tests.system.stage import Handoff, Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(600)]

LARGE = {"memory_mib": 48, "pages_per_s": 5, "hot_pages": 50, "files_per_s": 0.1}
"""Little changes meanwhile, so that what is sent is what was there: what changes has to be sent in any case. And there
is enough of it that what a killed worker had received and not looked at (up to a megabyte) is a small part."""


@pytest.fixture(scope="module")
def running(made: Template) -> Iterator[Stage]:
    with stage(made, "resume", [wan("20mbit", "20ms")]) as standing:
        standing.run_guest(**LARGE)
        yield standing


@pytest.fixture(scope="module")
def fresh(running: Stage) -> int:
    """Bytes of a handoff to a site that has the guest's image and golden snapshot, and nothing else."""
    handoff = running.begin()
    report = handoff.done()
    running.assert_clean(handoff, handoff.target)
    return int(report["wire"]["sent"] + report["wire"]["received"])


def forget(standing: Stage) -> None:
    """Nothing is kept at either site, so that the next handoff is a fresh one."""
    for site in standing.scenario.sites.values():
        site.haulier("gc", "--all", timeout=180)
        assert site.client.get("/v1/kept")["kept"] == []


def cut_at(standing: Stage, share: float, fresh: int, how: str) -> Handoff:
    handoff = standing.begin()
    # By what has arrived: what is on its way when everything dies has to be sent again.
    arrived = share * fresh
    wait_for(
        lambda: handoff.status(handoff.target).get("wire_bytes", 0) > arrived or handoff.command.poll() is not None
    )
    assert handoff.command.poll() is None, f"over too soon: {handoff.command.communicate()}"
    if how == "cancelled":
        handoff.cancel()
    elif how == "agents and workers killed":
        for site in standing.scenario.sites.values():
            site.kill_agent()
        for name in (handoff.source, handoff.target):
            handoff.kill_worker(name)
        for site in standing.scenario.sites.values():
            site.start_agent()
    else:
        handoff.kill_worker(getattr(handoff, how.removesuffix(" killed")))
    handoff.result()
    handoff.settled()
    assert standing.home() == handoff.source
    standing.assert_clean(handoff, handoff.source)
    return handoff


CUTS = [
    ("cancelled", 0.25),
    pytest.param("agents and workers killed", 0.25, marks=pytest.mark.full),
    pytest.param("source killed", 0.25, marks=pytest.mark.full),
    pytest.param("target killed", 0.25, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("how", "most"), CUTS)
def test_cut_at_four_fifths_the_second_attempt_sends_little_more_than_the_rest(
    running: Stage, fresh: int, how: str, most: float
) -> None:
    forget(running)
    handoff = cut_at(running, 0.8, fresh, how)
    for name in (handoff.source, handoff.target):
        kept = wait_for(lambda name=name: running.site(name).facts("status")["kept"], 30, "what was kept")
        assert [(one["guest"], one["kind"]) for one in kept] == [("web1", "cut")]
        assert 0 < kept[0]["bytes"] < running.site(name).client.get("/v1/kept")["budget"]
    again = running.begin("web1", "--check")
    report = again.done()
    sent = report["wire"]["sent"] + report["wire"]["received"]
    disk = report["disk"]["origin"]["wire_bytes"]
    print(
        f"{how}: fresh {fresh}, second attempt {sent}: {sent / fresh:.3f}, of it disk {disk}, memory "
        f"{report['memory']['wire_bytes']}; gave up {report['given_up_pages']} pages"
    )
    assert report["check"]["memory_equal"] is True
    assert report["memory_base"] == f"attempt:{handoff.id}"
    assert sent <= most * fresh
    running.assert_clean(again, again.target)
    running.assert_right()


@pytest.mark.full
def test_a_picture_that_has_decayed_is_not_believed(running: Stage, fresh: int) -> None:
    forget(running)
    handoff = cut_at(running, 0.8, fresh, "cancelled")
    (path,) = running.site(handoff.target).site.attempts.glob("*/*/memory")
    with path.open("r+b") as file:
        size = path.stat().st_size
        for at in range(1 << 20, size - (1 << 20), size // 50):
            file.seek(at)
            file.write(b"decayed!" * 32)
    report = running.begin("web1", "--check").done()
    assert report["check"]["memory_equal"] is True and report["given_up_pages"] >= 40
    running.assert_right()
