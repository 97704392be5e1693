"""Which blocks both sites may name when an image is sent: those of manifests that both hold, and of itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Final

from haulier.chunks.blocks import BlockIndex, BlockSpace
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.images import PREFIX as IMAGE_PREFIX
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError
from haulier.guests.golden import MANIFEST_PREFIX as GOLDEN_PREFIX

MOST_CHUNKS: Final = 1 << 17
"""Of common manifests: 8 GiB, whose blocks are hashed in half a minute at most."""
MOST: Final = 32


def held(store: ChunkStore) -> dict[str, Manifest]:
    """Images and snapshots' disks of this site by digest (hexadecimal), damaged ones left out."""
    found = {}
    for prefix in (IMAGE_PREFIX, GOLDEN_PREFIX):
        for name in store.manifest_names(prefix):
            with contextlib.suppress(HaulierError):
                manifest = store.load_manifest(name)
                found[manifest.digest.hex()] = manifest
    return found


def choose(mine: dict[str, Manifest], theirs: Iterable[str], first: Sequence[str] = ()) -> tuple[str, ...]:
    """Digests of manifests that both hold, those in `first` before others, as many as it pays to look through."""
    there = set(theirs)
    order = [*first, *(digest for digest in mine if digest not in first)]
    chosen: list[str] = []
    seen: set[bytes] = set()
    for digest in order:
        if digest not in there or digest not in mine or digest in chosen or len(chosen) == MOST:
            continue
        more = mine[digest].unique() - seen
        if len(seen) + len(more) <= MOST_CHUNKS:
            chosen.append(digest)
            seen |= more
    return tuple(chosen)


def block_list(common: Iterable[Manifest], own: Manifest) -> list[bytes]:
    """The chunks that the block space starts with: the same at both ends, for the same manifests in the same order."""
    fps: dict[bytes, None] = {}
    for manifest in (*common, own):
        fps.update(dict.fromkeys(manifest.chunks()))
    fps.pop(ZERO, None)
    return list(fps)


def block_space(store: ChunkStore, fps: Sequence[bytes]) -> BlockSpace:
    space = BlockSpace(store)
    space.append(fps)
    return space


def block_index(store: ChunkStore, fps: Sequence[bytes]) -> BlockIndex:
    return BlockIndex.build(store, fps)
