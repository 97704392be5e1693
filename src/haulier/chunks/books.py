"""What the store writes down for the cache's policy: rounds in its queues, what left lately, and what else lasts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from haulier.chunks import index as sql
from haulier.chunks.collect import Cached
from haulier.chunks.store import ChunkStore

_POLICY: Final = "policy"
_GHOSTS_LEAST: Final = 1024
_AT_ONCE: Final = 4096


def returned(store: ChunkStore, found: Iterable[Cached]) -> set[bytes]:
    """Those of `found` that had left and came back."""
    with store.index.read() as db:
        gone = dict(db.execute("SELECT fp, gone FROM ghosts").fetchall())
    return {row.fp for row in found if row.came > gone.get(row.fp, row.came)}


def read_memory(store: ChunkStore) -> dict[str, Any]:
    """What `write_memory` wrote last; empty when there is nothing, or nothing sensible."""
    with store.index.read() as db:
        text = sql.read_note(db, _POLICY)
    try:
        memory = json.loads(text or "{}")
    except ValueError:
        return {}
    return memory if isinstance(memory, dict) else {}


def write_memory(
    store: ChunkStore, memory: Mapping[str, Any], moved: Mapping[bytes, int], gone: Sequence[bytes], kept: int
) -> None:
    """After a choice: `moved` chunks got another round with so many uses left, `gone` left, `kept` is how many stay.

    As many ghosts are kept as nine tenths of the chunks that stay (S3-FIFO's share), newest first.
    """
    now = int(time.time())
    with store.index.write() as db:
        sql.write_note(db, _POLICY, json.dumps(memory))
    for start in range(0, len(moved), _AT_ONCE):
        with store.index.write() as db:
            db.executemany(
                "UPDATE chunks SET came = ?, queue = 1 + max(hits - ?, 0) WHERE fp = ?",
                ((now, uses, fp) for fp, uses in list(moved.items())[start : start + _AT_ONCE]),
            )
    for start in range(0, len(gone), _AT_ONCE):
        with store.index.write() as db:
            db.executemany(
                "INSERT OR REPLACE INTO ghosts VALUES (?,?)", ((fp, now) for fp in gone[start : start + _AT_ONCE])
            )
    most = max(kept * 9 // 10, _GHOSTS_LEAST)
    with store.index.write() as db:
        count = db.execute("SELECT count(*) FROM ghosts").fetchone()[0]
        if count > most:
            db.execute("DELETE FROM ghosts WHERE fp IN (SELECT fp FROM ghosts ORDER BY gone LIMIT ?)", (count - most,))
