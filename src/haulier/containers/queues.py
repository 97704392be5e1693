"""What connections still have to send is often a stretch of a file that both sites have: a server of files was read.

CRIU writes a connection's queues into a file of the dump as they are. A stretch of them that lies in a file which the
container has open travels as the name of that file. Only reads; the target compares digests of what it puts in.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from haulier.containers.checkpoint import Borrowed

LEAST: Final = 16 << 10
"""Shorter stretches are sent."""
_NEEDLE: Final = 48
_STEP: Final = 256 << 10
_NEAR: Final = 64 << 20
"""How much of a file is looked through from where the trial found something: the container stands still meanwhile."""
_ALL: Final = 1 << 30
_MOST_NEAR: Final = 128 << 20
_MOST: Final = 2 << 30
"""Bytes that are looked through for a dump at most: a second or so while it runs, little while it stands still."""


@dataclass
class Queues:
    """Finds stretches of a dump's connections in open files, and remembers where for the next dump."""

    _seen: dict[bytes, int] = field(default_factory=dict)

    def find(self, folder: Path, pids: list[int], root: Path, *, anywhere: bool = False) -> list[Borrowed]:
        """Stretches of connections' files in `folder` that lie in files below `root`, open in these processes.

        `anywhere`: not only close to where the last dump had some.
        """
        streams = [path for path in sorted(folder.glob("tcp-stream-*.img")) if path.stat().st_size >= LEAST]
        if not streams:
            return []
        found: list[Borrowed] = []
        budget = _Budget(_MOST if anywhere else _MOST_NEAR)
        with contextlib.ExitStack() as stack:
            files = list(_open_files(pids, root, stack))
            for stream in streams:
                data = stream.read_bytes()
                for name, view in files:
                    begin, end = 0, len(view)
                    if not anywhere:
                        if name not in self._seen:
                            continue
                        begin = self._seen[name]
                        end = min(end, begin + _NEAR)
                    stretch = _stretch(data, view, begin, end, budget)
                    if stretch is not None:
                        at, offset, length = stretch
                        self._seen[name] = offset
                        digest = xxhash.xxh3_128_digest(data[at : at + length])
                        found.append(Borrowed(stream.name, at, name, offset, length, digest))
                        break
        return found


def _open_files(pids: list[int], root: Path, stack: contextlib.ExitStack) -> Iterator[tuple[bytes, mmap.mmap]]:
    """(path in the container without its first slash, contents) of plain files that the processes have open."""
    seen: set[Path] = set()
    for pid in pids:
        links: list[Path] = []
        with contextlib.suppress(OSError):
            links = list(Path(f"/proc/{pid}/fd").iterdir())
        for link in links:
            with contextlib.suppress(OSError, ValueError):
                path, status = link.readlink(), link.stat()
                if path in seen or not path.is_absolute() or not stat.S_ISREG(status.st_mode):
                    continue
                seen.add(path)
                inner = path.relative_to("/")
                # Only what the target has as well: no file of another mount, none that has lost its name.
                if not LEAST <= status.st_size <= _ALL or not os.path.samestat(status, (root / inner).lstat()):
                    continue
                with link.open("rb", 0) as file:
                    view = stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
                yield os.fsencode(inner), view


@dataclass
class _Budget:
    """Bytes that may still be looked through."""

    left: int


def _stretch(data: bytes, view: mmap.mmap, begin: int, end: int, budget: _Budget) -> tuple[int, int, int] | None:
    """The longest stretch of `data` around one of a few places in it that `view` has between `begin` and `end`.

    (where in `data`, where in the file, length); None if there is none of use.
    """
    for at in range(min(LEAST, len(data)) // 2, len(data) - _NEEDLE, _STEP):
        if budget.left <= 0:
            return None
        end = min(end, begin + budget.left)
        place = view.find(data[at : at + _NEEDLE], begin, end)
        budget.left -= (place if place >= 0 else end) - begin
        if place < 0:
            continue
        before = min(at, place)
        mine = np.frombuffer(data, np.uint8)
        # Copied: no array may point into the file's mapping when it is closed.
        theirs = np.frombuffer(view[place - before : place + len(data) - at], np.uint8)
        here = mine[at - before : at - before + len(theirs)]
        unequal = np.flatnonzero(here != theirs)
        first = int(unequal[unequal < before].max()) + 1 if (unequal < before).any() else 0
        after = unequal[unequal >= before]
        last = int(after.min()) if len(after) else len(theirs)
        if last - first >= LEAST:
            return at - before + first, place - before + first, last - first
    return None
