"""The memory of running processes, read where it is and without stopping them.

A page has a number in the picture that both sites keep: the address space of each process is cut into frames of 64
pages, and a frame gets its place in the picture when it is first seen. CRIU restores processes at the same numbers and
addresses, so the places hold for the way back as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from haulier.errors import UNDECODABLE, Corrupt, NoRoom
from haulier.memory import sparse
from haulier.units import MIB, PAGE

FRAME_LOG: Final = 6
FRAME: Final = 1 << FRAME_LOG
_READ_PAGES: Final = 512
_MAP_PAGES: Final = 1 << 18
_POPULATE_WRITE: Final = 23
_STEP: Final = MIB
_MADVISE: Final = ctypes.CDLL(None).madvise
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_SKIPPED: Final = re.compile(r"\[(vvar|vsyscall|vdso|vvar_vclock)\]")
_PRESENT: Final = np.uint64(3 << 62)
_FILE: Final = np.uint64(1 << 61)

Key = tuple[str, int]
"""An address space: ("p", process number in the container) or ("s", number of a shared segment)."""


def picture_pages(memory_mib: int) -> int:
    """Pages of the picture of a container with that much memory; the same at both sites. Unused ones cost nothing."""
    return max(2048, 4 * memory_mib) * MIB // PAGE


@functools.cache
def kernel_pages() -> bytes:
    """The code that this host's kernel puts into every process ([vdso]), which a dump has as pages of its own; b"" if
    there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith("[vdso]"):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                with open("/proc/self/mem", "rb", 0) as memory:
                    return os.pread(memory.fileno(), end - start, start)
    return b""


def kernel_digest() -> str:
    """Of these pages: hosts of the same kernel and processor have the same."""
    return hashlib.blake2b(kernel_pages(), digest_size=8).hexdigest()


