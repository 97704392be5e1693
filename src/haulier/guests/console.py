"""What a guest says on its serial port: kept, but not without end, for the guest decides how much that is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from haulier.units import MIB

MOST: Final = 16 * MIB
KEPT: Final = 1 * MIB


def shorten(log: Path) -> None:
    """Leaves the last mebibyte of a log of more than 16 beside it, as ``.old``, and empties it.

    QEMU goes on at the beginning: it opens the file for appending. What it writes in that very moment is lost.
    """
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size <= MOST:
            return
        with log.open("r+b") as file:
            file.seek(-KEPT, 2)
            log.with_name(log.name + ".old").write_bytes(file.read())
            file.truncate(0)
