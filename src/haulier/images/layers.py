"""Which layer a chunk belongs to. An image is a whole disk; a layer is what it has beyond its parent.

    base          an imported image
    application   an image committed from a guest: its parent is the image that the guest was made from
    instance      what a guest has beyond its application layer

The three layers are those of Machen et al., "Migrating Running Applications Across Mobile Edge Clouds" (2016).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from haulier.chunks.images import PREFIX as IMAGE_PREFIX
from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError, UnknownThing
from haulier.guests.golden import MANIFEST_PREFIX as GOLDEN_PREFIX
from haulier.units import CHUNK

BASE: Final = "base"
APPLICATION: Final = "application"
INSTANCE: Final = "instance"
LAYERS: Final = (BASE, APPLICATION, INSTANCE)
"""In the order in which a handoff sends them."""
MAX_DEPTH: Final = 64
LEARNT: Final = "layer/"
"""Manifests of images that are not here, but that guests here were made from: they keep no chunks."""


@dataclass(frozen=True)
class Split:
    """The chunks of a guest's base and application layer, without overlap; all others are its instance layer."""

    base: frozenset[bytes] = frozenset()
    application: frozenset[bytes] = frozenset()

    def of(self, fp: bytes) -> str:
        """The layer of a chunk."""
        if fp in self.base:
            return BASE
        return APPLICATION if fp in self.application else INSTANCE

    def sort(self, fps: Iterable[bytes]) -> dict[str, list[bytes]]:
        """`fps` by layer, in the order of LAYERS; within one in the order given."""
        found: dict[str, list[bytes]] = {layer: [] for layer in LAYERS}
        for fp in fps:
            found[self.of(fp)].append(fp)
        return found

    def sizes(self, fps: Iterable[bytes]) -> dict[str, int]:
        """Bytes of distinct chunks by layer."""
        return {layer: len(mine) * CHUNK for layer, mine in self.sort(frozenset(fps)).items()}


def parent_of(meta: Mapping[str, Any]) -> str:
    """Name of the image that one with this meta lies on; "" for a base."""
    return str(meta.get("parent", ""))


def stored_as(store: ChunkStore, image: str) -> str:
    """The manifest of an image, or what was learnt of one that is not here. Raises UnknownThing."""
    name = IMAGE_PREFIX + image
    if name in store.manifest_names(name):
        return name
    if LEARNT + image in store.manifest_names(LEARNT + image):
        return LEARNT + image
    raise UnknownThing(f"nothing is known here of image {image!r}")


def chain(store: ChunkStore, image: str, *, learnt: bool = False) -> list[str]:
    """Names of the images that `image` consists of, the base first and itself last.

    It begins later where a parent is not at this site. Raises UnknownThing if `image` is not. With `learnt` an image
    counts of which no more is here than what it consists of.
    """
    known: Callable[[str], str] = partial(stored_as, store) if learnt else lambda name: IMAGE_PREFIX + name
    found = [image]
    meta = store.manifest_meta(known(image))
    while (parent := parent_of(meta)) and parent not in found and len(found) < MAX_DEPTH:
        try:
            meta = store.manifest_meta(known(parent))
        except UnknownThing:
            break
        found.append(parent)
    return found[::-1]


def split_of(store: ChunkStore, image: str, golden: str = "", guest: str = "") -> Split:
    """How the chunks of a guest of `image` divide, as far as this site has its layers.

    `golden` is the id of the snapshot that it was born from: what the boot wrote belongs to the image's own layer.
    `guest` is its uuid: an application layer that was committed from it is its application layer, too.
    """
    names: list[str] = []
    with contextlib.suppress(UnknownThing):
        names = [stored_as(store, name) for name in chain(store, image, learnt=True)]
    base = _chunks(store, names[0]) if names else frozenset[bytes]()
    application = frozenset[bytes]().union(*(_chunks(store, name) for name in names[1:]))
    if golden:
        booted = _chunks(store, GOLDEN_PREFIX + golden)
        if len(names) > 1:
            application |= booted
        else:
            base |= booted
    for name in store.manifest_names(IMAGE_PREFIX) if guest else ():
        if store.manifest_meta(name).get("uuid") == guest:
            application |= _chunks(store, name)
    return Split(base, application - base)


def _chunks(store: ChunkStore, name: str) -> frozenset[bytes]:
    try:
        return store.load_manifest(name).unique()
    except HaulierError:
        return frozenset()


def children(store: ChunkStore, image: str) -> list[str]:
    """Images that lie directly on `image`, sorted."""
    names = [name.removeprefix(IMAGE_PREFIX) for name in store.manifest_names(IMAGE_PREFIX)]
    return [name for name in names if parent_of(store.manifest_meta(IMAGE_PREFIX + name)) == image]


@dataclass(frozen=True)
class ImageFacts:
    """One image: `bytes` of all its chunks, `own_bytes` of those that its parent has not got."""

    name: str
    layer: str
    parent: str
    digest: str
    size: int
    chunks: int
    bytes: int
    own_bytes: int
    guest: str
    quiesced: bool


def facts(store: ChunkStore, image: str) -> ImageFacts:
    """Raises UnknownThing if there is none of that name."""
    name = IMAGE_PREFIX + image
    manifest, meta = store.load_manifest(name), store.manifest_meta(name)
    parent = parent_of(meta)
    mine = manifest.unique()
    below = _chunks(store, IMAGE_PREFIX + parent) if parent else frozenset[bytes]()
    return ImageFacts(
        name=image,
        layer=APPLICATION if parent else BASE,
        parent=parent,
        digest=manifest.digest.hex(),
        size=manifest.size,
        chunks=len(mine),
        bytes=len(mine) * CHUNK,
        own_bytes=len(mine - below) * CHUNK,
        guest=str(meta.get("guest", "")),
        quiesced=bool(meta.get("quiesced", False)),
    )
