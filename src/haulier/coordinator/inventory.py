"""What a site's store has, as the coordinator is to know it: read from the store's index, compared with what was
reported. Nothing here talks to anybody."""

from __future__ import annotations

import json
import shutil
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.chunks.index import DOUBTED
from haulier.chunks.manifest import HEADER, Manifest, peek
from haulier.chunks.store import ChunkStore
from haulier.coordinator.fleet import IMAGE
from haulier.coordinator.messages import ManifestEntry
from haulier.errors import UnknownThing
from haulier.units import FINGERPRINT

Rows = NDArray[np.uint8]
"""Fingerprints as rows of 32 bytes, ascending."""
_FETCH: Final = 16384
GUEST: Final = "guest/"
LOW_DISK: Final = 2 << 30
"""A cache leaves so much of the disk free."""


class Inventory:
    """Looks at one store."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store

    def version(self) -> int:
        """Changes with every commit to the index, by whatever process."""
        with self._store.index.read() as db:
            return int(db.execute("PRAGMA data_version").fetchone()[0])

    def chunks(self) -> Rows:
        """All chunks that are committed."""
        pieces: list[bytes] = []
        with self._store.index.snapshot() as db:
            cursor = db.execute("SELECT fp FROM chunks ORDER BY fp")
            while page := cursor.fetchmany(_FETCH):
                pieces.append(b"".join(row[0] for row in page))
        return np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(-1, FINGERPRINT)

    def manifests(self) -> dict[str, ManifestEntry]:
        """All manifests by name; a parent is named by its digest, where it is at this site."""
        with self._store.index.read() as db:
            found = db.execute(
                "SELECT name, substr(data, 1, ?), complete, meta FROM manifests ORDER BY name", (HEADER,)
            ).fetchall()
        heads = {name: peek(head) for name, head, _, _ in found}
        entries = {}
        for name, _, complete, meta in found:
            parent = str(json.loads(meta).get("parent", ""))
            base = heads.get(IMAGE + parent)
            if name.startswith(IMAGE):
                layer = "application" if parent else "base"
            else:
                layer = "instance" if name.startswith(GUEST) else ""
            size, digest = heads[name]
            entries[name] = ManifestEntry(
                name=name,
                digest=digest,
                size=size,
                complete=self._all_here(name) if complete == DOUBTED else bool(complete),
                layer=layer,
                parent=base[1] if base is not None else b"",
            )
        return entries

    def _all_here(self, name: str) -> bool:
        """Of a manifest that was complete, until a chunk of it was found damaged."""
        try:
            return self._store.is_complete(name)
        except UnknownThing:
            return False

    def room(self, budget: int) -> tuple[int, list[str]]:
        """Bytes that chunks may take here that nothing refers to, and names of manifests that keep none of theirs."""
        room = self._store.room()
        free = max(shutil.disk_usage(self._store.path).free - LOW_DISK, 0)
        with self._store.index.read() as db:
            names = [
                row[0] for row in db.execute("SELECT name FROM manifests WHERE NOT pinned ORDER BY name LIMIT 2000")
            ]
        left = free + room.cached
        return (min(left, max(budget - room.used + room.cached, 0)) if budget else left), names

    def encoded(self, name: str) -> bytes:
        """A manifest as it is kept. Raises UnknownThing or Corrupt."""
        return self._store.load_manifest(name).encode()

    def of_manifest(self, name: str) -> Rows:
        """The chunks of a manifest, each once. Raises UnknownThing or Corrupt."""
        return rows_of(self._store.load_manifest(name))


def rows_of(manifest: Manifest) -> Rows:
    found = sorted(manifest.unique())
    return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, FINGERPRINT)


def minus(some: Rows, others: Rows) -> Rows:
    """Rows of `some` that are not in `others`; both ascending and distinct.

    Compared by their first 8 bytes, then whole. Of several rows with the same 8 bytes some may be given though they
    are in `others`: they are reported once more, which changes nothing.
    """
    if not len(others) or not len(some):
        return some
    keys, known = _keys(some), _keys(others)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    same = (others[places] == some).all(axis=1)
    return np.asarray(some[~same])


def _keys(rows: Rows) -> NDArray[np.uint64]:
    return np.asarray(np.frombuffer(rows[:, :8].tobytes(), dtype=">u8"), dtype=np.uint64)


def pages(rows: Rows, most: int) -> list[bytes]:
    """Byte strings of at most `most` fingerprints each."""
    return [rows[at : at + most].tobytes() for at in range(0, len(rows), most)]
