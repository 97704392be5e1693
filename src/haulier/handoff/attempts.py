"""What a handoff that came to nothing, or a prefetch, leaves at both sites, so that the next one sends only the rest.

That is the picture of memory that each side had (the mirrors of the two may differ by what was on its way, so they are
compared before they serve: `agreeing`), and at the target the manifest of the disk so far. Nothing of it is ever taken
for the guest: it is a place to look for content. It lies under a budget and an age, with the pictures of guests that
moved away (`retained`): the oldest go first.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.agent.site import Site, check_name
from haulier.chunks.store import ChunkStore
from haulier.durable import sync, write_atomically
from haulier.errors import UNDECODABLE, Corrupt, HaulierError
from haulier.guests.model import GuestSpec
from haulier.handoff import sparsefile
from haulier.handoff.messages import Job
from haulier.memory import salvage
from haulier.memory.base import MemoryBase
from haulier.units import PAGE

log = logging.getLogger(__name__)
PREFIX: Final = "attempt:"
MANIFESTS: Final = "attempt/"
_PART: Final = ".part"


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """What ``meta.json`` says. `handoff` is the id at both sites, which names the picture."""

    handoff: str
    guest: str
    uuid: str
    peer: str
    kind: str = "cut"
    """"cut" or "prefetch"."""
    at: float = 0.0

    @property
    def id(self) -> str:
        return picture_id(self.handoff)


def _directory(site: Site, guest: str, peer: str) -> Path:
    return site.attempts / check_name(guest, "guest") / check_name(peer, "site")


def picture_id(handoff: str) -> str:
    """The id of the picture that an attempt, the handoff, left at both sites."""
    return PREFIX + handoff


def manifest_of(guest: str) -> str:
    """Name of the manifest of the disk, as far as it came."""
    return MANIFESTS + guest


def is_attempt(picture: str) -> bool:
    """Whether an id is that of a picture that an attempt left behind."""
    return picture.startswith(PREFIX)


def keep_of(site: Site, job: Job, spec: GuestSpec, base: MemoryBase | None, kind: str) -> None:
    """Has the next attempt start from what this worker has of a guest's memory; see `keep`. Not for containers."""
    mirror = site.mirror(job.handoff)
    if spec.container is None:
        meta = Attempt(handoff=job.handoff, guest=spec.name, uuid=spec.uuid, peer=job.peer, kind=kind)
        keep(site, meta, mirror, base)
    mirror.unlink(missing_ok=True)


def keep(site: Site, meta: Attempt, mirror: Path, base: MemoryBase | None) -> bool:
    """Moves the mirror of a worker that is done, or dead, to where the next attempt finds it; False if it cannot.

    Never raises: what cannot be kept has only to be sent again. `mirror` is gone in any case.
    """
    fresh: Path | None = None
    try:
        # One that holds nothing but its header would take the place of an earlier one for nothing.
        if sparsefile.size(mirror) <= PAGE:
            return False
        if not site.keep_bytes or not site.keep_s:
            return False
        salvage.check_size(mirror)
        directory = _directory(site, meta.guest, meta.peer)
        fresh = directory.with_name(directory.name + _PART)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700, parents=True)
        # Copied before the base's pages are added: the mirror lies in memory.
        sparsefile.copy(mirror, fresh / "memory")
        salvage.salvage(fresh / "memory", base)
        # Or a power cut leaves a picture that says it is whole, with pages missing.
        sync(fresh / "memory")
        meta = msgspec.structs.replace(meta, at=time.time())
        write_atomically(fresh / "meta.json", msgspec.json.encode(meta))
        shutil.rmtree(directory, ignore_errors=True)
        fresh.rename(directory)
        expire(site)
        return directory.exists()
    except (OSError, HaulierError) as error:
        log.warning("what handoff %s sent of %s is not kept: %s", meta.handoff, meta.guest, error)
        if fresh is not None:
            # No budget counts it, and there may be no room left but for it.
            shutil.rmtree(fresh, ignore_errors=True)
        return False
    finally:
        mirror.unlink(missing_ok=True)


def keep_chunks(store: ChunkStore, guest: str, incoming: str) -> None:
    """Has the store's cache know of the chunks that came, by the manifest that was being built."""
    if incoming in store.manifest_names(incoming):
        manifest = store.load_manifest(incoming)
        store.save_manifest(manifest_of(guest), manifest, {"at": time.time()}, partial=True, pinned=False)


