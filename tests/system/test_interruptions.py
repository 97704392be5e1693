"""Handoffs that are cancelled, and processes that die in the middle: one site runs the guest, and it is right."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator

import psutil
import pytest

from haulier.errors import Cancelled, Conflict, HandoffFailed
from haulier.lab.scenario import Template, wan
from tests.support.waiting import wait_for
from tests.system.stage import Handoff, Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def running(made: Template) -> Iterator[Stage]:
    with stage(made, "intr", [wan("30mbit", "25ms")]) as standing:
        standing.run_guest()
        yield standing


@pytest.fixture
def standing(running: Stage) -> Iterator[Stage]:
    """Both agents up and the link too, whatever the test before did."""
    with contextlib.suppress(Exception):
        running.set_link(up=True)
    for site in running.scenario.sites.values():
        if site.agent is None:
            site.start_agent()
    yield running


def after(standing: Stage, handoff: Handoff, *, home: str = "") -> str:
    """What holds after every handoff, however it ended; where the guest is now."""
    outcomes = handoff.settled()
    print(handoff.logs())
    found = standing.home(handoff.guest)
    if home:
        assert found == home, f"{outcomes}\n{handoff.logs()}"
    expected = "done" if found == handoff.target else "failed"
    assert outcomes[handoff.source] in (expected, "cancelled"), outcomes
    standing.scenario.route(found, standing.addresses[handoff.guest])
    standing.assert_clean(handoff, found)
    standing.assert_right(handoff.guest)
    return found


# -- cancelled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phase",
    ["offer", pytest.param("connect", marks=pytest.mark.full), pytest.param("disk", marks=pytest.mark.full), "memory"],
)
def test_cancelled_in_a_phase_the_guest_runs_on_and_nothing_is_left(standing: Stage, phase: str) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {phase})
    handoff.cancel()
    code, result, err = handoff.result()
    assert code == Cancelled.exit_code, err
    assert result["outcome"] == "cancelled" and "runs on" in err
    after(standing, handoff, home=handoff.source)


def test_cancelled_late_in_memory_through_the_other_command(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"memory"})
    handoff.wait_sent(0.5)
    standing.site(handoff.source).haulier("cancel", handoff.id)
    assert handoff.result()[0] == Cancelled.exit_code
    after(standing, handoff, home=handoff.source)


def test_cancelled_while_the_guest_is_stopped_for_the_switchover(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"switchover"})
    # The other site's word takes its time, so that the cancel comes before it.
    standing.set_link(delay_s=0.6)
    try:
        handoff.cancel()
        code, _, err = handoff.result()
    finally:
        standing.set_link(delay_s=0.025)
    assert code == Cancelled.exit_code, err
    after(standing, handoff, home=handoff.source)


@pytest.mark.full
def test_cancelled_while_the_other_site_cannot_be_told(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"switchover"})
    with standing.cut():
        handoff.cancel()
        code, _, err = handoff.result()
        assert code == Cancelled.exit_code, err
        wait_for(lambda: standing.owners("web1") == [handoff.source], 30)
        facts = standing.site(handoff.source).client.guest("web1")
        assert facts["status"] == "running"
    # Its copy waits until it has heard nothing for two minutes, then it asks.
    handoff.settled(200)
    after(standing, handoff, home=handoff.source)


def test_what_has_gone_over_cannot_be_cancelled(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.done()
    refused = standing.site(handoff.source).haulier("cancel", handoff.id, check=False)
    assert refused.returncode == Conflict.exit_code and "is over" in refused.stderr
    after(standing, handoff, home=handoff.target)


# -- agents that die: the handoff does not mind ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "phase"),
    [
        ("source", "memory"),
        ("target", "disk"),
        pytest.param("source", "disk", marks=pytest.mark.full),
        pytest.param("target", "memory", marks=pytest.mark.full),
    ],
)
def test_an_agent_killed_and_restarted_does_not_disturb_a_handoff(standing: Stage, side: str, phase: str) -> None:
    handoff = standing.begin()
    site = standing.site(getattr(handoff, side))
    handoff.wait_phase(handoff.source, {phase})
    site.kill_agent()
    site.start_agent()
    handoff.done()
    after(standing, handoff, home=handoff.target)


def test_an_agent_that_is_away_during_the_switchover(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"memory"})
    for site in standing.scenario.sites.values():
        site.kill_agent()
    handoff.wait_phase(handoff.source, {"token", "finish"})
    for site in standing.scenario.sites.values():
        site.start_agent()
    handoff.done()
    after(standing, handoff, home=handoff.target)


def test_the_targets_agent_dies_while_it_takes_the_offer(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"offer"})
    target = standing.site(handoff.target)
    wait_for(lambda: handoff.directory(handoff.target).exists() or handoff.status(handoff.source)["phase"] != "offer")
    target.kill_agent()
    target.start_agent()
    code, _, err = handoff.result()
    # It may just have answered.
    assert code == 0 or "runs on" in err or handoff.target in err
    after(standing, handoff, home=handoff.target if code == 0 else handoff.source)


# -- workers that die --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "phase"),
    [
        pytest.param("source", "disk", marks=pytest.mark.full),
        ("source", "memory"),
        ("target", "connect"),
        ("target", "memory"),
        pytest.param("source", "connect", marks=pytest.mark.full),
        pytest.param("target", "disk", marks=pytest.mark.full),
    ],
)
def test_a_worker_killed_leaves_the_guest_at_its_source(standing: Stage, side: str, phase: str) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {phase})
    handoff.kill_worker(getattr(handoff, side))
    code, _, err = handoff.result()
    assert code not in (0, None) and err
    after(standing, handoff, home=handoff.source)


@pytest.mark.full
def test_a_copy_whose_qemu_stands_still_does_not_hold_the_handoff_up_for_ever(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"memory"})
    for pid in standing.qemus(handoff.target, "web1"):
        os.kill(pid, signal.SIGSTOP)
    code, _, err = handoff.result()
    assert code == HandoffFailed.exit_code and "has taken nothing of the memory" in err, err
    after(standing, handoff, home=handoff.source)


@pytest.mark.parametrize("phase", [pytest.param("memory", marks=pytest.mark.full), "switchover"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_agent_and_worker_killed_together(standing: Stage, side: str, phase: str) -> None:
    handoff = standing.begin()
    site = standing.site(getattr(handoff, side))
    handoff.wait_phase(handoff.source, {phase})
    handoff.kill_worker(site.name)
    site.kill_agent()
    site.start_agent()
    handoff.result()
    found = after(standing, handoff)
    if phase == "memory":
        assert found == handoff.source


# -- around the token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["source", "target", "both"])
@pytest.mark.parametrize("state", ["ready", "granted"])
def test_everything_of_a_side_dies_around_the_token(standing: Stage, side: str, state: str) -> None:
    handoff = standing.begin()
    handoff.wait_phase(handoff.source, {"switchover"})
    handoff.wait_state(handoff.target if state == "ready" else handoff.source, {state, "away", "owner"})
    names = [handoff.source, handoff.target] if side == "both" else [getattr(handoff, side)]
    for name in names:
        handoff.kill_worker(name)
        standing.site(name).kill_agent()
    for name in names:
        standing.site(name).start_agent()
    handoff.result()
    after(standing, handoff)


def test_a_token_lost_with_both_its_workers_is_found_again(standing: Stage) -> None:
    handoff = standing.begin()
    handoff.wait_state(handoff.source, {"granted"})
    with standing.cut():
        for name in (handoff.source, handoff.target):
            handoff.kill_worker(name)
            standing.site(name).kill_agent()
        for name in (handoff.source, handoff.target):
            standing.site(name).start_agent()
        # Nobody may run it on a guess.
        assert standing.owners("web1") in ([], [handoff.target])
    handoff.result()
    after(standing, handoff, home=handoff.target)


@pytest.mark.parametrize("worker", ["dies with it", "lives"])
def test_a_copy_that_dies_before_the_token_reaches_it_comes_back(standing: Stage, worker: str) -> None:
    handoff = standing.begin()
    handoff.wait_state(handoff.source, {"granted"})
    with standing.cut():
        with standing.journal(handoff.target) as journal:
            arrived = journal.guest("web1").state == "owner"
        if worker != "lives":
            handoff.kill_worker(handoff.target)
        for pid in standing.qemus(handoff.target, "web1"):
            os.kill(pid, signal.SIGKILL)
    handoff.result()
    if arrived:
        pytest.skip("the token was faster than the cut")
    found = after(standing, handoff, home=handoff.source)
    with standing.journal(found) as journal:
        row = journal.guest("web1")
    assert row.epoch > handoff.row(found)["epoch"], "the granted epoch is burnt"


def test_a_target_that_burns_down_with_the_token(made: Template) -> None:
    """Nobody but the operator can know that it never comes back."""
    with stage(made, "burnt", [wan("30mbit", "25ms")]) as standing:
        standing.run_guest()
        oslo, lisbon = standing.site("oslo"), standing.site("lisbon")
        handoff = standing.begin()
        handoff.wait_phase("oslo", {"switchover"})
        standing.set_link(delay_s=0.6)
        handoff.wait_state("oslo", {"granted"})
        # The worker first: it would take its vote back.
        handoff.kill_worker("lisbon")
        lisbon.kill_agent()
        burnt = standing.processes("lisbon")
        for process in burnt:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with standing.journal("lisbon") as journal:
            assert journal.guest("web1").state == "ready", "the token was faster"
        assert psutil.wait_procs(burnt, 10)[1] == []
        for path in (lisbon.site.ram_dir, lisbon.root):
            shutil.rmtree(path)
        refused = oslo.haulier("guest", "reclaim", "web1", check=False)
        assert refused.returncode == Conflict.exit_code and "put it out of the fleet" in refused.stderr, refused
        refused = oslo.haulier("site", "remove", "lisbon", check=False)
        assert refused.returncode == Conflict.exit_code and "under way" in refused.stderr, refused
        oslo.haulier("site", "remove", "lisbon", "--force")
        told = oslo.haulier("guest", "reclaim", "web1")
        assert "this site's again" in told.stdout
        assert handoff.result()[0] != 0
        facts = oslo.client.guest("web1")
        assert facts["status"] == "running" and facts["state"] == "owner", facts
        standing.assert_right()
        written = standing.workload("web1").stats()["files_written"]
        wait_for(lambda: standing.workload("web1").stats()["files_written"] > written, 60, "another file")
        assert standing.of_handoff("oslo", handoff.id) == []
