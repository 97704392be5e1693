"""Processes named by id *and* start time, so that a reused id is never taken for ours."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path


def started(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None when there is none (a zombie is none)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command's name stands in brackets and may hold anything, so count from the last one.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def alive(pid: int, start: int) -> bool:
    """Is this very process running?"""
    return pid > 0 and started(pid) == start


def end(processes: Iterable[tuple[int, int]], grace_s: float) -> list[int]:
    """Ends processes given as (id, start time): SIGTERM, after `grace_s` SIGKILL. Returns those that live on."""
    with ExitStack() as stack:
        handles: dict[int, int] = {}
        for pid, start in processes:
            try:
                handle = os.pidfd_open(pid)
            except OSError:
                continue
            stack.callback(os.close, handle)
            # Looked at after opening: from here on the handle cannot mean another process.
            if alive(pid, start):
                handles[handle] = pid
        for sign, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
            for handle in handles:
                try:
                    signal.pidfd_send_signal(handle, sign)
                except ProcessLookupError:
                    pass
            _wait(handles, patience)
            if not handles:
                break
        return list(handles.values())


def _wait(handles: dict[int, int], patience: float) -> None:
    """Takes out of `handles` those that end within `patience` seconds."""
    poller = select.poll()
    for handle in handles:
        poller.register(handle, select.POLLIN)
    deadline = time.monotonic() + patience
    while handles and (left := deadline - time.monotonic()) > 0:
        for handle, _ in poller.poll(left * 1000):
            poller.unregister(handle)
            del handles[handle]


def commands() -> list[tuple[int, list[str]]]:
    """Every process's id and command line."""
    found: list[tuple[int, list[str]]] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            found.append((int(entry.name), line.decode(errors="replace").split("\0")[:-1]))
    return found


def ancestors() -> set[int]:
    """This process and all above it."""
    found: set[int] = set()
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            break
        pid = int(stat[stat.rindex(b")") + 2 :].split()[1])
    return found
