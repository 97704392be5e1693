"""Processes are told apart by more than their pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from haulier.process import ProcessId, holding, hurry, started_as
from tests.support.waiting import wait_for


def test_a_process_is_known_until_it_ends() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    try:
        found = ProcessId.of(child.pid)
        assert found is not None
        assert found.alive()
        assert ProcessId.from_dict({"pid": found.pid, "ticks": found.ticks, "boot": found.boot}) == found
        assert not found.wait_gone(0.0)
        assert found.kill()
        # A zombie: nobody has waited for it yet.
        assert not found.alive()
        assert ProcessId.of(child.pid) is None
        assert not found.signal(signal.SIGTERM)
    finally:
        child.kill()
        child.wait()
    assert not found.alive()


def test_another_process_with_the_same_pid_is_left_alone() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    try:
        found = ProcessId.of(child.pid)
        assert found is not None
        for stranger in (replace(found, ticks=found.ticks - 1), replace(found, boot="an earlier boot")):
            assert not stranger.alive()
            assert not stranger.signal(signal.SIGKILL)
            assert stranger.kill()
        assert found.alive()
    finally:
        child.kill()
        child.wait()


def test_odd_names_do_not_confuse() -> None:
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b') Z 1 (', 0, 0, 0); input()"
    child = subprocess.Popen(["python3", "-c", code], stdin=subprocess.PIPE)
    try:
        wait_for(lambda: ") Z 1 (" in open_stat(child.pid), what="the new name")
        found = ProcessId.of(child.pid)
        assert found is not None
        assert found.alive()
    finally:
        child.communicate(b"\n")


def open_stat(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read()


def test_nobody() -> None:
    assert ProcessId.of(2**22 + 1) is None
    assert ProcessId.of(os.getpid()) is not None


def test_a_process_is_found_by_what_it_was_started_with(tmp_path: Path) -> None:
    program = tmp_path / "qemu-system-test"
    program.write_text("#!/bin/sh\nread forever\n")
    program.chmod(0o755)
    mine, other = str(tmp_path / "a" / "pid"), str(tmp_path / "a" / "pid2")
    children = [
        subprocess.Popen([str(program), "-pidfile", path], stdin=subprocess.PIPE) for path in (mine, other, mine)
    ]
    # Somebody who only looks at the file is no stray.
    children.append(subprocess.Popen(["tail", "-f", "/dev/null", mine], stderr=subprocess.DEVNULL))
    try:
        wait_for(lambda: len(started_as("qemu-system", mine)) == 2)
        assert {found.pid for found in started_as("qemu-system", mine)} == {children[0].pid, children[2].pid}
        for found in started_as("qemu-system", mine):
            found.kill()
        assert started_as("qemu-system", mine) == []
        assert [found.pid for found in started_as("qemu-system", other)] == [children[1].pid]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_strays_are_found_by_the_file_that_they_hold(tmp_path: Path) -> None:
    mine, other = tmp_path / "web1.ctl.lock", tmp_path / "web2.ctl.lock"
    code = "import sys; held = open(sys.argv[1], 'ab'); sys.stdin.read()"
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE) for path in (mine, other)
    ]
    try:
        wait_for(lambda: len(holding("python", str(tmp_path))) == 2)
        assert [found.pid for found in holding("python", str(tmp_path / "web1.ctl"))] == [children[0].pid]
        assert holding("qemu-system", str(tmp_path)) == []
    finally:
        for child in children:
            child.kill()
            child.communicate()


@pytest.mark.root
@pytest.mark.root
def test_what_a_guest_waits_for_goes_before_others() -> None:
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & exec sleep 1000"], start_new_session=True)
    try:
        wait_for(lambda: len(psutil.Process(child.pid).children()) == 1, 10)
        (other,) = psutil.Process(child.pid).children()
        before = 0  # whatever these tests are run with
        for process in (child, other):
            os.setpriority(os.PRIO_PROCESS, process.pid, before)
        hurry(child.pid)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) < before == os.getpriority(os.PRIO_PROCESS, other.pid)
        hurry(child.pid, group=True)
        assert os.getpriority(os.PRIO_PROCESS, other.pid) < before
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    hurry(child.pid)
    hurry(child.pid, group=True)
