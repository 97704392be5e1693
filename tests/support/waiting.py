"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], deadline_s: float = 30.0, what: str = "the condition") -> T:
    """Calls `condition` until what it returns is true, and returns that; fails after `deadline_s` seconds."""
    end = time.monotonic() + deadline_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true within {deadline_s:g} s")
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """It has ended; its parent may not know yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")


def until_none(look: Callable[[], list[str]], deadline_s: float = 30.0) -> list[str]:
    """What `look` finds, once that is nothing; after the deadline what it found last.

    To look once more after that would find what has only just begun.
    """
    deadline = time.monotonic() + deadline_s
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
