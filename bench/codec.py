"""The memory codec against plain zstd: bytes on the wire, and raw megabytes a core-second at each end.

The stream is made here, with the proportions of guests that were measured (restored from a golden snapshot, worked on,
then handed over in several rounds): three fifths of memory free; of the rest two fifths as in the snapshot, a third
blocks of the disk, the others new; then rounds in which a tenth of memory is dirtied again by a few words a page.
Contents are this system's own libraries and texts, so ratios differ a little between machines; all contestants see the
same bytes. Level 2 is what links from 200 Mbps on get, 3 those from 50, 9 those below.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from report import Report, Target

from haulier.compress import StreamCompressor, StreamDecompressor
from haulier.memory import BlockFinder, BlockReader, MemoryBase, Mirror, SourceProxy, TargetProxy
from haulier.memory import format as q
from haulier.memory.elsewhere import page_hashes
from haulier.units import MIB, PAGE

FEED = 256 << 10
"""Bytes given to the source proxy at a time, about what a socket gives."""

PagesArray = NDArray[np.uint8]


class Disk:
    """Blocks that both sites hold; a BlockFinder and a BlockReader."""

    def __init__(self, blocks: PagesArray) -> None:
        hashes = page_hashes(blocks)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._blocks = blocks

    def find(self, pages: PagesArray) -> NDArray[np.int64]:
        wanted = page_hashes(pages)
        at = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        found = np.where(self._hashes[at] == wanted, self._order[at], -1)
        rows = np.flatnonzero(found >= 0)
        equal = (self._blocks[found[rows]].view(np.uint64) == pages[rows].view(np.uint64)).all(axis=1)
        found[rows[~equal]] = -1
        return found

    def read(self, ids: NDArray[np.uint32]) -> PagesArray:
        return self._blocks[ids]


@dataclass(frozen=True)
class Guest:
    """`before`: memory at the golden snapshot; `stream`: the migration; `disk`: blocks both sites hold."""

    before: PagesArray
    stream: bytes
    disk: Disk


def files(count: int, roots: tuple[str, ...], suffixes: tuple[str, ...]) -> PagesArray:
    """`count` pages of this system's files, whole ones first found first taken."""
    out = np.zeros((count, PAGE), np.uint8)
    at = 0
    for root in roots:
        for path in sorted(Path(root).rglob("*")):
            if at >= count:
                return out
            if path.suffix in suffixes and path.is_file() and not path.is_symlink():
                data = np.frombuffer(path.read_bytes()[: 4 * MIB], np.uint8)
                pages = min(len(data) // PAGE, count - at)
                out[at : at + pages] = data[: pages * PAGE].reshape(-1, PAGE)
                at += pages
    return out[:at] if at else out


def heap(rng: np.random.Generator, count: int) -> PagesArray:
    """Pages like a language runtime's heap: pointers, small numbers, short strings."""
    words = rng.integers(0, 1 << 16, (count, PAGE // 8), dtype=np.uint64)
    pointers = rng.random((count, PAGE // 8)) < 0.4
    words[pointers] = np.uint64(0x7F3A_0000_0000) + (words[pointers] << np.uint64(4))
    words[rng.random((count, PAGE // 8)) < 0.3] = 0
    return words.view(np.uint8).reshape(-1, PAGE)


def extents(rng: np.random.Generator, free: NDArray[np.bool_], count: int, mean: int) -> NDArray[np.int64]:
    """About `count` indexes still free, in runs of `mean` on average; they are free no longer."""
    taken: list[NDArray[np.int64]] = []
    got = 0
    while got < count:
        start = int(rng.integers(0, len(free)))
        run = np.arange(start, min(start + int(rng.geometric(1 / mean)), len(free)))
        run = run[free[run]][: count - got]
        free[run] = False
        taken.append(run)
        got += len(run)
    return np.concatenate(taken)


def make(mib: int, seed: int = 7) -> Guest:
    rng = np.random.default_rng(seed)
    pages = mib * MIB // PAGE
    disk = files(pages // 3, ("/usr/lib",), (".so", ".py", ".ko", ".a", ".o"))
    text = files(
        pages // 12, ("/usr/share", "/usr/include", "/usr/lib"), (".txt", ".h", ".py", ".html", ".xml", ".json")
    )
    free = np.ones(pages, np.bool_)
    before = np.zeros((pages, PAGE), np.uint8)
    kernel, cache, old_heap = (extents(rng, free, pages * share // 100, 24) for share in (8, 5, 3))
    before[kernel] = disk[: len(kernel)] ^ np.uint8(0x5A)
    before[cache] = disk[rng.integers(0, len(disk), len(cache))]
    before[old_heap] = heap(rng, len(old_heap))
    now = before.copy()
    for where, share in ((kernel, 0.12), (old_heap, 0.5)):
        touch(rng, now, where[rng.random(len(where)) < share])
    loaded, texts, new_heap, noise = (extents(rng, free, pages * share // 100, 12) for share in (14, 2, 5, 1))
    now[loaded] = disk[rng.integers(0, len(disk), len(loaded))]
    now[texts] = np.roll(text, 123, axis=1)[rng.integers(0, len(text), len(texts))]
    now[new_heap] = heap(rng, len(new_heap))
    now[noise] = rng.integers(0, 256, (len(noise), PAGE), dtype=np.uint8)
    stream = [head(pages), section(q.PART, np.arange(pages), now)]
    busy = np.concatenate((new_heap, old_heap, kernel[: len(kernel) // 10]))
    for share in (0.5, 0.3, 0.15, 0.08):
        dirty = np.sort(rng.choice(busy, int(len(busy) * share), replace=False))
        touch(rng, now, dirty)
        stream.append(section(q.PART, dirty, now))
    stream += [section(q.END, dirty[:64], now), bytes([q.FULL]), text[:40].tobytes()]
    return Guest(before, b"".join(stream), Disk(disk))


def touch(rng: np.random.Generator, memory: PagesArray, where: NDArray[np.int64]) -> None:
    """Write a few words into each of these pages, into some pages many."""
    words = memory.view(np.uint64)
    for index in where.tolist():
        count = 300 if rng.random() < 0.15 else int(rng.integers(1, 40))
        words[index, rng.integers(0, PAGE // 8, count)] = rng.integers(0, 1 << 40, count, dtype=np.uint64)


def head(pages: int) -> bytes:
    size = pages * PAGE
    return b"".join(
        (
            struct.pack(">II", q.MAGIC, q.VERSION),
            bytes([q.CONFIGURATION]) + struct.pack(">I", 11) + b"pc-q35-10.0",
            bytes([q.START]) + struct.pack(">IB3sII", 1, 3, b"ram", 0, q.RAM_VERSION),
            struct.pack(">QB4sQ", size | q.MEM_SIZE, 4, b"ram0", size),
            struct.pack(">QBI", q.EOS, q.FOOTER, 1),
        )
    )


def section(kind: int, dirty: NDArray[np.int64], memory: PagesArray) -> bytes:
    """A RAM section as QEMU would write it of these pages."""
    out = [bytes([kind]) + struct.pack(">I", 1)]
    zero: NDArray[np.bool_] = np.asarray(~memory[dirty].any(axis=1))
    first = True
    for index, empty in zip(dirty.tolist(), zero.tolist(), strict=True):
        flags = (q.ZERO if empty else q.PAGE_DATA) | (0 if first else q.CONTINUE)
        out.append(struct.pack(">Q", index * PAGE | flags))
        if first:
            out.append(b"\x04ram0")
        out.append(b"\0" if empty else memory[index].tobytes())
        first = False
    return b"".join((*out, struct.pack(">QBI", q.EOS, q.FOOTER, 1)))


@dataclass(frozen=True)
class Outcome:
    wire: int
    source_s: float
    target_s: float


def plain(guest: Guest, level: int, long: bool) -> Outcome:
    """The stream through zstd and nothing else."""
    into, back = StreamCompressor(level, 25, long), StreamDecompressor()
    wire, source, target = 0, 0.0, 0.0
    for at in range(0, len(guest.stream), 2 * FEED):
        piece = guest.stream[at : at + 2 * FEED]
        start = time.process_time()
        data = into.compress(piece)
        middle = time.process_time()
        back.decompress(data, len(piece))
        source, target = source + middle - start, target + time.process_time() - middle
        wire += len(data)
    return Outcome(wire, source, target)


def haulier(guest: Guest, folder: Path, level: int, base: MemoryBase | None, disk: Disk | None) -> Outcome:
    """The stream through both proxies; what comes out is compared with what went in.

    The clock starts when the mirrors are there: copying the base costs what it costs once for each handoff.
    """
    finder: BlockFinder | None = disk
    reader: BlockReader | None = disk
    out = SourceProxy(folder / "source.mirror", base, finder, level)
    into = TargetProxy(folder / "target.mirror", base, reader)
    wire, source, target = 0, 0.0, 0.0
    first = len(head(len(guest.before)))
    for batch in [*out.feed(guest.stream[:first]), *out.flush()]:
        wire += len(batch.data)
        into.feed(batch.data)
    for at in range(first, len(guest.stream) + 1, FEED):
        piece = guest.stream[at : at + FEED]
        start = time.process_time()
        batches = out.feed(piece) if len(piece) == FEED else [*out.feed(piece), *out.flush()]
        source += time.process_time() - start
        for batch in batches:
            wire += len(batch.data)
            start = time.process_time()
            into.feed(batch.data)
            target += time.process_time() - start
    if out.finish() != into.digest():
        raise AssertionError("the stream was not rebuilt")
    out.close()
    into.close()
    return Outcome(wire, source, target)


def memory_disk(size: int) -> str | None:
    """Where mirrors usually live: a tmpfs, if there is one with that much room."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > size else None


def run(quick: bool) -> Report:
    guest = make(192 if quick else 512)
    raw = len(guest.stream)
    with tempfile.TemporaryDirectory(prefix="haulier-bench-codec-", dir=memory_disk(4 * guest.before.nbytes)) as name:
        folder = Path(name)
        mirror = Mirror.create(folder / "golden", {"ram0": guest.before.nbytes})
        there = np.flatnonzero(guest.before.any(axis=1))
        mirror.set(there, guest.before[there])
        mirror.complete()
        mirror.close()
        base = MemoryBase.from_mirror(folder / "golden")
        contestants: dict[str, Callable[[], Outcome]] = {
            "zstd -3": lambda: plain(guest, 3, False),
            "zstd -3 long": lambda: plain(guest, 3, True),
            "haulier -5, nothing shared": lambda: haulier(guest, folder, 5, None, None),
            "haulier -5, golden": lambda: haulier(guest, folder, 5, base, None),
            "haulier -5, golden and disk": lambda: haulier(guest, folder, 5, base, guest.disk),
            "haulier -2, golden and disk": lambda: haulier(guest, folder, 2, base, guest.disk),
            "haulier -9, golden and disk": lambda: haulier(guest, folder, 9, base, guest.disk),
        }
        outcomes: dict[str, list[Outcome]] = {what: [] for what in contestants}
        for _ in range(3 if quick else 5):
            for what, contestant in contestants.items():
                outcomes[what].append(contestant())
        base.close()
    rows = []
    for what, some in outcomes.items():
        source, target = median(o.source_s for o in some), median(o.target_s for o in some)
        rows.append(
            {
                "ratio": raw / some[0].wire,
                "codec": what,
                "wire MB": some[0].wire / 1e6,
                "raw MB": raw / 1e6,
                "source MB/s": raw / 1e6 / source,
                "target MB/s": raw / 1e6 / target,
            }
        )
    by_name = {str(row["codec"]): row for row in rows}
    full, fast = by_name["haulier -5, golden and disk"], by_name["haulier -2, golden and disk"]
    return Report(
        rows,
        [
            Target.at_least(
                "source, level 2 (fast links), golden and disk, raw MB/s per core", float(str(fast["source MB/s"])), 350
            ),
            Target.at_least(
                "source, level 5 (the default), golden and disk, raw MB/s per core",
                float(str(full["source MB/s"])),
                350,
            ),
            Target.at_least(
                "wire bytes of zstd -3 over ours with golden and disk, ratio",
                float(str(full["ratio"])) / float(str(by_name["zstd -3"]["ratio"])),
                3,
            ),
        ],
        notes=[
            "MB/s by CPU time of one core, parse, encode and zstd included (target: also the checks and the mirror)"
        ],
    )
