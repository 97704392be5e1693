"""The chunk store of a site: append-only packs and an index, opened by many processes at once.

How it holds together:

- Every process appends to packs of its own (flock), so writers never wait for each other but at `commit`.
- A chunk is visible to its own process at once, to others and after a crash from `commit` on: the pack is synced
  first, then the index commits. The index never points at bytes that a power cut could take.
- A process remembers places only of chunks whose fingerprint it has checked, and only until a collection (places.py).
- What keeps a chunk: references (of pinned manifests), leases (of somebody at work), and the store that put it while
  that is open. All others are the cache's: a collection takes those that its caller chooses (`gc`).

Do not carry an open store over a fork; open it again in the child.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import Connection
from typing import Any, Final

from haulier.chunks import index as sql
from haulier.chunks.check import CheckReport, check_store, doubt, reindex
from haulier.chunks.collect import Choose, GcReport, Room, collect_garbage, measure
from haulier.chunks.fingerprint import ZERO, ZERO_CHUNK, Buffer, fingerprint
from haulier.chunks.index import Index
from haulier.chunks.manifest import Manifest
from haulier.chunks.packs import Location, Pack, Writer, disk_error, encode_record, read_chunk
from haulier.chunks.places import Places
from haulier.durable import sync
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, UnknownThing, UsageError
from haulier.units import CHUNK, MIB

PACK_SIZE: Final = 256 * MIB
RESERVE: Final = 16 * MIB
"""Room on disk that `put` leaves for the index, so that a full disk can still be cleaned up."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:+-]{0,199}")
_OWN_LEASE: Final = "open:"
_AGAIN_MOST: Final = 16 * MIB
_META_MOST: Final = 1 * MIB
_RETRIES: Final = 16
_ROOM_EVERY: Final = 64
_USES_AT_ONCE: Final = 4096


@dataclass(frozen=True)
class StoreStats:
    """`chunks` held, `bytes` they stand for, `stored` bytes they take in packs, `disk` bytes of the pack files."""

    chunks: int
    bytes: int
    stored: int
    disk: int
    packs: int
    manifests: int
    leases: int


@dataclass
class _Batch:
    """What was put since the last commit."""

    pending: dict[bytes, Location] = field(default_factory=dict)
    again: dict[bytes, bytes] = field(default_factory=dict)  # were here already; kept lest a collection takes them
    claims: dict[str, set[bytes]] = field(default_factory=dict)  # lease -> chunks
    tails: list[tuple[Writer, int]] = field(default_factory=list)


