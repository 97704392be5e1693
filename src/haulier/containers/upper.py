"""What a container wrote, in rounds: which chunks of its region are others than they were in the last round.

A file keeps its blocks as long as it keeps their number, so that what did not change stays where it is. Whether a file
changed is told by its change time, which no program can set. Through a shared mapping that is so only for the first
store into a clean page, and no unmapping tells of those that followed: what is mapped is read in that round and in the
next one, whatever its times say.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

import msgspec

from haulier.containers import files
from haulier.containers.tree import Entry, Space, Tree
from haulier.errors import UNDECODABLE, GuestError
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK

SETTLE_NS: Final = 2_000_000_000
"""What changed within this time before a round is read again in the next one. A write sets the time as it begins, and
what it writes may come much later: past the page cache to a busy disk, or when writeback holds it up. Also, two changes
within a tick of the kernel, 10 ms at most, may have the same time (before Linux 6.13 they do)."""
Signature = tuple[int, int, int, int]
"""inode, change time, modification time (ns), size."""


def signature(status: os.stat_result) -> Signature:
    return status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size


def load_signatures(path: Path) -> dict[bytes, Signature]:
    """Those that `save_signatures` kept; none where there are none, or they make no sense."""
    try:
        return dict(msgspec.msgpack.decode(path.read_bytes(), type=dict[bytes, tuple[int, int, int, int]]))
    except (OSError, *UNDECODABLE):
        return {}


def save_signatures(path: Path, root: Path) -> None:
    """Notes what the files below `root` are like now, when they are equal to the table."""
    found = {name: signature(status) for name, status in files.walk(root) if stat.S_ISREG(status.st_mode)}
    temporary = path.with_suffix(".new")
    temporary.write_bytes(msgspec.msgpack.encode(found))
    temporary.replace(path)


class UpperRounds:
    """Rounds over the directory `root`, whose region has `chunks` chunks.

    `get` gives a chunk of the region as the last round left it. `tree` is what the region holds as it begins, and
    `known` the signatures that belong to it. `merged` is where the overlay is mounted whose upper directory `root` is.
    """

    def __init__(
        self,
        root: Path,
        chunks: int,
        get: Callable[[int], bytes],
        tree: Tree,
        known: dict[bytes, Signature],
        merged: Path | None = None,
    ) -> None:
        self.root = root
        self._merged = os.fsencode(merged or root)
        self.tree = tree
        self._get = get
        self._space = Space(chunks * BLOCKS_PER_CHUNK)
        self._known = dict(known)
        self._table: list[tuple[int, int]] = []
        self._places: dict[bytes, list[tuple[int, int]]] = {}
        for entry in tree.entries:
            pairs = list(entry.pairs)
            self._space.take(pairs)
            if pairs:
                self._places[entry.path] = pairs
        self.read_bytes = 0
        self.changed_files = 0

    def items(
        self, mapped: Callable[[], Collection[int]] = tuple, *, last: bool = False
    ) -> Iterator[tuple[int, bytes]]:
        """(chunk of the region, 64 KiB) of all that changed since the last round, the table last.

        `mapped` tells what `mapped_for_writing` does. In the `last` round, when nothing changes any more, a file that
        cannot be read raises GuestError; before, the next round will find what became of it.
        """
        self.read_bytes = self.changed_files = 0
        settled = time.time_ns() - SETTLE_NS
        # Only now: what is mapped after it was asked has a change time that is not settled.
        inodes = mapped()
        old = {entry.path: entry for entry in self.tree.entries}
        entries: list[Entry] = []
        blocks: dict[int, bytes] = {}
        top = os.fsencode(self.root)
        seen: set[bytes] = set()
        for entry, status in files.describe(self.root, files.walk(self.root)):
            seen.add(entry.path)
            if not stat.S_ISREG(entry.mode) or entry.hard:
                entries.append(entry)
                continue
            now, was = signature(status), old.get(entry.path)
            same = self._known.get(entry.path) == now and was is not None and was.size == entry.size
            shared = bool(inodes) and self._is_among(inodes, entry.path, status)
            if same and was is not None and not shared:
                entries.append(msgspec.structs.replace(entry, extents=was.extents))
                continue
            place = self._place(entry)
            entries.append(msgspec.structs.replace(entry, extents=tuple(n for pair in place for n in pair)))
            self.changed_files += 1
            try:
                yield from self._contents(os.path.join(top, entry.path), entry, place, blocks)
            except OSError as error:
                if last:
                    raise GuestError(f"{self.root / os.fsdecode(entry.path)} cannot be read: {error}") from error
                self._known.pop(entry.path, None)
                continue
            if now[1] < settled and not shared:
                self._known[entry.path] = now
            else:
                # What is still being written, or is stored through a mapping, would not change its time.
                self._known.pop(entry.path, None)
        for path in [path for path in self._places if path not in seen]:
            self._space.give(self._places.pop(path))
            self._known.pop(path, None)
        yield from self._finish(Tree(tuple(entries)), blocks)

    def _is_among(self, inodes: Collection[int], path: bytes, status: os.stat_result) -> bool:
        """A file may have the number of its inode in the upper directory, or the one that the overlay shows."""
        try:
            return status.st_ino in inodes or os.lstat(os.path.join(self._merged, path)).st_ino in inodes
        except OSError:
            return True

    def _place(self, entry: Entry) -> list[tuple[int, int]]:
        many = -(-entry.size // BLOCK)
        place = self._places.get(entry.path, [])
        have = sum(count for _, count in place)
        if have > many:
            self._space.give(place)
            place = self._space.find(many)
        elif have < many:
            # Grown files keep what they have, unless they were small.
            if have < BLOCKS_PER_CHUNK:
                self._space.give(place)
                place = self._space.find(many)
            else:
                place = [*place, *self._space.find(many - have)]
        self._places[entry.path] = place
        return place

    def _contents(
        self, path: bytes, entry: Entry, place: list[tuple[int, int]], blocks: dict[int, bytes]
    ) -> Iterator[tuple[int, bytes]]:
        """Whole chunks at once; the blocks of others are kept in `blocks`."""
        pieces = files.read_blocks(path, entry.size)
        buffer = b""
        for first, many in place:
            block, end = first, first + many
            while block < end:
                if not buffer:
                    buffer = next(pieces, b"") or bytes(CHUNK)
                    self.read_bytes += len(buffer)
                stop = min(end, (block // BLOCKS_PER_CHUNK + 1) * BLOCKS_PER_CHUNK, block + len(buffer) // BLOCK)
                data, buffer = buffer[: (stop - block) * BLOCK], buffer[(stop - block) * BLOCK :]
                if len(data) == CHUNK:
                    yield block // BLOCKS_PER_CHUNK, data
                else:
                    for number in range(block, stop):
                        blocks[number] = data[(number - block) * BLOCK : (number - block + 1) * BLOCK]
                block = stop

    def _finish(self, tree: Tree, blocks: dict[int, bytes]) -> Iterator[tuple[int, bytes]]:
        if tree != self.tree:
            table = tree.encode()
            many = -(-len(table) // BLOCK)
            if sum(count for _, count in self._table) != many:
                self._space.give(self._table)
                self._table = self._space.find(many)
            at = 0
            for first, count in self._table:
                for number in range(first, first + count):
                    blocks[number] = table[at : at + BLOCK].ljust(BLOCK, b"\0")
                    at += BLOCK
            blocks[0] = tree.header(table, self._table)
            self.tree = tree
        for chunk in sorted({number // BLOCKS_PER_CHUNK for number in blocks}):
            data = bytearray(self._get(chunk))
            for number in range(chunk * BLOCKS_PER_CHUNK, (chunk + 1) * BLOCKS_PER_CHUNK):
                if number in blocks:
                    start = number % BLOCKS_PER_CHUNK * BLOCK
                    data[start : start + BLOCK] = blocks[number]
            yield chunk, bytes(data)


def mapped_for_writing(pids: Callable[[], Collection[int]]) -> set[int]:
    """Inodes of files that these processes have mapped shared and for writing.

    Until Linux 6.7 /proc/PID/maps has those of the upper directory, since then those that the overlay shows: of a file
    that was copied up it is the lower one's. `pids` is asked until it names no new process, for one that was forked
    meanwhile has its parent's mappings.
    """
    found: set[int] = set()
    seen: set[int] = set()
    while new := set(pids()) - seen:
        seen |= new
        for pid in new:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # As bytes: names may have all but b"\n" in them.
                for line in Path(f"/proc/{pid}/maps").read_bytes().split(b"\n"):
                    fields = line.split(None, 5)
                    if len(fields) == 6 and fields[1][1:2] == b"w" and fields[1][3:4] == b"s":
                        found.add(int(fields[4]))
    return found
