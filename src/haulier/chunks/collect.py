"""Housekeeping of a store: taking out what nothing refers to, and giving its space back.

One at a time (flock of a file), beside any number of readers and writers. The order is what makes it safe: rows go in
a transaction; then the generation moves on, so that no reader trusts a location it remembered; then holes are punched.
Killed anywhere in between, the next run finds the same dead space, because it is computed from the index.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING, Final, NamedTuple

from haulier.chunks import index as sql
from haulier.chunks.manifest import Manifest
from haulier.chunks.packs import ALIGN, HEADER, Location, Pack, Writer, decode_record, extent, pack_path, punch
from haulier.errors import Conflict, Corrupt, NoRoom, UnknownThing

if TYPE_CHECKING:
    from haulier.chunks.store import ChunkStore

_DEAD: Final = """
WHERE NOT EXISTS (SELECT 1 FROM refs WHERE refs.fp = chunks.fp)
AND NOT EXISTS (SELECT 1 FROM leased WHERE leased.fp = chunks.fp)
"""
_ROOM: Final = f"({HEADER} + (stored + {ALIGN - 1}) / {ALIGN} * {ALIGN})"
"""As `extent` counts it."""
_STRAY_S: Final = 86_400.0
_BATCH: Final = 2048


@dataclass
class GcReport:
    """`chunks` and their `bytes` in packs taken out, `freed` bytes of disk given back (0 in a dry run).

    `cached` chunks of `cached_bytes` stay although nothing refers to them.
    """

    dry_run: bool
    chunks: int = 0
    bytes: int = 0
    leases: int = 0
    freed: int = 0
    compacted: int = 0
    removed: int = 0
    cached: int = 0
    cached_bytes: int = 0


class Cached(NamedTuple):
    """A chunk that nothing refers to: `room` in bytes of pack; when it came and was used last (s since 1970), uses
    after it came, and `queue`, a note of the policy's."""

    fp: bytes
    room: int
    came: int
    used: int
    hits: int
    queue: int


Choose = Callable[[list[Cached]], Collection[bytes]]
"""Which of the chunks that nothing refers to, given in the order of the packs, are to go."""


@dataclass(frozen=True)
class Room:
    """Bytes of pack that all chunks take, and those of them that nothing refers to."""

    used: int
    cached: int
    chunks: int
    cached_chunks: int


