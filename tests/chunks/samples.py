"""Chunks, blocks and damage for the tests of chunks."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.store import ChunkStore
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK


def chunk(seed: int) -> bytes:
    """A chunk of random bytes, the same for the same seed."""
    return random.Random(seed).randbytes(CHUNK)


def name(seed: int) -> bytes:
    """Its fingerprint."""
    return fingerprint(chunk(seed))


def soft_chunk(seed: int) -> bytes:
    """A chunk that compresses well."""
    return random.Random(seed).randbytes(64) * (CHUNK // 64)


def mixed_chunk(*blocks: bytes | None) -> bytes:
    """A chunk of the given blocks (None is zeros), zeros after them."""
    data = b"".join(block or bytes(BLOCK) for block in blocks)
    assert len(blocks) <= BLOCKS_PER_CHUNK
    return data.ljust(CHUNK, b"\0")


def flip(path: Path, offset: int) -> None:
    """Invert a byte of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 0xFF]))


def place(store: ChunkStore, fp: bytes) -> tuple[Path, int]:
    """(pack file, offset of the payload) of a committed chunk."""
    with store.index.read() as db:
        pack, offset = db.execute("SELECT pack, offset FROM chunks WHERE fp=?", (fp,)).fetchone()
    return store.packs / f"{pack:08d}.pack", offset + 64


def fail_at(patch: pytest.MonkeyPatch, call: str, number: int, times: int = 1 << 30) -> None:
    """Have `os.open` or `os.pread` of pack files fail so many times with an errno."""
    real, left = getattr(os, call), [times]

    def fail(what: Any, *rest: Any) -> Any:
        path = str(what if call == "open" else Path(f"/proc/self/fd/{what}").readlink())
        if path.endswith(".pack") and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(what, *rest)

    patch.setattr(os, call, fail)


def open_packs(store: ChunkStore) -> int:
    """Descriptors of this process on pack files: a pack that is open twice counts twice."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += link.readlink().parent == store.packs
    return count


def allocated(folder: Path) -> int:
    """Bytes on disk of a folder's files."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def open_files(folder: Path) -> set[str]:
    """Files of this process that are open below a folder; removed ones end in " (deleted)"."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.add(target)
    return found
