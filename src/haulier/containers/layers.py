"""Layers of images as directories of a site, made from chunks when a container needs them and kept for the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.containers.files import region_reader, write_tree
from haulier.containers.model import ContainerSpec
from haulier.containers.tree import Tree
from haulier.errors import UsageError
from haulier.units import BLOCKS_PER_CHUNK, CHUNK, FINGERPRINT

_POLL_S: Final = 0.05


def regions(spec: ContainerSpec, manifest: Manifest) -> list[Manifest]:
    """Each layer's own manifest, lowest first. UsageError when the disk is shorter than its layers."""
    if spec.lower_chunks > len(manifest):
        raise UsageError(f"a disk of {len(manifest)} chunks cannot hold {spec.lower_chunks} chunks of layers")
    found, at = [], 0
    for count in spec.layers:
        raw = manifest.fingerprints[at * FINGERPRINT : (at + count) * FINGERPRINT]
        found.append(Manifest(count * CHUNK, raw))
        at += count
    return found


def layer_id(region: Manifest) -> str:
    """The name of a layer's directory; short, for all of them go into one mount option."""
    return region.digest.hex()[:24]


def make_layers(
    root: Path,
    store: ChunkStore,
    spec: ContainerSpec,
    manifest: Manifest,
    progress: Callable[[float, str], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[Path]:
    """The directories of the layers, lowest first, made where they are not there yet. Safe beside others that do so.

    `check` is called all the time and gives it up by raising; what was half made is gone then.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = []
    for number, region in enumerate(regions(spec, manifest)):
        place = root / layer_id(region)
        if not place.is_dir():
            if progress is not None:
                progress(number / len(spec.layers), f"unpacking layer {number + 1} of {len(spec.layers)}")
            _make(root, place, store, region, check)
        found.append(place)
    return found


def chunks_of(
    spec: ContainerSpec, manifest: Manifest, store: ChunkStore, wanted: Mapping[bytes, set[int]]
) -> set[bytes]:
    """Fingerprints of the chunks of the layers that hold these pages of files (path without the first slash)."""
    found: set[bytes] = set()
    left = dict(wanted)
    for region in reversed(regions(spec, manifest)):

        def get(chunk: int, region: Manifest = region) -> bytes:
            return store.get(region[chunk])

        for entry in Tree.read(region_reader(get), len(region) * BLOCKS_PER_CHUNK).entries:
            # What a higher layer has hides what is below it.
            pages = left.pop(entry.path, None)
            if pages:
                blocks = [block for first, many in entry.pairs for block in range(first, first + many)]
                found |= {region[blocks[page] // BLOCKS_PER_CHUNK] for page in pages if page < len(blocks)}
    return found


def _make(root: Path, place: Path, store: ChunkStore, region: Manifest, check: Callable[[], None]) -> None:
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _wait_for(lock, check)
        if place.is_dir():
            return
        fresh = root / f"{place.name}.new"
        shutil.rmtree(fresh, ignore_errors=True)

        def get(chunk: int) -> bytes:
            check()
            return store.get(region[chunk])

        try:
            write_tree(fresh, Tree.read(region_reader(get), len(region) * BLOCKS_PER_CHUNK), get)
            # A power cut must not leave a layer with empty files under its name.
            _sync(fresh)
            fresh.rename(place)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _wait_for(lock: int, check: Callable[[], None]) -> None:
    """Whoever has it may take as long as its layer and disk want."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            check()
            time.sleep(_POLL_S)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _syncfs(fd)
    finally:
        os.close(fd)


def _syncfs(fd: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
        raise OSError(ctypes.get_errno(), "syncfs")


def sync_files(folder: Path) -> None:
    """Everything written on the file system of `folder` is on its disk when this returns."""
    _sync(folder)


def unused(root: Path, wanted: set[str]) -> list[Path]:
    """Directories of layers that are not among `wanted`; those that are being made are left alone."""
    if not root.is_dir():
        return []
    return [path for path in sorted(root.iterdir()) if path.name not in wanted and path.suffix != ".new"]
