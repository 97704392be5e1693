"""Memory left behind: the picture of a guest's memory at its last switchover, kept at both sites for the way back.

One picture per guest and site. Both sites hold the same bytes, because both mirrors were built from the same stream;
the id names guest, epoch and stream, so that two sites never take different pictures for one.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from haulier.agent.site import Site
from haulier.chunks.store import ChunkStore
from haulier.durable import sync, write_atomically
from haulier.errors import UNDECODABLE, Corrupt, HaulierError
from haulier.guests import golden_scrub
from haulier.handoff import attempts, sparsefile
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror

log = logging.getLogger(__name__)
GOLDEN = "golden:"
_GOLDEN_ID = re.compile("[0-9a-f]{64}")
PLACES = "places"
"""Beside the picture of a container: where each page lies in it, and ..."""
DUMP = "dump"
"""... the files of the dump that it went with: the next one has most of them in common with that."""


class Retained(msgspec.Struct, frozen=True, kw_only=True):
    """What ``meta.json`` says."""

    id: str
    guest: str
    uuid: str
    epoch: int
    manifest: str = ""
    """Digest of the disk's manifest of the same moment."""


def memory_id(uuid: str, epoch: int, stream_digest: bytes) -> str:
    """The name that both sites give to the picture."""
    return f"{uuid}:{epoch}:{stream_digest.hex()[:32]}"


def _directory(site: Site, guest: str) -> Path:
    return site.retained / guest


def keep(site: Site, meta: Retained, mirror: Mirror | Path, beside: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Puts a mirror, or the closed and complete file of one, into its place; its file goes with `Path`.

    Earlier pictures of that guest go, and what attempts left. A mirror is written straight to the disk: made complete
    where it lies it would take as much memory as the guest. `beside`: what else goes with the picture, by `PLACES` and
    `DUMP`. NoRoom as `Mirror.complete`.
    """
    attempts.forget(site, meta.guest)
    directory = _directory(site, meta.guest)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(mode=0o700, parents=True)
    if isinstance(mirror, Mirror):
        mirror.complete(directory / "memory")
    else:
        sparsefile.copy(mirror, directory / "memory")
        mirror.unlink()
    # Or a power cut leaves a picture that says it is whole, with pages missing.
    sync(directory / "memory")
    for name, data in beside.items():
        write_atomically(directory / name, data)
    # Last: without it there is no picture, so one that was cut short is never taken for whole.
    write_atomically(directory / "meta.json", msgspec.json.encode(meta))


def kept(site: Site, guest: str, name: str) -> bytes:
    """What was kept under that name with the picture; empty if nothing was."""
    with contextlib.suppress(OSError):
        return (_directory(site, guest) / name).read_bytes()
    return b""


def find(site: Site, guest: str, uuid: str) -> Retained | None:
    """The picture kept for that very guest, if there is one."""
    try:
        meta = msgspec.json.decode((_directory(site, guest) / "meta.json").read_bytes(), type=Retained)
    except (OSError, *UNDECODABLE):
        return None
    return meta if meta.uuid == uuid and (_directory(site, guest) / "memory").exists() else None


def forget(site: Site, guest: str) -> None:
    """Drops the picture of a guest, if there is one, and what attempts to hand it over left."""
    attempts.forget(site, guest)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(_directory(site, guest))


def suspect(site: Site, store: ChunkStore, picture: str) -> None:
    """After a handoff from that picture in which something did not match: one that others use as well is looked at.

    Others are the caller's to forget. It takes as long as reading a guest's memory; never raises.
    """
    if picture.startswith(GOLDEN):
        try:
            golden_scrub.check(site.golden / picture.removeprefix(GOLDEN), store)
        except (OSError, HaulierError) as error:
            log.warning("the %s cannot be looked at: %s", picture, error)


def candidates(site: Site, guest: str, uuid: str, golden: str) -> list[str]:
    """Ids of pictures that a mirror of this guest could start from here, best first."""
    found = attempts.candidates(site, guest, uuid)
    kept = find(site, guest, uuid)
    if kept is not None:
        found.append(kept.id)
    if golden and (site.golden / golden / "memory").exists():
        found.append(GOLDEN + golden)
    return found


def check_named(picture: str, known: Collection[str], peer: str) -> None:
    """Corrupt if `peer` names a picture that is not one of those `known` to be meant; it may name none ("")."""
    if picture and picture not in known:
        raise Corrupt(
            f"site {peer!r} wants to begin with the picture of memory {picture[:100]!r}, which was not offered for "
            "this guest: run the same haulier at both sites"
        )


def open_base(site: Site, guest: str, uuid: str, picture: str) -> MemoryBase | None:
    """The picture with that id; None for "". Raises Corrupt when it is not (any more) here."""
    if not picture:
        return None
    if picture.startswith(GOLDEN):
        golden = picture.removeprefix(GOLDEN)
        path = site.golden / golden / "memory"
        if not _GOLDEN_ID.fullmatch(golden) or not path.exists():
            raise Corrupt(f"golden snapshot {golden[:80]!r}, that was agreed on, is not at {site.name!r}: try again")
        return MemoryBase.from_mapped_ram(path)
    if attempts.is_attempt(picture):
        return attempts.open_base(site, guest, picture)
    kept = find(site, guest, uuid)
    if kept is None or kept.id != picture:
        raise Corrupt(f"the picture of memory {picture} that was agreed on is not at site {site.name!r}: try again")
    return MemoryBase.from_mirror(_directory(site, guest) / "memory")
