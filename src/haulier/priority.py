"""How much of the processors a process gets where others want them as well: guests and what serves them go first."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

BEHIND: Final = 10
"""In nice's steps: a tenth of the weight of a process that was told nothing, so that nothing starves."""


def behind(pid: int = 0) -> None:
    """That process (0: this one) gets what others leave it, from now on; what it starts later begins the same way."""
    _set(pid, BEHIND)


def usual(pid: int = 0) -> None:
    """Takes `behind` back, where this process may (it takes root, or CAP_SYS_NICE).

    That process is then like this one, and this one (0) like its parent: whatever the operator's unit has set.
    """
    with contextlib.suppress(OSError):
        _set(pid, os.getpriority(os.PRIO_PROCESS, os.getpid() if pid else os.getppid()))


def _set(pid: int, nice: int) -> None:
    """Never fails: a process that keeps its priority is only less polite.

    Both are set, as either may count for nothing: a nice value holds among the threads of an autogroup (sched(7)) where
    there are such, and an autogroup only outside of a control group with a share of its own, as a systemd unit has it.
    """
    process = Path("/proc", str(pid or "self"))
    with contextlib.suppress(OSError):
        for thread in (process / "task").iterdir():
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
    with contextlib.suppress(OSError):
        # Of the whole session; in the way of whoever leads another one.
        if os.getsid(pid) == (pid or os.getpid()):
            (process / "autogroup").write_text(f"{nice}\n")
