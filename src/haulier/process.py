"""Processes that outlive who started them, told apart from strangers that got their pid later.

Never by a time of day: that steps when the clock is set, and a process that lives would be taken for dead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_POLL_S: Final = 0.005
_URGENT: Final = -10
_WRITTEN_S: Final = 2.0
"""The clock may have been set a little meanwhile."""


@dataclass(frozen=True)
class ProcessId:
    """A process by pid, start time (clock ticks since boot) and boot: no other process ever has all three."""

    pid: int
    ticks: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has `pid` now; None if there is none (a zombie counts as none)."""
        ticks = _start_ticks(pid)
        return None if ticks is None else cls(pid, ticks, _BOOT_ID.read_text().strip())

    @classmethod
    def this(cls) -> ProcessId:
        """The one that asks."""
        found = cls.of(os.getpid())
        assert found is not None, "/proc shows who reads it"
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ProcessId:
        return cls(int(data["pid"]), int(data["ticks"]), str(data["boot"]))

    @classmethod
    def begun(cls, pid: int, started: float) -> ProcessId | None:
        """The process of which an earlier version of haulier wrote down when it began (Unix seconds, by psutil)."""
        with contextlib.suppress(psutil.Error):
            if abs(psutil.Process(pid).create_time() - started) < _WRITTEN_S:
                return cls.of(pid)
        return None

    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        return ProcessId.of(self.pid) == self

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal, never to another process. False if it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except (ProcessLookupError, OSError):
            return False
        try:
            # Looked at after the handle was taken: a pid reused before that shows another start time.
            if not self.alive():
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True

    def wait_gone(self, timeout: float) -> bool:
        """Wait until it has ended; False if it has not within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def kill(self, timeout: float = 10) -> bool:
        """SIGKILL and wait; True when it is gone."""
        self.signal(signal.SIGKILL)
        return self.wait_gone(timeout)


def hurry(pid: int, *, group: bool = False) -> None:
    """Has a process with all its threads, or all processes of a group, go before others: a guest waits for them.

    Nothing happens where the host does not allow that.
    """
    with contextlib.suppress(OSError):
        if group:
            os.setpriority(os.PRIO_PGRP, pid, _URGENT)
            return
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(task.name), _URGENT)


def holding(program: str, beginning: str) -> list[ProcessId]:
    """Processes whose program is that, and that hold a file open whose path begins so.

    For those that were told what to do after they had started, so that their command line does not say it.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if not any(os.fsencode(program) in word for word in words[:3]):
                continue
            held = [str(fd.readlink()) for fd in (entry / "fd").iterdir()]
        except OSError:
            continue
        if any(path.startswith(beginning) for path in held):
            process = ProcessId.of(int(entry.name))
            if process is not None:
                found.append(process)
    return found


def started_as(program: str, argument: str) -> list[ProcessId]:
    """Processes whose program (one of the first words of the command line contains it) got just that argument.

    For those that were started by somebody who died before they were written down.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(argument) in words and any(os.fsencode(program) in word for word in words[:3]):
            process = ProcessId.of(int(entry.name))
            if process is not None:
                found.append(process)
    return found


def _start_ticks(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name may hold blanks and parentheses: fields are counted from its closing one.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