class Places:
    """Frames and where they lie in the picture."""

    def __init__(self, pages: int) -> None:
        self._frames = pages // FRAME
        self._next = 0
        self._at: dict[Key, dict[int, int]] = {}

    def numbers(self, key: Key, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers in the picture of these pages of an address space. NoRoom when the picture is full."""
        mine = self._at.setdefault(key, {})
        frames, inverse = np.unique(pages >> FRAME_LOG, return_inverse=True)
        found = np.empty(len(frames), np.int64)
        for row, frame in enumerate(frames.tolist()):
            place = mine.get(frame)
            if place is None:
                if self._next >= self._frames:
                    raise NoRoom("the container's processes use more address space than its --memory lets expect")
                place = mine[frame] = self._next
                self._next += 1
            found[row] = place
        numbers: NDArray[np.int64] = (found[inverse.reshape(-1)] << FRAME_LOG) + (pages & (FRAME - 1))
        return numbers

    def encode(self) -> bytes:
        """For the way back."""
        plain = [(kind, number, frames) for (kind, number), frames in self._at.items()]
        return msgspec.msgpack.encode([self._next, plain])

    @classmethod
    def decode(cls, data: bytes, pages: int) -> Places:
        """Corrupt for what `encode` did not make."""
        made = cls(pages)
        try:
            following, plain = msgspec.msgpack.decode(data, type=tuple[int, list[tuple[str, int, dict[int, int]]]])
        except UNDECODABLE as error:
            raise Corrupt(f"the places of a container's pages make no sense ({error})") from None
        made._next = following
        made._at = {(kind, number): frames for kind, number, frames in plain}
        if any(not 0 <= place < following for frames in made._at.values() for place in frames.values()):
            raise Corrupt("the places of a container's pages lie beyond their end")
        return made


def populate(taken: mmap.mmap, size: int) -> None:
    """Has the first `size` bytes filled with memory now; where there is not so much, nothing happens."""
    # Not mmap's own madvise: nothing else of this process would run during that.
    address = ctypes.addressof(ctypes.c_char.from_buffer(taken))
    size = min(size, len(taken))
    for at in range(0, size, _STEP):
        if _MADVISE(address + at, min(_STEP, size - at), _POPULATE_WRITE):
            return


class Reserve:
    """Memory that is about to be needed, taken beforehand: a virtual host may have to ask for each page of it anew."""

    def __init__(self, size: int) -> None:
        """`size` in bytes; where there is not so much, nothing is taken."""
        self._taken: mmap.mmap | None = None
        if size > 0:
            with contextlib.suppress(OSError, ValueError):
                self._taken = mmap.mmap(-1, size)
                populate(self._taken, size)

    def release(self) -> None:
        """Gives it back to the host; repeated, it does nothing."""
        if self._taken is not None:
            self._taken.close()
            self._taken = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one address space: page numbers there, and contents u8 (n, 4096)."""

    key: Key
    pages: NDArray[np.int64]
    contents: NDArray[np.uint8]


Areas = dict[int, list[str]]
"""The lines of /proc/PID/maps by process."""


def areas_of(pids: list[int]) -> Areas:
    """What the processes have mapped now; those that are gone are left out."""
    found: Areas = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            found[pid] = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    return found


def read_processes(areas: Areas) -> Iterator[Piece]:
    """What the processes have in memory now that no file has, in pieces; what goes away meanwhile is left out."""
    shared: set[int] = set()
    for pid, lines in areas.items():
        try:
            inner = _inner_pid(pid)
            with open(f"/proc/{pid}/mem", "rb", 0) as memory, open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
                for line in lines:
                    yield from _area(line, ("p", inner), memory.fileno(), pagemap.fileno(), shared)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


@dataclass(frozen=True, slots=True)
class Changed:
    """Pages of a file of which a process has changed copies of its own: a program's data and what was linked into it.

    `root` is where the process sees "/"; `pages` are the numbers in its address space, `at` those in the file.
    """

    key: Key
    root: Path
    path: str
    pages: NDArray[np.int64]
    at: NDArray[np.int64]

    def original(self) -> Piece:
        """What the file of that name has there; OSError without one. A file that was replaced gives other pages."""
        parts: list[bytes] = []
        with (self.root / self.path.lstrip("/")).open("rb", 0) as file:
            for position, count in sparse.runs(self.at):
                data = os.pread(file.fileno(), count * PAGE, int(self.at[position]) * PAGE)
                parts.append(data.ljust(count * PAGE, b"\0"))
        return Piece(self.key, self.pages, np.frombuffer(b"".join(parts), np.uint8).reshape(-1, PAGE))


def changed_copies(areas: Areas) -> Iterator[Changed]:
    """All of them; what goes away meanwhile is left out."""
    for pid, lines in areas.items():
        try:
            key = ("p", _inner_pid(pid))
            with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap:
                for line in lines:
                    fields = line.split(None, 5)
                    if len(fields) < 6 or not fields[5].startswith("/") or fields[1][3] != "p":
                        continue
                    start, end = (int(part, 16) // PAGE for part in fields[0].split("-"))
                    many = min(_MAP_PAGES, end - start)
                    flags = np.frombuffer(os.pread(pagemap.fileno(), many * 8, start * 8), np.uint64)
                    rows = np.flatnonzero(((flags & _PRESENT) != 0) & ((flags & _FILE) == 0)).astype(np.int64)
                    if len(rows):
                        at = rows + int(fields[2], 16) // PAGE
                        yield Changed(key, Path(f"/proc/{pid}/root"), fields[5], rows + start, at)
        except (OSError, ValueError):
            continue


def _inner_pid(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return pid


def _area(line: str, key: Key, memory: int, pagemap: int, shared: set[int]) -> Iterator[Piece]:
    fields = line.split(None, 5)
    name = fields[5] if len(fields) > 5 else ""
    if _SKIPPED.match(name):
        return
    start, end = (int(part, 16) // PAGE for part in fields[0].split("-"))
    offset = 0
    if fields[1][3] == "s":
        # Shared memory without a file of its own; other shared mappings are the file system's.
        if not name.startswith(("/dev/zero", "/SYSV", "/memfd:")):
            return
        number = int(fields[4])
        key, offset = ("s", number), int(fields[2], 16) // PAGE - start
        if number in shared:
            return
        shared.add(number)
    for first in range(start, end, _MAP_PAGES):
        many = min(_MAP_PAGES, end - first)
        try:
            flags = np.frombuffer(os.pread(pagemap, many * 8, first * 8), np.uint64)
        except OSError:
            return
        wanted = (flags & _PRESENT) != 0
        if key[0] == "p":
            wanted &= (flags & _FILE) == 0
        indexes = np.flatnonzero(wanted).astype(np.int64)
        for position, count in sparse.runs(indexes):
            page = first + int(indexes[position])
            for at in range(page, page + count, _READ_PAGES):
                some = min(_READ_PAGES, page + count - at)
                with contextlib.suppress(OSError):
                    data = os.pread(memory, some * PAGE, at * PAGE)
                    some = len(data) // PAGE
                    contents = np.frombuffer(data, np.uint8, some * PAGE).reshape(-1, PAGE)
                    yield Piece(key, np.arange(at, at + some, dtype=np.int64) + offset, contents)