class ChunkStore:
    """See the module. All methods may be called from any thread.

    `zstd_level` compresses what is put from now on (for archives; an export wants raw chunks). `reserve` is the room
    in bytes that `put` leaves on the disk. Raises UnknownThing when there is no store and `create` is false.
    """

    def __init__(
        self,
        path: Path,
        create: bool = True,
        *,
        zstd_level: int | None = None,
        pack_size: int = PACK_SIZE,
        reserve: int = RESERVE,
    ) -> None:
        self.path = Path(path)
        self.packs = self.path / "packs"
        self.pack_size = pack_size
        self._level = zstd_level
        self._reserve = reserve
        if not create and not (self.path / "index.sqlite").exists():
            raise UnknownThing(f"no chunk store at {self.path}; check the directory, or import an image first")
        try:
            self.packs.mkdir(parents=True, exist_ok=True)
            (self.path / "open").mkdir(exist_ok=True)
            with open(self.path / "lock", "a+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.places = Places(self.path / "generation", self.packs)
                self.index = Index(self.path / "index.sqlite")
                made = self.index.create(uuid.uuid4().bytes)
                with self.index.read() as db:
                    self.id: bytes = db.execute("SELECT id FROM store").fetchone()[0]
                if made:
                    sync(self.path)
                    reindex(self)  # an index was lost: what its packs hold need not travel again
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._batch = _Batch()
        self._append_lock = threading.RLock()
        self._commit_lock = threading.RLock()
        self._writer: Writer | None = None
        self._sealed: list[Writer] = []
        self._since_room = 0
        self._own: tuple[str, int] | None = None
        self._owned: set[bytes] = set()  # kept by no more than this store's being open
        self._saved: dict[str, tuple[bytes, Manifest]] = {}
        self._uses: dict[bytes, float] = {}
        self._closed = False

    def sibling(self) -> ChunkStore:
        """The same store, opened once more: what is put there without a lease is let go when it is closed."""
        return ChunkStore(
            self.path, create=False, zstd_level=self._level, pack_size=self.pack_size, reserve=self._reserve
        )

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(commit=exc[0] is None)

    def close(self, *, commit: bool = True) -> None:
        """Commit and let go. Chunks put without a lease and in no manifest are no longer kept."""
        with self._commit_lock, self._append_lock:
            if self._closed:
                return
            try:
                if commit:
                    self.commit()
                    self.flush_uses()
            finally:
                self._closed = True
                self._forget()
                self._writer = None
                if self._own is not None:
                    name, fd = self._own
                    try:
                        with self.index.write() as db:
                            sql.end_lease(db, name)
                        (self.path / "open" / name.removeprefix(_OWN_LEASE)).unlink(missing_ok=True)
                    except (HaulierError, OSError):
                        pass  # the next collection sees that nobody holds the lock
                    os.close(fd)
                self.index.close()
                self.places.forget()

    # --- reading ---

    def has(self, fp: bytes) -> bool:
        """Whether the chunk is here. Nothing keeps it here but a reference or a lease."""
        return fp == ZERO or self._locate(fp) is not None

    def missing(self, fps: Iterable[bytes], lease: str = "") -> list[bytes]:
        """Those of `fps` not held, each once, in order. With a lease, the others are durably kept under it."""
        wanted = list(dict.fromkeys(fp for fp in fps if fp != ZERO))
        if lease:
            _check_lease(lease)
        with self._append_lock:
            own = self._batch.pending.keys() & set(wanted)
            if lease and own:
                self._batch.claims.setdefault(lease, set()).update(own)
        unknown = [fp for fp in wanted if fp not in own]
        if lease:
            with self.index.write() as db:
                found = sql.present(db, unknown)
                number = sql.renew_lease(db, lease, time.time())
                db.executemany("INSERT OR IGNORE INTO leased VALUES (?,?)", ((fp, number) for fp in found))
            self.touch(found)
        else:
            with self.index.read() as db:
                found = sql.present(db, unknown)
        return [fp for fp in unknown if fp not in found]

    def get(self, fp: bytes) -> bytes:
        """The chunk's 64 KiB. Raises UnknownThing, Corrupt (the chunk is then dropped from the index), or another
        HaulierError when it cannot be read just now."""
        return self.read(fp, 0, CHUNK)

    def read(self, fp: bytes, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of a chunk; like `get`, verified whole when this process first reads it."""
        if offset < 0 or length < 0 or offset + length > CHUNK:
            raise UsageError(f"{length} bytes at {offset} of a chunk of {CHUNK}")
        data = self.places.read(fp, offset, length)
        if data is not None:
            return data
        if fp == ZERO:
            return ZERO_CHUNK[:length]
        return self._load(fp)[offset : offset + length]

    def read_now(self, fp: bytes, offset: int, length: int) -> bytes | None:
        """Like `read` when the bytes can be had without waiting for a disk or a lock of the index; None otherwise."""
        if fp == ZERO:
            return ZERO_CHUNK[:length]
        return self.places.read_now(fp, offset, length)

    def read_into(self, fp: bytes, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` of a chunk; like `read`, without a copy."""
        if offset < 0 or offset + len(into) > CHUNK:
            raise UsageError(f"{len(into)} bytes at {offset} of a chunk of {CHUNK}")
        if not self.places.read_into(fp, offset, into):
            into[:] = self.read(fp, offset, len(into))

    def _load(self, fp: bytes) -> bytes:
        for _ in range(_RETRIES):
            generation = self.places.generation()
            again = self._batch.again.get(fp)
            at = self._locate(fp)
            if at is None and again is not None:
                return again  # collected since it was put; the commit appends it
            if at is None:
                raise UnknownThing(f"chunk {fp.hex()} is not in the store at {self.path}; fetch it from another site")
            pack: Pack | None = None
            try:
                pack = self.places.pack(at.pack)
            except OSError:
                pass  # tried again there, and told apart
            data = read_chunk(self.packs, fp, at, pack)
            if data is not None:
                self.places.remember(generation, fp, at, data)
                return data
            if self._locate(fp) == at and self.places.generation() == generation:
                self._drop(fp, at)
                raise Corrupt(
                    f"chunk {fp.hex()} in {self.path} does not match its fingerprint and was dropped;"
                    " fetch it again, and check the disk"
                )
        raise Conflict(f"chunk {fp.hex()} in {self.path} kept moving while it was read; try again")

    def _locate(self, fp: bytes) -> Location | None:
        at = self._batch.pending.get(fp)
        if at is not None:
            return at
        with self.index.read() as db:
            at = sql.locate(db, fp)
        return at or self._batch.pending.get(fp)

    def _drop(self, fp: bytes, at: Location) -> None:
        with self._append_lock:
            if self._batch.pending.get(fp) == at:
                del self._batch.pending[fp]
                for claimed in self._batch.claims.values():
                    claimed.discard(fp)
        try:
            with self.index.write() as db:
                db.execute("DELETE FROM chunks WHERE fp=? AND pack=? AND offset=?", (fp, at.pack, at.offset))
                doubt(db, {fp})
        except NoRoom:
            pass  # Corrupt is what matters now; check finds the chunk again

    def touch(self, fps: Iterable[bytes]) -> None:
        """Count a use of each chunk, for the cache's policy. Kept in memory until `flush_uses` or `close`."""
        now = time.time()
        with self._append_lock:
            self._uses.update((fp, now) for fp in fps if fp != ZERO)

    def flush_uses(self) -> None:
        """Write down the uses that were counted. What a crash takes of them only makes the policy guess."""
        with self._append_lock:
            uses, self._uses = self._uses, {}
        fps = list(uses)
        for start in range(0, len(fps), _USES_AT_ONCE):  # in pieces: a commit may wait for this one
            with self.index.write() as db:
                for fp in fps[start : start + _USES_AT_ONCE]:
                    sql.count_uses(db, (fp,), uses[fp])

    # --- writing ---

    def put(self, data: Buffer, fp: bytes | None = None, lease: str = "") -> bytes:
        """Keep a chunk of exactly CHUNK bytes; its fingerprint. Raises Corrupt when it is not the one of `fp`.

        Visible to this process at once; to others, and durably, after `commit`. Kept under `lease`, or without one as
        long as this store is open, or a manifest refers to it. Raises NoRoom when the disk is full: nothing is lost.
        """
        if len(data) != CHUNK:
            raise UsageError(f"a chunk of {len(data)} bytes; pad it with zeros to {CHUNK}")
        if lease:
            _check_lease(lease)
        actual = fingerprint(data)
        if fp is not None and fp != actual:
            raise Corrupt(f"chunk {fp.hex()} arrived as {actual.hex()}; it is not kept, ask for it again")
        if actual == ZERO:
            return ZERO
        with self._append_lock:
            batch = self._batch
            if actual not in batch.again:
                held = actual in batch.pending
                if not held:
                    with self.index.read() as db:
                        held = sql.locate(db, actual) is not None
                if held:
                    batch.again[actual] = bytes(data)
                else:
                    self._append(actual, data)
            batch.claims.setdefault(lease, set()).add(actual)
            full = len(batch.again) * CHUNK > _AGAIN_MOST
        if full:
            self.commit()
        return actual

    def _append(self, fp: bytes, data: Buffer) -> None:
        if self._closed:
            raise UsageError(f"the chunk store at {self.path} was closed")
        self._check_room()
        record = encode_record(fp, data, self._level)
        if self._writer is not None and self._writer.tail >= self.pack_size:
            self._sealed.append(self._writer)
            self._writer = None
        if self._writer is None:
            self._writer = self.new_writer()
        self._batch.pending[fp] = self._writer.append(*record)

    def _check_room(self) -> None:
        if self._since_room % _ROOM_EVERY == 0:
            space = os.statvfs(self.path)
            if space.f_bavail * space.f_frsize < self._reserve + _ROOM_EVERY * (CHUNK + 64):
                raise NoRoom(
                    f"less than {(self._reserve + _ROOM_EVERY * CHUNK) // MIB} MiB are left for the chunk store at"
                    f" {self.path}; free some space or run haulier gc --all, then try again"
                )
        self._since_room += 1

    def new_writer(self, *, adopt: bool = True) -> Writer:
        """A pack locked for appending: one that nobody writes and that has room, or a new one."""
        if adopt:
            with self.index.read() as db:
                open_ends = db.execute(
                    "SELECT id FROM packs WHERE tail < ? ORDER BY id DESC LIMIT 8", (self.pack_size,)
                ).fetchall()
            for (number,) in open_ends:
                writer = Writer.adopt(self.packs, number)
                if writer is None:
                    continue
                with self.index.read() as db:  # again, now that nobody else moves it
                    row = db.execute("SELECT tail FROM packs WHERE id=?", (number,)).fetchone()
                if row is not None and writer.set_tail(row[0]):
                    return writer
        for _ in range(_RETRIES):
            with self.index.write() as db:
                cursor = db.execute("INSERT INTO packs (tail) VALUES (0)")
                number = int(cursor.lastrowid or 0)
            made = Writer.create(self.packs, number, self.id)
            if made is not None:
                return made
        raise Conflict(f"no pack could be made in {self.packs}; try again")

    def commit(self) -> None:
        """Make everything put so far durable and visible to all. Raises NoRoom: the batch is kept, try again later."""
        self._commit(None)

    def _commit(self, then: Callable[[Connection], None] | None) -> None:
        with self._commit_lock:
            batch = self._snapshot()
            if not batch.claims and not batch.pending and then is None:
                return
            self._sync(batch)
            # Always before the index's own lock, as `put` takes them: what is gone from the index is appended again.
            with self._append_lock if batch.again else nullcontext(), self.index.write() as db:
                _insert(db, batch)
                # Once more after each: what was put since the batch was taken comes with the next.
                while gone := set(batch.again) - sql.present(db, list(batch.again)):
                    for fp in gone:
                        self._append(fp, batch.again[fp])
                        self._batch.again.pop(fp, None)
                    batch = self._snapshot()
                    self._sync(batch)
                    _insert(db, batch)
                now = time.time()
                for lease, fps in batch.claims.items():
                    number = sql.renew_lease(db, lease or self._own_lease(), now)
                    db.executemany("INSERT OR IGNORE INTO leased VALUES (?,?)", ((fp, number) for fp in fps))
                    if not lease:
                        self._owned |= fps
                if then is not None:
                    then(db)
            self._settle(batch)

    def _snapshot(self) -> _Batch:
        with self._append_lock:
            now = self._batch
            writers = [*self._sealed, *([self._writer] if self._writer else [])]
            return _Batch(
                dict(now.pending),
                dict(now.again),
                {lease: set(fps) for lease, fps in now.claims.items()},
                [(writer, writer.tail) for writer in writers if writer.tail > writer.committed],
            )

    def _sync(self, batch: _Batch) -> None:
        for writer, _ in batch.tails:
            try:
                writer.sync()
            except OSError as error:
                # The kernel may have thrown the pages away: nothing since the last commit can be trusted.
                self._forget()
                raise disk_error(error, self.packs) from error

    def _settle(self, done: _Batch) -> None:
        """After a commit: what it held is no longer ours to remember."""
        with self._append_lock:
            now = self._batch
            for fp, at in done.pending.items():
                if now.pending.get(fp) == at:
                    del now.pending[fp]
            for lease, fps in done.claims.items():
                left = now.claims.get(lease, set())
                left -= fps
                if not left:
                    now.claims.pop(lease, None)
            claimed = set().union(*now.claims.values())
            for fp in done.again.keys() - claimed:
                now.again.pop(fp, None)
            for writer, tail in done.tails:
                writer.committed = tail
            self._sealed = [writer for writer in self._sealed if writer.tail > writer.committed]

    def _forget(self) -> None:
        """Throw away what was put since the last commit."""
        with self._append_lock:
            self.places.forget()  # before their bytes can be overwritten
            self._batch = _Batch()
            for writer in [*self._sealed, *([self._writer] if self._writer else [])]:
                writer.forget()
            self._sealed = []
            self._writer = None

    def release_writer(self) -> None:
        """Commit and give up the pack being written, so that a collection may move it."""
        with self._commit_lock:
            self.commit()
            with self._append_lock:
                if self._writer is not None and self._writer.tail == self._writer.committed:
                    self._writer = None

    # --- leases ---

    def _own_lease(self) -> str:
        """The lease of what is put without one: it lives as long as this store holds the lock of a file."""
        if self._own is None:
            name = uuid.uuid4().hex
            try:
                fd = os.open(self.path / "open" / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise disk_error(error, self.path) from error
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._own = (_OWN_LEASE + name, fd)
        return self._own[0]

    def add_lease(self, lease: str) -> None:
        """Make or renew a lease, durably. Chunks put under it are kept until `drop_lease`."""
        _check_lease(lease)
        with self.index.write() as db:
            sql.renew_lease(db, lease, time.time())

    def drop_lease(self, lease: str) -> None:
        """Forget a lease. What it alone kept may now be collected; nothing happens if there is no such lease."""
        _check_lease(lease)
        with self._append_lock:
            self._batch.claims.pop(lease, None)
        with self.index.write() as db:
            sql.end_lease(db, lease)

    def leases(self) -> list[str]:
        """Names of the leases that were asked for."""
        with self.index.read() as db:
            names = [row[0] for row in db.execute("SELECT name FROM leases ORDER BY name")]
        return [name for name in names if not name.startswith(_OWN_LEASE)]

    # --- manifests ---

    def save_manifest(
        self,
        name: str,
        manifest: Manifest,
        meta: dict[str, Any] | None = None,
        *,
        partial: bool = False,
        pinned: bool = True,
        look: bool = True,
    ) -> None:
        """Commit, and in the same transaction put `manifest` under `name` in place of any other; durable on return.

        `meta` is kept with it as JSON. Raises UnknownThing when chunks are not here, unless `partial`: then nothing
        changes. From here on the manifest's references keep its chunks; with `pinned` false they do not, and the
        cache's policy rules over what only such manifests name. Without `look` (only with `partial`) nobody looks
        whether all is here, and the manifest does not count as complete: for a save that must be quick.
        """
        _check_name(name)
        text = json.dumps(meta or {}, sort_keys=True)
        if len(text) > _META_MOST:
            raise UsageError(f"{len(text)} bytes of notes with manifest {name}; at most {_META_MOST}")
        data = manifest.encode()
        wanted = manifest.unique()

        def save(db: Connection) -> None:
            row = db.execute("SELECT data, complete FROM manifests WHERE name=? AND pinned", (name,)).fetchone()
            before = self._decode(name, row[0]).unique() if row else frozenset[bytes]()
            added, removed = wanted - before, before - wanted
            # A complete, pinned manifest keeps its own chunks, so only new ones need looking for.
            unsure = added if row and row[1] == 1 else wanted
            complete = (look or not partial) and len(sql.present(db, list(unsure))) == len(unsure)
            if not complete and not partial:
                lacking = set(unsure) - sql.present(db, list(unsure))
                raise UnknownThing(
                    f"manifest {name} needs {len(lacking)} chunks that are not in {self.path},"
                    f" the first is {min(lacking).hex()}; fetch them first"
                )
            sql.count_references(db, added if pinned else (), removed if pinned else before)
            db.execute(
                "INSERT OR REPLACE INTO manifests (name, data, complete, meta, saved, pinned) VALUES (?,?,?,?,?,?)",
                (name, data, complete, text, time.time(), pinned),
            )
            if self._own is not None:
                own = db.execute("SELECT id FROM leases WHERE name=?", (self._own[0],)).fetchone()
                if own is not None:
                    settled = ((fp, own[0]) for fp in self._owned & wanted)
                    db.executemany("DELETE FROM leased WHERE fp=? AND lease=?", settled)

        self._commit(save)
        self._owned -= wanted
        self._saved[name] = (data, manifest)

    def _decode(self, name: str, data: bytes) -> Manifest:
        known = self._saved.get(name)
        if known is not None and known[0] == data:
            return known[1]
        try:
            return Manifest.decode(data)
        except Corrupt as error:
            raise Corrupt(f"manifest {name} in {self.path} is damaged: {error}") from error

    def load_manifest(self, name: str) -> Manifest:
        """The manifest under `name`. Raises UnknownThing or Corrupt."""
        with self.index.read() as db:
            row = db.execute("SELECT data FROM manifests WHERE name=?", (name,)).fetchone()
        if row is None:
            raise UnknownThing(f"no manifest {name} in {self.path}; see which there are with haulier image list")
        return self._decode(name, row[0])

    def is_complete(self, name: str) -> bool:
        """Whether all chunks of a manifest were here when it was saved, and none was found damaged since.

        When one was, whether all are here again. Raises UnknownThing.
        """
        with self.index.read() as db:
            row = db.execute("SELECT complete, data FROM manifests WHERE name=?", (name,)).fetchone()
            if row is None:
                raise UnknownThing(f"no manifest {name} in {self.path}; see which there are with haulier image list")
            if row[0] != sql.DOUBTED or not self._all_here(db, name, row[1]):
                return bool(row[0] == 1)
        with self.index.write() as db:  # looked once more, now that nothing can go meanwhile
            now = db.execute("SELECT complete, data FROM manifests WHERE name=?", (name,)).fetchone()
            if now == row and self._all_here(db, name, row[1]):
                db.execute("UPDATE manifests SET complete=1 WHERE name=?", (name,))
                return True
        return now is not None and bool(now[0] == 1)

    def _all_here(self, db: Connection, name: str, data: bytes) -> bool:
        unique = self._decode(name, data).unique()
        return len(sql.present(db, list(unique))) == len(unique)

    def manifest_names(self, prefix: str = "") -> list[str]:
        """Names of the manifests that start with `prefix`, sorted."""
        with self.index.read() as db:
            rows = db.execute("SELECT name FROM manifests ORDER BY name").fetchall()
        return [row[0] for row in rows if row[0].startswith(prefix)]

    def manifest_meta(self, name: str) -> dict[str, Any]:
        """What was kept with the manifest. Raises UnknownThing."""
        with self.index.read() as db:
            row = db.execute("SELECT meta FROM manifests WHERE name=?", (name,)).fetchone()
        if row is None:
            raise UnknownThing(f"no manifest {name} in {self.path}; see which there are with haulier image list")
        meta: dict[str, Any] = json.loads(row[0])
        return meta

    def drop_manifest(self, name: str) -> None:
        """Forget a manifest and its references; its chunks stay until a collection. Raises UnknownThing."""
        with self.index.write() as db:
            row = db.execute("SELECT data, pinned FROM manifests WHERE name=?", (name,)).fetchone()
            if row is None:
                raise UnknownThing(f"no manifest {name} in {self.path}; see which there are with haulier image list")
            if row[1]:
                sql.count_references(db, (), self._decode(name, row[0]).unique())
            db.execute("DELETE FROM manifests WHERE name=?", (name,))
        self._saved.pop(name, None)

    def pin_manifest(self, name: str, pinned: bool) -> None:
        """Let a manifest's references keep its chunks, or no longer. Raises UnknownThing.

        Also when chunks are missing that cannot be pinned for that: the manifest then keeps what is here.
        """
        with self.index.write() as db:
            row = db.execute("SELECT data, pinned FROM manifests WHERE name=?", (name,)).fetchone()
            if row is None:
                raise UnknownThing(f"no manifest {name} in {self.path}; see which there are with haulier image list")
            if bool(row[1]) == pinned:
                return
            unique = self._decode(name, row[0]).unique()
            sql.count_references(db, unique if pinned else (), () if pinned else unique)
            complete = self._all_here(db, name, row[0])
            db.execute("UPDATE manifests SET pinned=?, complete=? WHERE name=?", (pinned, complete, name))

    def is_pinned(self, name: str) -> bool:
        """Whether the manifest's references keep its chunks. Raises UnknownThing."""
        with self.index.read() as db:
            row = db.execute("SELECT pinned FROM manifests WHERE name=?", (name,)).fetchone()
        if row is None:
            raise UnknownThing(f"no manifest {name} in {self.path}; see which there are with haulier image list")
        return bool(row[0])

    # --- housekeeping ---

    def gc(
        self,
        dry_run: bool = False,
        *,
        lease_age_s: float | None = None,
        leases: Iterable[str] = (),
        manifests: Iterable[str] = (),
        choose: Choose | None = None,
    ) -> GcReport:
        """Take what neither a pinned manifest nor a lease keeps, and give its space back; safe beside readers, writers.

        `choose` picks what goes among that (all of it without). Before that, leases not renewed for `lease_age_s`
        seconds end, and the named `leases` and `manifests` go. A dry run says exactly what would be taken. Raises
        Conflict when another collection is under way.
        """
        return collect_garbage(self, dry_run, lease_age_s, tuple(leases), tuple(manifests), choose)

    def room(self) -> Room:
        """What the store's chunks take, and how much of that a collection could take."""
        return measure(self)

    def check(self, repair: bool = False, *, deep: bool = True) -> CheckReport:
        """Compare the references with the manifests, and (`deep`) verify every chunk. `repair` mends what can be."""
        return check_store(self, repair, deep)

    def stats(self) -> StoreStats:
        """Counts and sizes, over all processes' committed chunks."""
        with self.index.read() as db:
            chunks, stored = db.execute("SELECT count(*), coalesce(sum(stored), 0) FROM chunks").fetchone()
            manifests = db.execute("SELECT count(*) FROM manifests").fetchone()[0]
            leases = db.execute("SELECT count(*) FROM leases WHERE name NOT LIKE 'open:%'").fetchone()[0]
        files = list(self.packs.glob("*.pack"))
        disk = 0
        for file in files:
            try:
                disk += file.stat().st_blocks * 512
            except FileNotFoundError:
                continue
        return StoreStats(chunks, chunks * CHUNK, stored, disk, len(files), manifests, leases)


def _insert(db: Connection, batch: _Batch) -> None:
    sql.enter(db, batch.pending.items(), time.time())
    for writer, tail in batch.tails:
        sql.set_tail(db, writer.pack.id, tail)


def _check_lease(lease: str) -> None:
    if not _NAME.fullmatch(lease) or lease.startswith(_OWN_LEASE):
        raise UsageError(f"lease {lease!r}: use 1 to 200 letters, digits and ._/@:+-, and no name of ours")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"manifest name {name!r}: use 1 to 200 letters, digits and ._/@:+-, a letter or digit first")
