"""Freezers: found in what the kernel says of a process, and tried on a real one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from haulier.containers.freezer import Freezer, _mounted, freezer_of
from haulier.errors import GuestError
from tests.support.waiting import wait_for

MOUNTS = [
    r"31 25 0:27 / /sys/fs/cgroup/un\040ified rw,nosuid - cgroup2 cgroup2 rw",
    "32 25 0:28 /part /mnt/part rw - cgroup cgroup rw,freezer",
    "33 25 0:28 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer",
    "34 25 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct",
]


def test_hierarchies_are_found_where_they_are_mounted_whole() -> None:
    assert _mounted(MOUNTS, "cgroup", "freezer") == Path("/sys/fs/cgroup/freezer")
    assert _mounted(MOUNTS, "cgroup2", "") == Path("/sys/fs/cgroup/un ified")
    with pytest.raises(GuestError, match="pids"):
        _mounted(MOUNTS, "cgroup", "pids")


def test_a_process_that_is_gone() -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    with pytest.raises(GuestError, match="gone"):
        freezer_of(done.pid)


@pytest.mark.root
def test_processes_stand_still_and_go_on() -> None:
    mine = freezer_of(os.getpid())
    folder = mine.folder / f"haulier-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control groups may be made here: {error}")
    child = subprocess.Popen(["sh", "-c", "while :; do :; done"])
    freezer = Freezer(folder, mine.unified)
    try:
        (folder / "cgroup.procs").write_text(str(child.pid))
        assert freezer_of(child.pid) == freezer and not freezer.frozen() and not freezer.asked()
        freezer.freeze()
        freezer.freeze()
        assert freezer.frozen() and freezer.asked()

        def used() -> int:
            return int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11])

        before = used()
        assert used() == before
        freezer.thaw()
        assert not freezer.asked()
        wait_for(lambda: used() > before, 20)
    finally:
        freezer.thaw()
        child.kill()
        child.wait()
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), 10)
        folder.rmdir()
