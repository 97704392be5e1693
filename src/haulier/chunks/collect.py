"""Housekeeping of a store: collecting, giving space back, checking, and rebuilding a lost index.

One at a time (flock of a file), beside any number of readers and writers. The order is what makes it safe: rows go in
a transaction; then the generation moves on, so that no reader trusts a location it remembered; then holes are punched.
Killed anywhere in between, the next run finds the same dead space, because it is computed from the index.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from sqlite3 import Connection
from typing import TYPE_CHECKING, Final

from haulier.chunks import index as sql
from haulier.chunks.manifest import Manifest
from haulier.chunks.packs import HEADER, Location, Pack, Writer, decode_record, extent, pack_path, punch, walk
from haulier.errors import Conflict, Corrupt, NoRoom

if TYPE_CHECKING:
    from haulier.chunks.store import ChunkStore

_DEAD: Final = """
WHERE NOT EXISTS (SELECT 1 FROM refs WHERE refs.fp = chunks.fp)
AND NOT EXISTS (SELECT 1 FROM leased WHERE leased.fp = chunks.fp)
"""
_STRAY_S: Final = 86_400.0
_BATCH: Final = 1024


@dataclass
class GcReport:
    """`chunks` and their `bytes` in packs taken out, `freed` bytes of disk given back (0 in a dry run)."""

    dry_run: bool
    chunks: int = 0
    bytes: int = 0
    leases: int = 0
    freed: int = 0
    compacted: int = 0
    removed: int = 0


@dataclass
class CheckReport:
    """What `check` found. Fingerprints are in hex; `repaired` says that what could be put right was."""

    chunks: int = 0
    corrupt: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong_references: int = 0
    damaged_manifests: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not (self.corrupt or self.missing or self.wrong_references or self.damaged_manifests)


@contextmanager
def _alone(store: ChunkStore) -> Iterator[None]:
    fd = os.open(store.path / "gc.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"the store at {store.path} is being collected or checked; wait for that to end") from None
        yield
    finally:
        os.close(fd)


def collect_garbage(store: ChunkStore, dry_run: bool, lease_age_s: float | None) -> GcReport:
    """See ChunkStore.gc."""
    report = GcReport(dry_run)
    with _alone(store):
        with store.index.write() as db:
            db.execute("SAVEPOINT collection")
            report.leases = _end_leases(store, db, lease_age_s)
            report.chunks, report.bytes = db.execute(
                f"SELECT count(*), coalesce(sum(stored), 0) FROM chunks {_DEAD}"
            ).fetchone()
            if dry_run:
                db.execute("ROLLBACK TO collection")
            elif report.chunks:
                db.execute(f"DELETE FROM chunks {_DEAD}")
            db.execute("RELEASE collection")
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


def _end_leases(store: ChunkStore, db: Connection, age_s: float | None) -> int:
    """End the leases of stores that are gone, and those not renewed for `age_s`; how many of the latter."""
    ended = 0
    for name, renewed in db.execute("SELECT name, renewed FROM leases").fetchall():
        kind, _, holder = name.partition(":")
        if kind == "open":
            if not _held(store.path / "open" / holder):
                sql.end_lease(db, name)
        elif age_s is not None and renewed <= time.time() - age_s:
            sql.end_lease(db, name)
            ended += 1
    return ended


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
    report.freed += max(0, before - pack.allocated())
    return used


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


def check_store(store: ChunkStore, repair: bool) -> CheckReport:
    """See ChunkStore.check."""
    report = CheckReport()
    with _alone(store):
        with store.index.snapshot() as db:
            expected, needed, report.damaged_manifests = _references(db)
            counted: dict[bytes, int] = dict(db.execute("SELECT fp, count FROM refs").fetchall())
            report.wrong_references = sum(
                1 for fp in expected.keys() | counted.keys() if expected.get(fp, 0) != counted.get(fp, 0)
            )
            corrupt: dict[bytes, Location] = {}
            held: set[bytes] = set()
            cursor = db.execute("SELECT fp, pack, offset, stored, codec FROM chunks ORDER BY pack, offset")
            pack: Pack | None = None
            while rows := cursor.fetchmany(_BATCH):
                for fp, *place in rows:
                    at = Location(*place)
                    report.chunks += 1
                    if pack is None or pack.id != at.pack:
                        pack = _open(store, at.pack)
                    if pack is None or not _sound(pack, fp, at):
                        corrupt[fp] = at
                    elif fp in needed:
                        held.add(fp)
        missing = needed - held - corrupt.keys()
        if repair:
            found = _search(store, missing | corrupt.keys()) if missing or corrupt else {}
            with store.index.write() as db:
                for fp, at in corrupt.items():
                    db.execute("DELETE FROM chunks WHERE fp=? AND pack=? AND offset=?", (fp, at.pack, at.offset))
                db.executemany(
                    "INSERT OR IGNORE INTO chunks VALUES (?,?,?,?,?)", ((fp, *at) for fp, at in found.items())
                )
                db.execute("DELETE FROM refs")
                db.executemany("INSERT INTO refs VALUES (?,?)", _references(db)[0].items())
                db.execute("DELETE FROM leased WHERE lease NOT IN (SELECT id FROM leases)")
            store.places.advance()
            missing -= found.keys()
            report.repaired = True
        report.corrupt = sorted(fp.hex() for fp in corrupt)
        report.missing = sorted(fp.hex() for fp in missing)
    return report


def _references(db: Connection) -> tuple[Counter[bytes], set[bytes], list[str]]:
    """(references by all manifests, chunks that complete manifests need, manifests that do not decode)."""
    counts: Counter[bytes] = Counter()
    needed: set[bytes] = set()
    damaged: list[str] = []
    for name, data, complete in db.execute("SELECT name, data, complete FROM manifests"):
        try:
            unique = Manifest.decode(data).unique()
        except Corrupt:
            damaged.append(name)
            continue
        counts.update(unique)
        if complete:
            needed |= unique
    return counts, needed, damaged


def _open(store: ChunkStore, number: int) -> Pack | None:
    try:
        return Pack(store.packs, number)
    except OSError:
        return None


def _sound(pack: Pack, fp: bytes, at: Location) -> bool:
    try:
        return decode_record(fp, at, pack.read_record(at)) is not None
    except OSError:
        return False


def _search(store: ChunkStore, fps: set[bytes]) -> dict[bytes, Location]:
    """Sound records of chunks that the index has lost, below the tails."""
    found: dict[bytes, Location] = {}
    with store.index.read() as db:
        tails = db.execute("SELECT id, tail FROM packs").fetchall()
    for number, tail in tails:
        pack = _open(store, number)
        if pack is None:
            continue
        for fp, at in walk(pack, min(tail, pack.size())):
            if fp in fps and fp not in found and _sound(pack, fp, at):
                found[fp] = at
    return found


def reindex(store: ChunkStore) -> int:
    """Enter every sound record of the pack files into an empty index; how many chunks there are."""
    with store.index.write() as db:
        for file in sorted(store.packs.glob("*.pack")):
            if not file.stem.isdigit():
                continue
            pack = Pack(store.packs, int(file.stem))
            tail = 0
            for fp, at in walk(pack, pack.size()):
                if _sound(pack, fp, at):
                    db.execute("INSERT OR IGNORE INTO chunks VALUES (?,?,?,?,?)", (fp, *at))
                    tail = at.end
            sql.set_tail(db, pack.id, tail)
        return int(db.execute("SELECT count(*) FROM chunks").fetchone()[0])
