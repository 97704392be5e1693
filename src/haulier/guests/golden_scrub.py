"""Reading golden snapshots again after they were made, to find bits that flipped on the disk.

Nothing else would: clones are restored from the file as it is, and a handoff that begins with it at both sites only
finds that pages do not match, each time again. One that is damaged is set aside, so that nothing starts from it: it may
be pushed again from a site that has it, and the image may be warmed again. What was set aside goes with the agent's
next start (`golden.clear_unfinished`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from haulier.durable import sync
from haulier.errors import Corrupt, HaulierError, Unsupported
from haulier.guests.golden import DAMAGED, MANIFEST_PREFIX, Golden, list_goldens
from haulier.memory.base import MemoryBase
from haulier.memory.sparse import data_extents
from haulier.units import MIB

if TYPE_CHECKING:
    from haulier.chunks.store import ChunkStore

log = logging.getLogger(__name__)
_STEP: Final = 4 * MIB


def due(root: Path, age_s: float, looked: Mapping[str, float]) -> Golden | None:
    """The snapshot under `root` that was read longest ago, if that is over `age_s` seconds.

    `looked`: when some were, by id, in seconds since 1970, should it not be noted beside them.
    """
    known = {golden: max(_compared(golden), looked.get(golden.id, 0.0)) for golden in list_goldens(root)}
    oldest = min(known, key=lambda golden: known[golden], default=None)
    return oldest if oldest is not None and time.time() - known[oldest] > age_s else None


def _compared(golden: Golden) -> float:
    try:
        return MemoryBase.digest_path(golden.memory).stat().st_mtime
    except OSError:
        return 0.0


def check(path: Path, store: ChunkStore, rate: float = 0.0) -> bool:
    """Whether the snapshot in the directory `path` is sound; one that is not is set aside. True if there is none.

    `rate`: bytes a second to read at most, 0 = as fast as the disk gives.
    """
    if not path.is_dir():
        return True
    try:
        verify(Golden.load(path), rate)
    except (Corrupt, Unsupported) as error:
        if not path.is_dir():
            return True  # removed meanwhile
        _set_aside(path, store)
        log.error("%s; it is set aside: push it again from a site that has it, or warm the image again", error)
        return False
    return True


def verify(golden: Golden, rate: float = 0.0) -> None:
    """Raises `Corrupt` if the memory, read from the disk now, is not what the id stands for."""
    try:
        _read(golden.memory, rate)
        base = MemoryBase.from_mapped_ram(golden.memory)
        try:
            found = base.compute_digest().hex()
        finally:
            base.close()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        found = ""
    if found != golden.meta.memory:
        raise Corrupt(f"the memory of golden snapshot {golden.path} is damaged")


def _read(path: Path, rate: float) -> None:
    """All of a file past the page cache. What cannot be read is an error here, and a signal where a file is mapped."""
    began, read = time.monotonic(), 0
    with path.open("rb") as file:
        # What flipped on the disk does not show in memory.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for start, end in data_extents(file.fileno(), 0, os.fstat(file.fileno()).st_size):
            for at in range(start, end, _STEP):
                read += len(os.pread(file.fileno(), min(_STEP, end - at), at))
                ahead = read / rate - (time.monotonic() - began) if rate else 0.0
                if ahead > 0:
                    time.sleep(ahead)


def _set_aside(path: Path, store: ChunkStore) -> None:
    aside = path.with_name(DAMAGED + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        sync(aside.parent)
    # Its disk is sound and may still be referred to, but nobody would let go of it with the image.
    with contextlib.suppress(HaulierError):
        store.pin_manifest(MANIFEST_PREFIX + path.name, False)
