"""What both ends of a handoff must agree on before any byte is sent: which blocks have which numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from haulier.chunks.blocks import BlockIndex, BlockSpace, hash_blocks
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, Corrupt
from haulier.guests.golden import MANIFEST_PREFIX, block_fingerprints
from haulier.images import common
from haulier.units import BLOCKS_PER_CHUNK, CHUNK

log = logging.getLogger(__name__)


def grown(manifest: Manifest, size: int) -> Manifest:
    """The manifest with zeros behind, up to `size` bytes: the disk of a container that has written nothing."""
    more = size // CHUNK - len(manifest)
    if size % CHUNK or manifest.size % CHUNK or more <= 0:
        return manifest
    return Manifest(size, manifest.fingerprints + ZERO * more)


def golden_manifest(store: ChunkStore, golden: str) -> Manifest | None:
    """The disk of a golden snapshot, if this site has it."""
    name = MANIFEST_PREFIX + golden
    if not golden or name not in store.manifest_names(name):
        return None
    return store.load_manifest(name)


def short(manifest: Manifest) -> str:
    """What an offer calls an image: the first 12 bytes of its digest, hexadecimal. What is made with it is checked."""
    return manifest.digest.hex()[:24]


def held(store: ChunkStore) -> dict[str, Manifest]:
    """The images that this site holds, by `short`."""
    return {short(manifest): manifest for manifest in common.held(store).values()}


def images_named(store: ChunkStore, names: Sequence[str]) -> list[Manifest]:
    """The images that both sites hold, by `short`, in the order agreed on. Conflict if one is gone meanwhile."""
    here = held(store) if names else {}
    gone = [name for name in names if name not in here]
    if gone:
        raise Conflict(f"image {gone[0]} was removed while a handoff began: begin it again")
    return [here[name] for name in names]


def block_list(base: Manifest, golden: Manifest | None, images: Sequence[Manifest] = ()) -> tuple[list[bytes], int]:
    """The chunks that the block space starts with, and how many of them are the golden snapshot's.

    The snapshot's come first and in its own order, so that its ready-made index holds; then those of `images` that both
    sites hold; then what else the guest's disk has. Both ends compute the same list from the same manifests.
    """
    first = block_fingerprints(golden) if golden is not None else []
    known = {ZERO, *first}
    rest = dict.fromkeys(fp for manifest in (*images, base) for fp in manifest.chunks() if fp not in known)
    return first + list(rest), len(first)


def block_space(
    store: ChunkStore, base: Manifest, golden: Manifest | None, images: Sequence[Manifest] = ()
) -> BlockSpace:
    """The block space as a handoff begins."""
    space = BlockSpace(store)
    space.append(block_list(base, golden, images)[0])
    return space


def blocks_of(
    store: ChunkStore,
    base: Manifest,
    golden: Manifest | None,
    ready: Path,
    images: Sequence[Manifest] = (),
    only: set[bytes] | None = None,
) -> tuple[BlockIndex, BlockSpace]:
    """The block space as a handoff begins, and where blocks are to be found in it: of all chunks, or of `only` these.

    `ready`: the file with the golden snapshot's own index, used if it is there and both sites have the snapshot.
    """
    fps, count = block_list(base, golden, images)
    space = BlockSpace(store)
    space.append(fps)
    # What still lies elsewhere can be referred to by nobody.
    missing = set(store.missing(fps))
    if only is not None:
        missing |= set(fps) - only
    if missing:
        fps = [ZERO if fp in missing else fp for fp in fps]
    index = _load(ready) if golden is not None and ready.exists() else None
    if index is None:
        return BlockIndex.build(store, fps), space
    if count < len(fps):
        index.add(*hash_blocks(store, fps[count:], count * BLOCKS_PER_CHUNK))
    return index, space


def _load(ready: Path) -> BlockIndex | None:
    """A ready-made index; None if it is damaged, for then it is only made again."""
    try:
        return BlockIndex.load(ready)
    except Corrupt as error:
        log.warning("%s; until then each handoff makes it anew", error)
        return None
