"""Images of containers: directories, tar files and OCI layouts into the store, a region of chunks for each layer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.images import PREFIX
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.compress import zstd
from haulier.containers import files
from haulier.containers.model import MAX_LAYERS, ImageConfig
from haulier.containers.tree import OPAQUE, Entry, Tree, chunks_for, sequential
from haulier.errors import Corrupt, UnknownThing, Unsupported, UsageError
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK

Progress = Callable[[float, str], None]
KIND: Final = "container"
_COMMIT_EVERY: Final = 2048
_WHITEOUT: Final = ".wh."
_MAX_JSON: Final = 16 << 20
_TAR_S: Final = 3600
_ZSTD_MAGIC: Final = bytes.fromhex("28b52ffd")
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
"""The names of processors in OCI's images."""


def silent(share: float, what: str) -> None:
    """A progress callback that says nothing."""


class Layers(msgspec.Struct, frozen=True, kw_only=True):
    """What an image's manifest has as its notes: how many chunks each layer takes, lowest first, and how it is run."""

    kind: str
    layers: tuple[int, ...]
    config: ImageConfig


def is_container(meta: dict[str, Any]) -> bool:
    """Whether the notes of an image's manifest are those of a container's image."""
    return meta.get("kind") == KIND


def layers_of(meta: dict[str, Any]) -> Layers:
    """Raises Corrupt for notes that are none."""
    try:
        return msgspec.convert(meta, Layers)
    except msgspec.ValidationError as error:
        raise Corrupt(f"an image's notes make no sense ({error}): import it again") from None


def looks_like_container(source: Path) -> bool:
    """A directory, or a tar file by its name: what `import_container` takes and no disk image is."""
    return source.is_dir() or bool(re.search(r"\.(tar|tgz|tar\.(gz|xz|zst|bz2))$", source.name))


def import_container(
    store: ChunkStore,
    name: str,
    source: Path,
    *,
    base: str = "",
    config: ImageConfig | None = None,
    uuid: str = "",
    progress: Progress = silent,
) -> Manifest:
    """Puts an image into the store as manifest `image/<name>`; its layers lie in it one after the other.

    `source` is a root file system (directory or tar) or an OCI layout. With `base` it holds what comes on top of that
    image of the store; `uuid` is the guest's that it was made of. Raises UnknownThing, UsageError, Unsupported,
    Corrupt, NoRoom; the store is then as before.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name):
        raise UsageError(f"image name {name!r}: use 1 to 64 of a-z, 0-9, - and ., a letter or digit first")
    if not source.exists():
        raise UnknownThing(f"nothing at {source}: check the path")
    with store.sibling() as own:
        table, counts, inherited = _base(own, base)
        with _layers(source, own.path) as (folders, found):
            for number, folder in enumerate(folders):
                progress(number / len(folders), "reading files")
                fps = import_layer(own, folder)
                table += b"".join(fps)
                counts.append(len(fps))
        if len(counts) > MAX_LAYERS:
            raise Unsupported(f"an image of {len(counts)} layers: at most {MAX_LAYERS} can be mounted; squash some")
        chosen = (config or ImageConfig()).over(found).over(inherited)
        manifest = Manifest(len(table) // 32 * CHUNK, bytes(table))
        meta = Layers(kind=KIND, layers=tuple(counts), config=chosen)
        notes = dict(msgspec.to_builtins(meta)) | {"source": source.name, "imported": time.time()}
        if base:
            notes["parent"] = base
        if uuid:
            notes["uuid"] = uuid
        own.save_manifest(PREFIX + name, manifest, notes)
    progress(1.0, "done")
    return manifest


def _base(store: ChunkStore, base: str) -> tuple[bytearray, list[int], ImageConfig]:
    if not base:
        return bytearray(), [], ImageConfig()
    meta = store.manifest_meta(PREFIX + base)
    if not is_container(meta):
        raise UsageError(f"image {base!r} is a disk of a VM: a container's image needs one of containers below it")
    found = layers_of(meta)
    return bytearray(store.load_manifest(PREFIX + base).fingerprints), list(found.layers), found.config


def import_layer(store: ChunkStore, folder: Path) -> list[bytes]:
    """The fingerprints of the region that holds all of `folder`, put into the store (not committed)."""
    files.check_plain(folder)
    described = [entry for entry, _ in files.describe(folder, files.walk(folder))]
    places, after = sequential([entry.size for entry in described])
    entries = [
        msgspec.structs.replace(entry, extents=place if place[1] else ())
        for entry, place in zip(described, places, strict=True)
    ]
    table = Tree(tuple(entries)).encode()
    many = -(-len(table) // BLOCK)
    header = Tree(tuple(entries)).header(table, [(after, many)])
    fps = [ZERO] * chunks_for(after + many)
    first = bytearray()
    put = 0
    for number, chunk in _region(folder, entries, after, table):
        if number == 0:
            first += chunk
            continue
        fps[number] = store.put(chunk)
        put += 1
        if put % _COMMIT_EVERY == 0:
            store.commit()
    first = first or bytearray(CHUNK)
    first[:BLOCK] = header
    fps[0] = store.put(bytes(first))
    return fps


def _region(folder: Path, entries: Sequence[Entry], after: int, table: bytes) -> Iterator[tuple[int, bytes]]:
    """(chunk, 64 KiB) of a region's contents, but for its header."""
    top = os.fsencode(folder)
    filling = bytearray(BLOCK)
    number = 0
    whole = []
    for entry in entries:
        if not entry.extents:
            continue
        if entry.extents[1] >= BLOCKS_PER_CHUNK:
            whole.append(entry)
            continue
        for piece in files.read_blocks(os.path.join(top, entry.path), entry.size):
            filling += piece
        while len(filling) >= CHUNK:
            yield number, bytes(filling[:CHUNK])
            del filling[:CHUNK]
            number += 1
    yield number, bytes(filling.ljust(CHUNK, b"\0"))
    for entry in whole:
        number = entry.extents[0] // BLOCKS_PER_CHUNK
        for piece in files.read_blocks(os.path.join(top, entry.path), entry.size):
            for at in range(0, len(piece), CHUNK):
                yield number, piece[at : at + CHUNK].ljust(CHUNK, b"\0")
                number += 1
    number = after // BLOCKS_PER_CHUNK
    for at in range(0, len(table), CHUNK):
        yield number, table[at : at + CHUNK].ljust(CHUNK, b"\0")
        number += 1


