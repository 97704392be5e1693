"""Checking a store against itself, mending what can be mended, and rebuilding a lost index."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field
from sqlite3 import Connection
from typing import TYPE_CHECKING, Final

from haulier.chunks import index as sql
from haulier.chunks.collect import alone
from haulier.chunks.manifest import Manifest
from haulier.chunks.packs import Location, Pack, open_pack, read_chunk, walk
from haulier.errors import Corrupt

if TYPE_CHECKING:
    from haulier.chunks.store import ChunkStore

_BATCH: Final = 1024


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


def check_store(store: ChunkStore, repair: bool, deep: bool = True) -> CheckReport:
    """See ChunkStore.check."""
    report = CheckReport()
    with alone(store):
        with store.index.snapshot() as db:
            expected, needed, report.damaged_manifests = references(db)
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
                        pack = open_pack(store.packs, at.pack)
                    if pack is None or not (is_sound(pack, fp, at) if deep else at.end <= pack.size()):
                        corrupt[fp] = at
                    elif fp in needed:
                        held.add(fp)
        missing = needed - held - corrupt.keys()
        if repair:
            found = search(store, missing | corrupt.keys()) if missing or corrupt else {}
            with store.index.write() as db:
                for fp, at in corrupt.items():
                    db.execute("DELETE FROM chunks WHERE fp=? AND pack=? AND offset=?", (fp, at.pack, at.offset))
                sql.enter(db, found.items(), time.time())
                doubt(db, (missing | corrupt.keys()) - found.keys())
                db.execute("DELETE FROM refs")
                db.executemany("INSERT INTO refs VALUES (?,?)", references(db)[0].items())
                db.execute("DELETE FROM leased WHERE lease NOT IN (SELECT id FROM leases)")
                _complete_unpinned(db)
            store.places.advance()
            missing -= found.keys()
            report.repaired = True
        report.corrupt = sorted(fp.hex() for fp in corrupt)
        report.missing = sorted(fp.hex() for fp in missing)
    return report


def references(db: Connection) -> tuple[Counter[bytes], set[bytes], list[str]]:
    """(references by pinned manifests, chunks that the complete ones of them need, manifests that do not decode)."""
    counts: Counter[bytes] = Counter()
    needed: set[bytes] = set()
    damaged: list[str] = []
    for name, data, complete, pinned in db.execute("SELECT name, data, complete, pinned FROM manifests"):
        try:
            unique = Manifest.decode(data).unique()
        except Corrupt:
            damaged.append(name)
            continue
        if not pinned:
            continue
        counts.update(unique)
        if complete:
            needed |= unique
    return counts, needed, damaged


def doubt(db: Connection, lost: Set[bytes]) -> None:
    """Complete manifests that name a chunk which was just lost are not taken at their word any more."""
    rows = db.execute("SELECT name, data FROM manifests WHERE complete=1").fetchall() if lost else []
    for name, data in rows:
        with suppress(Corrupt):  # check names it
            if not lost.isdisjoint(Manifest.decode(data).unique()):
                db.execute("UPDATE manifests SET complete=? WHERE name=?", (sql.DOUBTED, name))


def _complete_unpinned(db: Connection) -> None:
    """Say of every unpinned manifest whether all of it is here."""
    for name, data in db.execute("SELECT name, data FROM manifests WHERE NOT pinned").fetchall():
        try:
            unique = Manifest.decode(data).unique()
        except Corrupt:
            continue
        complete = len(sql.present(db, list(unique))) == len(unique)
        db.execute("UPDATE manifests SET complete=? WHERE name=?", (complete, name))


def is_sound(pack: Pack, fp: bytes, at: Location) -> bool:
    """Whether the record at a location is whole and is that chunk. Raises HaulierError as `read_chunk`."""
    return read_chunk(pack.path.parent, fp, at, pack) is not None


def search(store: ChunkStore, fps: set[bytes]) -> dict[bytes, Location]:
    """Sound records of chunks that the index has lost, below the tails."""
    found: dict[bytes, Location] = {}
    with store.index.read() as db:
        tails = db.execute("SELECT id, tail FROM packs").fetchall()
    for number, tail in tails:
        pack = open_pack(store.packs, number)
        if pack is None:
            continue
        with suppress(OSError):  # a header that the disk cannot read: what follows it is not found
            for fp, at in walk(pack, min(tail, pack.size())):
                if fp in fps and fp not in found and is_sound(pack, fp, at):
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
                if is_sound(pack, fp, at):
                    sql.enter(db, [(fp, at)], time.time())
                    tail = at.end
            sql.set_tail(db, pack.id, tail)
        return int(db.execute("SELECT count(*) FROM chunks").fetchone()[0])