@contextmanager
def alone(store: ChunkStore) -> Iterator[None]:
    """Keeps other collections and checks away; Conflict when one is under way."""
    fd = os.open(store.path / "gc.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"the store at {store.path} is being collected or checked; wait for that to end") from None
        yield
    finally:
        os.close(fd)


def measure(store: ChunkStore) -> Room:
    """See ChunkStore.room."""
    with store.index.snapshot() as db:
        used, chunks = db.execute(f"SELECT coalesce(sum({_ROOM}), 0), count(*) FROM chunks").fetchone()
        cached, count = db.execute(f"SELECT coalesce(sum({_ROOM}), 0), count(*) FROM chunks {_DEAD}").fetchone()
    return Room(used, cached, chunks, count)


def collect_garbage(
    store: ChunkStore,
    dry_run: bool,
    lease_age_s: float | None,
    leases: tuple[str, ...] = (),
    manifests: tuple[str, ...] = (),
    choose: Choose | None = None,
) -> GcReport:
    """See ChunkStore.gc."""
    report = GcReport(dry_run)
    with alone(store):
        ending, report.leases = _ending_leases(store, lease_age_s, leases)
        if not dry_run:
            _end(store, ending, manifests)
        with store.index.snapshot() as db:
            found = _unreferenced(db, ending, manifests)
        chosen = {row.fp for row in found} if choose is None else set(choose(found))
        gone = [row for row in found if row.fp in chosen]
        if dry_run:
            report.chunks, report.bytes = len(gone), sum(row.room for row in gone)
        else:
            _take(store, gone, report)
        report.cached = len(found) - report.chunks
        report.cached_bytes = sum(row.room for row in found) - report.bytes
        if dry_run:
            return report
        store.places.advance()
        _remove_strays(store)
        sparse = _punch_all(store, report)
        try:
            store.release_writer()
            _compact(store, sparse, report)
        except NoRoom:
            pass  # holes gave back what they could; moving chunks can wait until there is room to move them to
    return report


def _ending_leases(store: ChunkStore, age_s: float | None, named: tuple[str, ...]) -> tuple[list[str], int]:
    """The leases that end: of stores that are gone, named, and not renewed for `age_s`; how many of the last."""
    ending, old = [], 0
    with store.index.read() as db:
        rows = db.execute("SELECT name, renewed FROM leases").fetchall()
    for name, renewed in rows:
        kind, _, holder = name.partition(":")
        if kind == "open":
            if not _held(store.path / "open" / holder):
                ending.append(name)
        elif name in named:
            ending.append(name)
        elif age_s is not None and renewed <= time.time() - age_s:
            ending.append(name)
            old += 1
    return ending, old


def _end(store: ChunkStore, leases: list[str], manifests: tuple[str, ...]) -> None:
    for lease in leases:
        with store.index.write() as db:
            sql.end_lease(db, lease)
    for name in manifests:
        with suppress(UnknownThing):
            store.drop_manifest(name)


def _unreferenced(db: Connection, leases: list[str], manifests: tuple[str, ...]) -> list[Cached]:
    """Chunks that nothing would refer to without these leases and manifests, in the order of the packs.

    `db` is a snapshot: what is written here are tables of its own, in memory.
    """
    db.execute("CREATE TEMP TABLE over (id INTEGER PRIMARY KEY)")
    db.execute("CREATE TEMP TABLE fewer (fp BLOB PRIMARY KEY, count INTEGER) WITHOUT ROWID")
    db.executemany("INSERT INTO over SELECT id FROM leases WHERE name=?", ((name,) for name in leases))
    counts: Counter[bytes] = Counter()
    for name in manifests:
        row = db.execute("SELECT data FROM manifests WHERE name=? AND pinned", (name,)).fetchone()
        if row is not None:
            counts.update(Manifest.decode(row[0]).unique())
    db.executemany("INSERT INTO fewer VALUES (?,?)", counts.items())
    rows = db.execute(f"""
        SELECT fp, {_ROOM}, came, used, hits, queue FROM chunks
        WHERE NOT EXISTS (SELECT 1 FROM refs WHERE refs.fp = chunks.fp
            AND refs.count > coalesce((SELECT count FROM fewer WHERE fewer.fp = chunks.fp), 0))
        AND NOT EXISTS (SELECT 1 FROM leased WHERE leased.fp = chunks.fp AND lease NOT IN (SELECT id FROM over))
        ORDER BY pack, offset""")
    return [Cached(*row) for row in rows]


def _take(store: ChunkStore, gone: list[Cached], report: GcReport) -> None:
    """Delete the rows that still nothing refers to; unpinned manifests that lose a chunk are no longer complete."""
    named: dict[bytes, frozenset[bytes]] = {}
    for start in range(0, len(gone), _BATCH):  # in pieces: a commit may wait for this one
        batch = gone[start : start + _BATCH]
        with store.index.write() as db:
            taken: set[bytes] = set()
            for row in batch:
                if db.execute(f"DELETE FROM chunks {_DEAD} AND fp=?", (row.fp,)).rowcount:
                    taken.add(row.fp)
                    report.bytes += row.room
            report.chunks += len(taken)
            for name, data in db.execute("SELECT name, data FROM manifests WHERE NOT pinned AND complete").fetchall():
                if data not in named:
                    with suppress(Corrupt):  # check names it
                        named[data] = Manifest.decode(data).unique()
                if not taken.isdisjoint(named.get(data, ())):
                    db.execute("UPDATE manifests SET complete=0 WHERE name=?", (name,))


def _held(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_strays(store: ChunkStore) -> None:
    """Lock files of dead stores, and pack files that no row names."""
    with store.index.read() as db:
        leases = {row[0] for row in db.execute("SELECT name FROM leases")}
        packs = {row[0] for row in db.execute("SELECT id FROM packs")}
    for lock in (store.path / "open").iterdir():
        # Young ones may be about to be locked.
        if f"open:{lock.name}" not in leases and time.time() - lock.stat().st_mtime > _STRAY_S and not _held(lock):
            lock.unlink(missing_ok=True)
    for file in store.packs.glob("*.pack"):
        if file.stem.isdigit() and int(file.stem) not in packs:
            writer = Writer.adopt(store.packs, int(file.stem))
            with store.index.read() as db:
                if writer and not db.execute("SELECT 1 FROM packs WHERE id=?", (int(file.stem),)).fetchone():
                    file.unlink(missing_ok=True)


def _punch_all(store: ChunkStore, report: GcReport) -> list[int]:
    """Punch the dead space of every pack; the packs that are less than half live."""
    sparse: list[int] = []
    with store.index.snapshot() as db:
        # Tails first: rows that appear later lie beyond them.
        tails: dict[int, int] = dict(db.execute("SELECT id, tail FROM packs").fetchall())
        rows = db.execute("SELECT pack, offset, stored FROM chunks ORDER BY pack, offset")
        seen: set[int] = set()
        for number, group in groupby(rows, key=lambda row: int(row[0])):
            if number not in tails:
                continue
            seen.add(number)
            live = _punch_pack(store, number, tails[number], [(row[1], row[2]) for row in group], report)
            if live * 2 < tails[number] - HEADER:
                sparse.append(number)
    return sparse + [number for number in tails if number not in seen]


def _punch_pack(store: ChunkStore, number: int, tail: int, live: list[tuple[int, int]], report: GcReport) -> int:
    """Bytes of pack that live records take."""
    try:
        pack = Pack(store.packs, number, os.O_RDWR)
    except FileNotFoundError:
        return tail  # check reports its chunks
    before = pack.allocated()
    at, used = HEADER, 0
    for offset, stored in live:
        if offset >= tail:
            break
        if offset > at:
            punch(pack, at, offset)
        at = offset + extent(stored)
        used += extent(stored)
    if at < tail:
        punch(pack, at, tail)
    if pack.size() > tail:
        _cut_tail(store, number)
    report.freed += max(0, before - pack.allocated())
    return used


def _cut_tail(store: ChunkStore, number: int) -> None:
    """Take off what a writer that died had not committed; a pack that somebody writes is left alone."""
    writer = Writer.adopt(store.packs, number)
    if writer is None:
        return
    with store.index.read() as db:  # now that nobody moves it
        row = db.execute("SELECT tail FROM packs WHERE id=?", (number,)).fetchone()
    if row is not None:
        writer.set_tail(row[0])


def _compact(store: ChunkStore, sparse: list[int], report: GcReport) -> None:
    """Move the live records of sparse packs into new packs, and remove the old ones; those in use are left alone."""
    target: Writer | None = None
    for number in sparse:
        old = Writer.adopt(store.packs, number)
        with store.index.read() as db:
            row = db.execute("SELECT tail FROM packs WHERE id=?", (number,)).fetchone()
            live = db.execute(
                "SELECT fp, pack, offset, stored, codec FROM chunks WHERE pack=? ORDER BY offset", (number,)
            ).fetchall()
        if row is None:
            continue
        if old is None:
            if not pack_path(store.packs, number).exists() and not live and row[0] == 0:
                with store.index.write() as db:
                    db.execute("DELETE FROM packs WHERE id=? AND tail=0", (number,))
            continue
        freed = old.pack.allocated()
        if not old.set_tail(row[0]) and live:
            continue  # shorter than it should be: check reports what is lost
        used = sum(extent(entry[3]) for entry in live)
        if used * 2 >= row[0] - HEADER and live:
            continue
        if live and (target is None or target.tail >= store.pack_size):
            target = store.new_writer(adopt=False)
        moved: list[tuple[Location, Location, bytes]] = []
        try:
            for fp, *place in live:
                at = Location(*place)
                record = old.pack.read_record(at)
                if target is None or decode_record(fp, at, record) is None:
                    raise Corrupt(f"chunk {fp.hex()} in pack {number}")
                to = target.append(record[:HEADER], record[HEADER:], at.codec)
                moved.append((at, to, fp))
            if target is not None and moved:
                target.sync()
        except (Corrupt, NoRoom) as error:
            if target is not None:
                target.forget()
            if isinstance(error, NoRoom):
                raise
            continue  # the pack stays as it is; check reports the chunk
        with store.index.write() as db:
            db.executemany(
                "UPDATE chunks SET pack=?, offset=? WHERE fp=? AND pack=? AND offset=?",
                ((to.pack, to.offset, fp, at.pack, at.offset) for at, to, fp in moved),
            )
            if target is not None and moved:
                sql.set_tail(db, target.pack.id, target.tail)
            db.execute("DELETE FROM packs WHERE id=?", (number,))
        if target is not None and moved:
            target.committed = target.tail
            report.compacted += 1
        store.places.advance()
        pack_path(store.packs, number).unlink(missing_ok=True)
        report.removed += 1
        report.freed += max(0, freed - used)
