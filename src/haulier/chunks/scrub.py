"""Reading chunks again after they were written, to find bits that flipped on the disk. A pass is cut into steps.

Packs are read in order, past the page cache, and every record is compared with its fingerprint as on its first read.
A step remembers where it stopped, so a pass goes on after a restart. What is found bad is `condemned`: its row goes,
so that nobody is given it, and every process forgets the place; then another sound copy in the packs is looked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from haulier.chunks import index as sql
from haulier.chunks.check import doubt, is_sound, references, search
from haulier.chunks.collect import alone
from haulier.chunks.packs import HEADER, Location, open_pack

if TYPE_CHECKING:
    from haulier.chunks.store import ChunkStore

_NOTE: Final = "scrub"


class Bad(NamedTuple):
    """A chunk whose record at a place is not what it should be."""

    fp: bytes
    at: Location


@dataclass
class Pass:
    """How far the pass is: before `offset` of `pack`. `begun` and `ended` (of the last whole one) s since 1970."""

    pack: int = 0
    offset: int = 0
    begun: float = 0.0
    ended: float = 0.0
    chunks: int = 0
    bytes: int = 0
    corrupt: int = 0
    healed: int = 0


@dataclass
class Step:
    """What one step read. `done` says that the pass is over."""

    chunks: int = 0
    bytes: int = 0
    bad: list[Bad] = field(default_factory=list)
    done: bool = False


def read_pass(store: ChunkStore) -> Pass:
    """Where the pass stopped; a new one where that is not known."""
    with store.index.read() as db:
        text = sql.read_note(db, _NOTE)
    try:
        return Pass(**json.loads(text or "{}"))
    except (ValueError, TypeError):
        return Pass()


def write_pass(store: ChunkStore, state: Pass) -> None:
    """Remember where the pass stopped."""
    with store.index.write() as db:
        sql.write_note(db, _NOTE, json.dumps(vars(state)))


def scrub_step(store: ChunkStore, state: Pass, most: int, now: float) -> Step:
    """Read up to `most` bytes (at least one record) from where `state` is, and move it on."""
    step = Step()
    if not state.begun:
        state.begun = now
        state.pack = state.offset = state.chunks = state.bytes = state.corrupt = state.healed = 0
    while step.bytes < most or not step.chunks:
        rows = _rows(store, state.pack, state.offset)
        if not rows:
            following = _next_pack(store, state.pack)
            if following is None:
                state.begun, state.ended, step.done = 0.0, now, True
                break
            state.pack, state.offset = following, 0
            continue
        _read(store, rows, state, step, most)
    state.chunks += step.chunks
    state.bytes += step.bytes
    state.corrupt += len(step.bad)
    return step


def _rows(store: ChunkStore, pack: int, offset: int) -> list[Bad]:
    with store.index.snapshot() as db:
        rows = db.execute(
            "SELECT fp, pack, offset, stored, codec FROM chunks WHERE pack=? AND offset>=? ORDER BY offset",
            (pack, offset),
        )
        return [Bad(fp, Location(*place)) for fp, *place in rows]


def _next_pack(store: ChunkStore, pack: int) -> int | None:
    with store.index.read() as db:
        row = db.execute("SELECT min(id) FROM packs WHERE id>?", (pack,)).fetchone()
    return None if row[0] is None else int(row[0])


def _read(store: ChunkStore, rows: Sequence[Bad], state: Pass, step: Step, most: int) -> None:
    pack = open_pack(store.packs, state.pack)
    for fp, at in rows:
        if step.chunks and step.bytes >= most:
            return
        if pack is not None:
            # what flipped on the disk does not show in memory
            os.posix_fadvise(pack.fd, at.offset, at.end - at.offset, os.POSIX_FADV_DONTNEED)
        if (pack is None or not is_sound(pack, fp, at)) and _still(store, fp, at):
            step.bad.append(Bad(fp, at))
        step.chunks += 1
        step.bytes += HEADER + at.stored
        state.offset = at.end


def _still(store: ChunkStore, fp: bytes, at: Location) -> bool:
    """Whether the index still says that the chunk is there: a collection may have moved it meanwhile."""
    with store.index.read() as db:
        return sql.locate(db, fp) == at


def condemn(store: ChunkStore, bad: Sequence[Bad]) -> list[bytes]:
    """Take bad records out of the index; the chunks of which the packs hold no other sound copy.

    Raises Conflict while a collection or check is under way.
    """
    if not bad:
        return []
    with alone(store):
        with store.index.write() as db:
            for fp, at in bad:
                db.execute("DELETE FROM chunks WHERE fp=? AND pack=? AND offset=?", (fp, at.pack, at.offset))
            doubt(db, {each.fp for each in bad})
        store.places.advance()
        found = search(store, {each.fp for each in bad})
        with store.index.write() as db:
            sql.enter(db, found.items(), 0)
    return [fp for fp in dict.fromkeys(each.fp for each in bad) if fp not in found]


def lacking(store: ChunkStore) -> list[bytes]:
    """Chunks that complete, pinned manifests need and that are not here: what a disk has lost."""
    with store.index.snapshot() as db:
        rows = db.execute("SELECT fp FROM refs WHERE NOT EXISTS (SELECT 1 FROM chunks WHERE chunks.fp = refs.fp)")
        absent = {row[0] for row in rows}
        return sorted(absent & references(db)[1]) if absent else []
