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

from haulier.containers import sockets
from haulier.containers.checkpoint import Borrowed

LEAST: Final = 16 << 10
"""Shorter stretches are sent."""
_NEEDLE: Final = 48
_PLACES: Final = 3
"""In a queue, from which its stretch is looked for: it may begin and end with something else."""
_BEFORE: Final = 4 << 20
_BEHIND: Final = 28 << 20
"""Where a connection stands in its file is known to some megabytes: it went on while it was looked at."""
_ALL: Final = 1 << 30
_MOST_EACH: Final = 64
"""Bytes that are looked through for each byte of a queue while the container stands still: in memory it takes about as
long as sending that byte at 1 Gbit/s."""
_MOST: Final = 2 << 30
"""Bytes that are looked through for a dump at most: a second or so while it runs, little while it stands still."""


@dataclass
class Queues:
    """Finds stretches of a dump's connections in open files, and remembers where for the next dump."""

    _begins: dict[int, int] = field(default_factory=dict)
    """By a socket's inode: where in its file the first byte that it ever sent would be."""

    def find(self, folder: Path, pids: list[int], root: Path, *, anywhere: bool = False) -> list[Borrowed]:
        """Stretches of connections' files in `folder` that lie in files below `root`, open in these processes.

        First where each connection must be by what its peer has acknowledged, of which one that began after the last
        dump has said little before its file; then in all of each file. `anywhere`: however long it takes, for the
        container runs.
        """
        streams = [path for path in sorted(folder.glob("tcp-stream-*.img")) if path.stat().st_size >= LEAST]
        if not streams:
            return []
        found: list[Borrowed] = []
        size = sum(path.stat().st_size for path in streams)
        budget = _Budget(_MOST if anywhere else min(_MOST, size * _MOST_EACH))
        acknowledged = sockets.acknowledged(pids)
        with contextlib.ExitStack() as stack:
            files = list(_open_files(pids, root, stack))
            for stream in streams:
                data = stream.read_bytes()
                connection = int(stream.name.removeprefix("tcp-stream-").removesuffix(".img"), 16)
                acked = acknowledged.get(connection, 0)
                stands = self._begins.get(connection, 0) + acked
                hit = _first(data, files, [(stands - _BEFORE, stands + _BEHIND), (0, _ALL)], budget)
                if hit is None:
                    continue
                name, (at, offset, length) = hit
                self._begins[connection] = offset - at - acked
                digest = xxhash.xxh3_128_digest(data[at : at + length])
                found.append(Borrowed(stream.name, at, name, offset, length, digest))
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


def _first(
    data: bytes, files: list[tuple[bytes, mmap.mmap]], windows: list[tuple[int, int]], budget: _Budget
) -> tuple[bytes, tuple[int, int, int]] | None:
    """The first of `files` that has a stretch of `data` in a window; the likeliest window comes first."""
    for begin, end in windows:
        for name, view in files:
            stretch = _stretch(data, view, begin, end, budget)
            if stretch is not None:
                return name, stretch
    return None


def _stretch(data: bytes, view: mmap.mmap, begin: int, end: int, budget: _Budget) -> tuple[int, int, int] | None:
    """The longest stretch of `data` around one of a few places in it that `view` has between `begin` and `end`.

    (where in `data`, where in the file, length); None if there is none of use.
    """
    begin, end = max(0, begin), min(end, len(view))
    first = min(LEAST, len(data)) // 2
    for at in range(first, len(data) - _NEEDLE, max(1, (len(data) - first) // _PLACES)):
        place = view.find(data[at : at + _NEEDLE], begin, min(end, begin + budget.left))
        budget.left -= max(0, (place if place >= 0 else end) - begin)
        if place < 0:
            if budget.left <= 0:
                return None
            continue
        before = min(at, place)
        mine = np.frombuffer(data, np.uint8)
        # Copied: no array may point into the file's mapping when it is closed.
        theirs = np.frombuffer(view[place - before : place + len(data) - at], np.uint8)
        here = mine[at - before : at - before + len(theirs)]
        unequal = np.flatnonzero(here != theirs)
        start = int(unequal[unequal < before].max()) + 1 if (unequal < before).any() else 0
        after = unequal[unequal >= before]
        stop = int(after.min()) if len(after) else len(theirs)
        if stop - start >= LEAST:
            return at - before + start, place - before + start, stop - start
    return None
