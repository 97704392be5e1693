"""How much memory a handoff's worker takes, and how it takes less."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Final

from haulier.handoff import sparsefile

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
"""glibc's names for what `be_lean` sets."""


def be_lean() -> None:
    """Has the C library give memory back; to be called before threads begin.

    By itself it keeps an arena for each thread, and, once it has seen one large buffer freed, keeps all such as well:
    what xz took for a batch stayed with the worker, several times.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 2)
        mallopt(_MMAP_THRESHOLD, 256 << 10)
        mallopt(_TRIM_THRESHOLD, 1 << 20)


def footprint(mirror: Path, smaps: Path = Path("/proc/self/smaps_rollup")) -> dict[str, int]:
    """Bytes: `anonymous`, the process's own; `mirror`, what its mirror's file takes of the tmpfs.

    Pages of base and golden snapshot are page cache, shared with everybody who maps them, and are not counted.
    """
    own = 0
    try:
        for line in smaps.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "Anonymous":
                own = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        own = 0
    return {"anonymous": own, "mirror": sparsefile.size(mirror)}
