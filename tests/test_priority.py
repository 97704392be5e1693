"""Who goes first where processors are few."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier import priority
from haulier.handoff.spawning import KEPT, Standby
from tests.support.waiting import gone, wait_for

WAITS = """
import sys, threading
threading.Thread(target=sys.stdin.read).start()
print("ready", flush=True)
"""
LEADS = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def waits() -> Iterator[int]:
    """A process of two threads with a session of its own."""
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process.pid


def nice_of(pid: int) -> list[int]:
    return [os.getpriority(os.PRIO_PROCESS, int(each.name)) for each in Path(f"/proc/{pid}/task").iterdir()]


def autogroup_of(pid: int) -> str:
    path = Path(f"/proc/{pid}/autogroup")
    if not path.exists():
        pytest.skip("this kernel has no autogroups")
    return path.read_text().split()[-1]


def test_all_threads_of_a_process_go_behind_others(waits: int) -> None:
    before = nice_of(waits)
    priority.behind(waits)
    assert len(before) == 2
    assert nice_of(waits) == [priority.BEHIND] * 2
    assert autogroup_of(waits) == str(priority.BEHIND)


@pytest.mark.skipif(os.geteuid() != 0, reason="a priority is raised by root")
def test_it_is_taken_back(waits: int) -> None:
    priority.behind(waits)
    priority.usual(waits)
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert nice_of(waits) == [mine, mine]
    assert autogroup_of(waits) == str(mine)


def test_one_that_leads_no_session_leaves_its_sessions_autogroup_alone() -> None:
    # In a session of its own: one that was there before autogroups has none that could be read.
    with subprocess.Popen(
        [sys.executable, "-c", LEADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as leader:
        assert leader.stdout is not None
        led = int(leader.stdout.readline())
        before = autogroup_of(leader.pid)
        priority.behind(led)
        assert nice_of(led) == [priority.BEHIND]
        assert autogroup_of(leader.pid) == before != str(priority.BEHIND)


def test_workers_in_waiting_go_behind_what_runs_and_one_that_died_is_replaced() -> None:
    standby = Standby()
    standby.warm()
    try:
        first = standby.pids()
        assert len(set(first)) == KEPT
        assert all(set(nice_of(pid)) == {priority.BEHIND} for pid in first)
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: gone(first[0]), 10, "its end")
        standby.warm()
        assert len(standby.pids()) == KEPT and first[0] not in standby.pids() and first[1] in standby.pids()
    finally:
        standby.close()
    assert standby.pids() == []