# -- where layers come from ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _layers(source: Path, scratch: Path) -> Iterator[tuple[list[Path], ImageConfig]]:
    """Directories of the layers, lowest first, and how the image wants to be run."""
    if source.is_dir() and not (source / "oci-layout").exists():
        yield [source], ImageConfig()
        return
    with tempfile.TemporaryDirectory(prefix=".import-", dir=scratch) as place:
        if source.is_dir():
            yield _oci(source, Path(place))
        else:
            folder = Path(place) / "root"
            _untar(source, folder)
            yield [folder], ImageConfig()


def _untar(file: Path, folder: Path) -> None:
    folder.mkdir()
    command = ["tar", "--extract", "--numeric-owner", "--same-owner", "--preserve-permissions", "--xattrs"]
    command += ["--xattrs-include=security.capability", "--xattrs-include=user.*", "-C", str(folder)]
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as plain:
            # tar would need a program for this kind of compression, which not every host has.
            squeezed = _unsqueeze(file, plain)
            done = subprocess.run(
                [*command, "-f", "-" if squeezed else str(file)],
                stdin=plain if squeezed else subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TAR_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise Corrupt(f"{file} could not be unpacked within {_TAR_S} s") from None
    if done.returncode:
        raise Corrupt(f"{file} could not be unpacked: {done.stderr.strip()[-300:]}")


def _unsqueeze(file: Path, plain: IO[bytes]) -> bool:
    """Writes what a file of zstd holds to `plain`; False, and nothing, for any other."""
    with file.open("rb") as packed:
        if packed.read(4) != _ZSTD_MAGIC:
            return False
        packed.seek(0)
        try:
            with zstd.open(packed, "rb") as whole:
                shutil.copyfileobj(whole, plain, 1 << 20)
        except (zstd.ZstdError, EOFError) as error:
            raise Corrupt(f"{file} could not be unpacked: {error}") from None
    plain.seek(0)
    return True


def _oci(layout: Path, place: Path) -> tuple[list[Path], ImageConfig]:
    index = _json(layout / "index.json")
    manifests = index.get("manifests", [])
    if len(manifests) != 1:
        raise Unsupported(f"{layout} holds {len(manifests)} images: give a layout with one")
    manifest = _json(_blob(layout, manifests[0]))
    if "layers" not in manifest:
        manifest = _json(_blob(layout, _of_this_machine(layout, manifest.get("manifests", []))))
    config = _json(_blob(layout, manifest["config"])).get("config", {}) or {}
    folders = []
    for number, layer in enumerate(manifest["layers"]):
        blob, folder = _blob(layout, layer), place / f"layer-{number}"
        _untar(blob, folder)
        _whiteouts(folder)
        folders.append(folder)
    return folders, ImageConfig.from_oci(config)


def _of_this_machine(layout: Path, manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The one of an index of several platforms that runs here."""
    for descriptor in manifests:
        platform = descriptor.get("platform") or {}
        if (platform.get("os"), platform.get("architecture")) == ("linux", _ARCHITECTURES.get(os.uname().machine)):
            return descriptor
    raise Unsupported(f"{layout} has nothing for Linux on {os.uname().machine}: make it for this machine")


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError) as error:
        raise Corrupt(f"{path} cannot be read ({error}): make the layout again") from None
    if not isinstance(value, dict):
        raise Corrupt(f"{path} is no object: make the layout again")
    return value


def _blob(layout: Path, descriptor: dict[str, Any]) -> Path:
    kind, _, digest = str(descriptor.get("digest", "")).partition(":")
    if kind != "sha256" or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise Unsupported(f"{layout} names a blob {str(descriptor.get('digest'))[:80]!r}: only sha256 is known")
    path = layout / "blobs" / "sha256" / digest
    hasher = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                hasher.update(piece)
    except OSError as error:
        raise Corrupt(f"{layout} lacks the blob {digest[:12]} ({error}): make it again") from None
    if hasher.hexdigest() != digest:
        raise Corrupt(f"{path} does not match its digest: fetch the image again")
    return path


def _whiteouts(folder: Path) -> None:
    """OCI's marks of what a layer takes away, as the overlay file system has them."""
    for name, folders, names in os.walk(folder):
        for mark in [entry for entry in names if entry.startswith(_WHITEOUT)]:
            path = Path(name) / mark
            path.unlink()
            if mark == ".wh..wh..opq":
                os.setxattr(name, OPAQUE, b"y")
            elif not mark.startswith(".wh..wh."):
                hidden = Path(name) / mark.removeprefix(_WHITEOUT)
                if not os.path.lexists(hidden):
                    os.mknod(hidden, stat.S_IFCHR | 0o600, os.makedev(0, 0))
        folders[:] = [entry for entry in folders if not (Path(name) / entry).is_symlink()]


def difference(lower: Path, upper: Path, out: Path) -> None:
    """Copies to the new directory `out` what `upper` has and `lower` has not, or has otherwise; whiteouts for the rest.

    So a root file system that was built with more packages becomes a layer on top of the one without them.
    """
    theirs = dict(files.walk(lower))
    out.mkdir()
    made = set()
    ours = list(files.walk(upper))
    for path, status in ours:
        name = os.fsdecode(path)
        if not path or not _differs(lower / name, theirs.get(path), upper / name, status):
            continue
        for parent in [*reversed(Path(name).parents)][1:]:
            if parent not in made:
                (out / parent).mkdir(exist_ok=True)
                _copy(upper / parent, out / parent)
                made.add(parent)
        if stat.S_ISDIR(status.st_mode):
            (out / name).mkdir(exist_ok=True)
            made.add(Path(name))
        _copy(upper / name, out / name)
    for path in sorted(theirs.keys() - {path for path, _ in ours}):
        hidden = out / os.fsdecode(path)
        if hidden.parent.is_dir() and not os.path.lexists(hidden):
            os.mknod(hidden, stat.S_IFCHR | 0o600, os.makedev(0, 0))


def _differs(theirs: Path, before: os.stat_result | None, ours: Path, now: os.stat_result) -> bool:
    if before is None or (before.st_mode, before.st_uid, before.st_gid) != (now.st_mode, now.st_uid, now.st_gid):
        return True
    if stat.S_ISREG(now.st_mode):
        return before.st_size != now.st_size or theirs.read_bytes() != ours.read_bytes()
    return stat.S_ISLNK(now.st_mode) and theirs.readlink() != ours.readlink()


def _copy(source: Path, target: Path) -> None:
    """One name, not what is below it."""
    status = source.lstat()
    if stat.S_ISLNK(status.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(status.st_mode):
        shutil.copyfile(source, target)
    elif not stat.S_ISDIR(status.st_mode):
        os.mknod(target, status.st_mode, status.st_rdev)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        target.chmod(stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source, follow_symlinks=False):
        os.setxattr(target, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)
