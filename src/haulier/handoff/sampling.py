"""Looks at parts of a running guest to say what all of it would cost. Changes nothing.

Memory: runs of pages, evenly over what the guest's memory file holds, go through the very codec that a handoff uses,
against the picture that both sites have; two more looks at the same pages tell what the guest dirties, what that costs
as a difference, and how many pages it keeps rewriting. Disk: chunks that the overlay holds, asked for at the target, as
recipes where that is shorter, and what is written to it meanwhile.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.chunks import recipe
from haulier.chunks.blocks import BlockIndex, BlockSpace, StoreBlockFinder
from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.store import ChunkStore
from haulier.compress import StreamCompressor
from haulier.compress.xz import FIRST_LEVEL
from haulier.disks.patches import make_patch
from haulier.disks.rounds import DiskRounds
from haulier.errors import HaulierError, UnknownThing
from haulier.guests.command import RAM_ID
from haulier.handoff.forecast import Sampled
from haulier.memory.ahead import AheadReader
from haulier.memory.base import MemoryBase
from haulier.memory.proxy import SourceProxy
from haulier.memory.sparse import nonzero
from haulier.units import PAGE

RUN: Final = 64
"""Pages in a row: neighbours compress together, as they will on the wire."""
RUNS: Final = 256
LOOKS_S: Final = 0.8
"""Between the two looks at the same page."""
CHUNKS: Final = 64
HEADER: Final = 16
"""Wire bytes of a page that costs nothing, by the thousand: kinds and addresses."""


def memory(
    ram: Path,
    base: MemoryBase | None,
    finder: StoreBlockFinder | None,
    level: int,
    *,
    runs: int = RUNS,
    looks_s: float = LOOKS_S,
) -> Sampled:
    """The guest's memory, by at most `runs` runs of 64 pages.

    Of xz's levels the quickest stands for all, which make up to a twentieth fewer bytes: a plan has to be quick.
    """
    reader = AheadReader(ram, RAM_ID)
    proxy = SourceProxy(None, base, finder, level=min(level, FIRST_LEVEL))
    try:
        proxy.name({RAM_ID: reader.pages * PAGE})
        return _memory(reader, proxy, runs, looks_s)
    finally:
        reader.close()
        proxy.close()


def _memory(reader: AheadReader, proxy: SourceProxy, runs: int, looks_s: float) -> Sampled:
    places = reader.places(RUN)
    # Evenly spaced from a random start: memory is alike in stretches, so this says more than as many at random.
    step = max(1.0, len(places) / runs)
    start = random.Random(1).random() * step
    chosen = [places[int(start + number * step)] for number in range(int((len(places) - start - 1e-9) // step) + 1)]
    counts = {"zero": 0.0, "same": 0.0}
    wires: list[float] = []
    seen: list[float] = []
    for place in chosen:
        seen.append(time.monotonic())
        wire, zero, looked, sent = _look(reader, proxy, place)
        wires.append(wire)
        counts["zero"] += zero
        counts["same"] += looked - zero - len(sent)
    for kind in ("block", "xor", "series", "literal"):
        counts[kind] = float(proxy.counters.pages.get(kind, 0))
    later = _again(reader, proxy, chosen, seen, looks_s)
    scale = len(places) / len(chosen) if chosen else 0.0
    total = {kind: count * scale for kind, count in counts.items()}
    total["zero"] += reader.pages - len(places) * RUN
    wire_all = np.array(wires)
    spread = float(wire_all.std(ddof=1)) if len(wires) > 1 else 0.0
    rest = max(0.0, 1 - len(chosen) / len(places)) if places else 0.0
    return Sampled(
        memory_bytes=reader.pages * PAGE,
        pages=total,
        memory_wire=float(wire_all.sum()) * scale + reader.pages * HEADER / 1000,
        memory_error=spread * len(places) / max(1, len(chosen)) ** 0.5 * rest**0.5,
        dirty_wire_s=later.wire * scale / later.seconds,
        hot_wire=later.hot_wire * scale,
        dirty_bps=later.pages * scale * PAGE * 8 / later.seconds,
    )


def _look(reader: AheadReader, proxy: SourceProxy, place: int) -> tuple[int, int, int, NDArray[np.int64]]:
    """Wire bytes of a run of pages, how many of them are zero, how many there are, and those that the target lacks."""
    assert proxy.mirror is not None
    numbers = np.arange(place, min(place + RUN, reader.pages))
    pages: NDArray[np.uint8] = np.empty((len(numbers), PAGE), np.uint8)
    reader.read(pages, place)
    rows = reader.wanted(proxy.mirror, proxy.mirror.first[RAM_ID] + numbers, pages)
    zero = len(pages) - int(nonzero(pages).sum())
    batches = proxy.ahead(RAM_ID, numbers[rows], pages[rows])
    return sum(len(batch.data) for batch in batches), zero, len(pages), numbers[rows]


@dataclass(frozen=True)
class Dirtied:
    """What changed in the chosen runs in so many seconds; `hot_wire`: what all pages that keep changing cost once."""

    wire: float
    pages: int
    seconds: float
    hot_wire: float


def _again(
    reader: AheadReader, proxy: SourceProxy, chosen: Sequence[int], seen: list[float], looks_s: float
) -> Dirtied:
    """Two more looks. How many pages keep changing is told by how many changed both times, as one tells fish in a pond
    from how many of those caught again were marked (Lincoln and Petersen; Chapman's form, which is never infinite)."""
    if not chosen:
        return Dirtied(0.0, 0, 1.0, 0.0)
    changed: list[NDArray[np.int64]] = []
    wire = seconds = 0.0
    for wait in (looks_s, looks_s / 2):
        time.sleep(max(0.0, seen[0] + wait - time.monotonic()))
        found = []
        span = 0.0
        for which, place in enumerate(chosen):
            cost, _, _, sent = _look(reader, proxy, place)
            wire += cost
            found.append(sent)
            now = time.monotonic()
            span += now - seen[which]
            seen[which] = now
        seconds += span / len(chosen)
        changed.append(np.concatenate(found))
    marked, caught = changed
    pages = len(marked) + len(caught)
    hot = (len(marked) + 1) * (len(caught) + 1) / (len(np.intersect1d(marked, caught)) + 1) - 1
    return Dirtied(wire, pages, seconds, hot * wire / pages if pages else 0.0)


@dataclass(frozen=True)
class Disk:
    """Of the overlay: chunks, wire bytes of those that the target lacks, their standard error, and wire bytes a second
    of what the guest writes."""

    chunks: float
    wire: float
    error: float
    wire_s: float


def disk(
    rounds: DiskRounds,
    index: BlockIndex,
    space: BlockSpace,
    lacking: Callable[[Sequence[bytes]], Sequence[int]],
    meanwhile: Callable[[], Sampled],
) -> tuple[Sampled, Disk]:
    """Looks at the disk, at memory `meanwhile`, and at what was written until then."""
    try:
        with rounds.begin() as current:
            began = time.monotonic()
            dirty = [number for number in current.chunks if number not in current.zero]
            chosen = random.Random(1).sample(dirty, min(CHUNKS, len(dirty)))
            before = {number: bytes(current.read(number)) for number in sorted(chosen)}
        found = meanwhile()
        with rounds.next(hold_back=False) as later:
            span = time.monotonic() - began
            written = sorted(later.dirty)
            looked = random.Random(1).sample(written, min(CHUNKS // 2, len(written)))
            after = {number: bytes(later.read(number)) for number in looked}
    finally:
        with contextlib.suppress(HaulierError):
            rounds.abort()
    costs = _sizes([_anew(before.get(number), data, index, space) for number, data in after.items()])
    wire_s = sum(costs) / len(costs) * len(written) / span if costs else 0.0
    contents = list(before.values())
    if not contents:
        return found, Disk(0.0, 0.0, 0.0, wire_s)
    asked = set(lacking([fingerprint(data) for data in contents]))
    short = [_short(data, index, space) if n in asked else b"" for n, data in enumerate(contents)]
    sizes = np.array(_sizes(short), float)
    spread = float(sizes.std(ddof=1)) if len(sizes) > 1 else 0.0
    rest = max(0.0, 1 - len(contents) / len(dirty))
    error = spread * len(dirty) / len(contents) ** 0.5 * rest**0.5
    return found, Disk(float(len(dirty)), float(sizes.mean()) * len(dirty), error, wire_s)


def _anew(before: bytes | None, data: bytes, index: BlockIndex, space: BlockSpace) -> bytes:
    """What a chunk that was written goes as: a patch on what the target will have by then, where that is known."""
    if before == data:
        return b""
    patch = make_patch(before, data) if before is not None else None
    return patch.data if patch is not None else _short(data, index, space)


def _short(data: bytes, index: BlockIndex, space: BlockSpace) -> bytes:
    """The chunk, or its recipe where that is shorter."""
    made = recipe.encode(data, index, space)
    return made if made is not None and len(made) < len(data) else data


def _sizes(contents: Sequence[bytes]) -> list[int]:
    """Wire bytes of each, one after the other in a stream as a handoff's; nothing costs nothing."""
    compressor = StreamCompressor(3, 24, True)
    return [len(compressor.compress(data)) if data else 0 for data in contents]


def missing(store: ChunkStore, chunks: Sequence[bytes]) -> float:
    """Wire bytes of a chunk of the base that the target lacks, by a sample; recipes may make it less."""
    contents = []
    for fp in random.Random(1).sample(list(chunks), min(CHUNKS // 2, len(chunks))):
        with contextlib.suppress(UnknownThing):
            contents.append(bytes(store.get(fp)))
    return sum(_sizes(contents)) / len(contents) if contents else 0.0
