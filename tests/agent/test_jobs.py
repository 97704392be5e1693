"""Jobs: progress, results, errors; never an exception in a thread."""

from __future__ import annotations

import threading

import pytest

from haulier.agent.jobs import Jobs
from haulier.errors import Cancelled, NoRoom, UnknownThing
from tests.support.waiting import wait_for


def test_a_job_reports_progress_and_its_result() -> None:
    jobs, go, seen = Jobs(), threading.Event(), threading.Event()

    def work(progress):
        progress(0.5, "half way")
        seen.set()
        assert go.wait(10)
        progress(7.0, "too far")
        return {"x": 1}

    job = jobs.start("import", "debian", work)
    assert seen.wait(10)
    assert (job.state, job.progress, job.message) == ("running", 0.5, "half way")
    go.set()
    wait_for(lambda: jobs.get(job.id).state == "done", 10)
    assert job.result == {"x": 1} and job.progress == 1.0 and job.ended >= job.started


def test_errors_keep_their_code() -> None:
    jobs = Jobs()

    def full(progress):
        raise NoRoom("the disk is full")

    def broken(progress):
        raise ZeroDivisionError

    one, two = jobs.start("a", "x", full), jobs.start("b", "y", broken)
    wait_for(lambda: {one.state, two.state} == {"failed"}, 10)
    assert (one.error, one.code) == ("the disk is full", NoRoom.exit_code)
    assert two.code == 1 and "inside the agent" in two.error


def test_unknown_and_forgotten_jobs() -> None:
    jobs = Jobs()
    with pytest.raises(UnknownThing, match="agent was restarted"):
        jobs.get("j1")
    first = jobs.start("a", "x", lambda progress: {})
    wait_for(lambda: first.state == "done", 10)
    for _ in range(210):
        job = jobs.start("a", "x", lambda progress: {})
        wait_for(lambda job=job: job.state == "done", 10)
    with pytest.raises(UnknownThing):
        jobs.get(first.id)
    assert len(jobs.all()) <= 202


def test_a_cancelled_job_ends_at_its_next_word() -> None:
    jobs, go = Jobs(), threading.Event()

    def work(progress):
        progress(0.1, "begun")
        assert go.wait(10)
        progress(0.2, "never said")
        raise AssertionError("it went on")

    job = jobs.start("push", "debian", work)
    wait_for(lambda: job.message == "begun", 10)
    assert jobs.cancel(job.id).state == "running"
    go.set()
    wait_for(lambda: job.state == "failed", 10)
    assert job.code == Cancelled.exit_code and "cancelled" in job.error
    assert jobs.cancel(job.id).state == "failed", "one that is over stays as it is"
    with pytest.raises(UnknownThing):
        jobs.cancel("j123")