def expire_chunks(store: ChunkStore, age_s: float) -> list[str]:
    """Drops manifests of attempts of that age; their names. Their chunks are the cache's to give up, as before."""
    now = time.time()
    names = [name for name in store.manifest_names(MANIFESTS) if now - store.manifest_meta(name).get("at", 0) >= age_s]
    for name in names:
        store.drop_manifest(name)
    return names


def _read(directory: Path) -> Attempt | None:
    try:
        meta = msgspec.json.decode((directory / "meta.json").read_bytes(), type=Attempt)
    except (OSError, *UNDECODABLE):
        return None
    return meta if (directory / "memory").exists() else None


def _all(site: Site) -> Iterator[tuple[Path, Attempt]]:
    for path in sorted(site.attempts.glob("*/*")) if site.attempts.is_dir() else ():
        meta = _read(path) if path.suffix != _PART else None
        if meta is not None:
            yield path, meta


def candidates(site: Site, guest: str, uuid: str) -> list[str]:
    """Ids of the pictures that attempts to hand over that very guest left here, the newest first."""
    found = [meta for _, meta in _all(site) if meta.guest == guest and meta.uuid == uuid]
    return [meta.id for meta in sorted(found, key=lambda meta: -meta.at)]


def open_base(site: Site, guest: str, picture: str) -> MemoryBase:
    """The picture with that id; Corrupt when it is not (any more) here."""
    for path, meta in _all(site):
        if meta.guest == guest and meta.id == picture:
            return MemoryBase.from_mirror(path / "memory")
    raise Corrupt(f"what was left of {picture} is gone from site {site.name!r}: try again")


def forget(site: Site, guest: str) -> None:
    """Drops what all attempts for that guest left here; its chunks become the cache's to keep or give up."""
    shutil.rmtree(site.attempts / guest, ignore_errors=True)


# -- budget and age ----------------------------------------------------------------------------------------------


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that lies here for a guest that is elsewhere, or is to go: `kind` "way back", "cut" or "prefetch"."""

    guest: str
    kind: str
    peer: str
    bytes: int
    at: float
    path: str


def kept(site: Site) -> list[Kept]:
    """All of it, oldest first."""
    found = []
    for path, meta in _all(site):
        size = sparsefile.size(path / "memory")
        found.append(Kept(guest=meta.guest, kind=meta.kind, peer=meta.peer, bytes=size, at=meta.at, path=str(path)))
    for path in site.retained.iterdir() if site.retained.is_dir() else ():
        with contextlib.suppress(OSError):
            at = (path / "meta.json").stat().st_mtime
            size = sparsefile.size(path / "memory")
            found.append(Kept(guest=path.name, kind="way back", peer="", bytes=size, at=at, path=str(path)))
    return sorted(found, key=lambda one: one.at)


def over(things: list[Kept], now: float, budget: int, age_s: float) -> list[Kept]:
    """Those that have to go, oldest first: too old, or more than the budget holds. Pure."""
    gone = [one for one in things if now - one.at > age_s]
    rest = sorted((one for one in things if now - one.at <= age_s), key=lambda one: one.at)
    total = sum(one.bytes for one in rest)
    while rest and total > budget:
        total -= rest[0].bytes
        gone.append(rest.pop(0))
    return gone


def expire(site: Site, *, everything: bool = False, dry_run: bool = False) -> list[str]:
    """Drops what is over budget or age, or all of it; what went (or would go), by path."""
    things = kept(site)
    gone = things if everything else over(things, time.time(), site.keep_bytes, site.keep_s)
    for one in gone:
        if not dry_run:
            # First what makes it whole, so that half of it is never found.
            (Path(one.path) / "meta.json").unlink(missing_ok=True)
            shutil.rmtree(one.path, ignore_errors=True)
    return [one.path for one in gone]


def facts(site: Site) -> dict[str, Any]:
    """For `status`."""
    now = time.time()
    things = [
        {"guest": k.guest, "kind": k.kind, "peer": k.peer, "bytes": k.bytes, "age_s": round(max(0.0, now - k.at), 1)}
        for k in kept(site)
    ]
    return {"kept": things, "budget": site.keep_bytes, "age_s": site.keep_s}
