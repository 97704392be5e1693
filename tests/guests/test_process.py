"""Processes are told apart by more than their pid."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace

from haulier.guests.process import ProcessId
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
