"""Copying and weighing sparse files."""

from __future__ import annotations

import os
from pathlib import Path

from haulier.memory.sparse import data_extents


def copy(source: Path, target: Path) -> None:
    """A copy of `source` under the new name `target`, with the same holes."""
    with source.open("rb") as read, target.open("xb") as write:
        length = os.fstat(read.fileno()).st_size
        os.ftruncate(write.fileno(), length)
        for start, end in data_extents(read.fileno(), 0, length):
            os.lseek(write.fileno(), start, os.SEEK_SET)
            at = start
            while at < end:
                at += os.sendfile(write.fileno(), read.fileno(), at, min(end - at, 8 << 20))


def size(path: Path) -> int:
    """Bytes that the file takes on its disk; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
