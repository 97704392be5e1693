"""Freezers: found in what the kernel says of a process, and tried on a real one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from haulier.containers.freezer import _mounted, freezer_of
from haulier.errors import GuestError
from tests.support.freezing import freezable, used
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
    with freezable() as (child, freezer):
        assert freezer_of(child.pid) == freezer and not freezer.frozen() and not freezer.asked()
        freezer.freeze()
        freezer.freeze()
        assert freezer.frozen() and freezer.asked()
        before = used(child)
        assert used(child) == before
        freezer.thaw()
        assert not freezer.asked()
        wait_for(lambda: used(child) > before, 20)
