"""The target's side of an offer: everything that can stand against a handoff is found before anything is sent."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
import shutil
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from haulier.agent import prefetching
from haulier.agent.cache import Cache
from haulier.agent.core import Core
from haulier.agent.handoffs import MAX_EPOCH
from haulier.agent.site import check_name
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.containers.preflight import differences, same_kernel_pages
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, NotTrusted, UnknownThing, Unsupported, UsageError
from haulier.guests.accel import postcopy_missing, probe, qemu_info, qemu_version
from haulier.guests.golden import IMAGE_PREFIX
from haulier.guests.model import GuestSpec
from haulier.guests.qemu import memory_reasons, refuse_reasons
from haulier.guests.tap import BRIDGE, exists
from haulier.handoff import clients, residence, retained, spawning
from haulier.handoff.custody import record_of
from haulier.handoff.measures import POST_COPY
from haulier.handoff.messages import Accept, Offer
from haulier.handoff.ownership import MAY_RUN, UNDER_WAY, Event, State, find
from haulier.handoff.shared import grown
from haulier.network import tunnel
from haulier.units import CHUNK, FINGERPRINT, MIB

_HEX64: Final = re.compile(r"[0-9a-f]{64}")
_SLACK: Final = 256 * MIB
"""Of the disk: what the guest writes while it arrives, the journal, logs."""


class Lacking(msgspec.Struct, forbid_unknown_fields=True):
    """Fingerprints, 32 bytes each, in base64; `kept`: what no pinned image has may be evicted, and so is lacking."""

    fingerprints: str
    kept: bool = False


def read_offer(body: Any, caller: str) -> tuple[Offer, GuestSpec]:
    """An offer and its guest. NotTrusted if it is not the caller's, UsageError if it makes no sense."""
    try:
        offer = msgspec.convert(body, Offer)
        spec = msgspec.convert(offer.spec, GuestSpec)
    except msgspec.ValidationError as error:
        raise UsageError(f"the offer makes no sense ({error}): run the same haulier at both sites") from None
    for what, text in (("secret", offer.secret), ("manifest", offer.manifest)):
        if not _HEX64.fullmatch(text):
            raise UsageError(f"the offer's {what} is not 64 hexadecimal digits: run the same haulier at both sites")
    if offer.source != caller:
        raise NotTrusted(f"site {caller!r} made an offer in the name of site {offer.source[:60]!r}")
    check_name(offer.handoff, "handoff")
    if (
        not 0 < offer.epoch < MAX_EPOCH
        or not 0 <= offer.disk_bytes < 1 << 50
        or max(len(offer.memory_bases), len(offer.images)) > 64
    ):
        raise UsageError("the offer's numbers are out of bounds: run the same haulier at both sites")
    return offer, spec


@dataclass(frozen=True)
class Found:
    """What this site has of what an offer names. `missing_bytes` counts whole chunks."""

    spec: GuestSpec
    manifest: bool
    """The base manifest is here, if not all of its chunks."""
    memory_base: str
    missing_bytes: int


def find_here(core: Core, store: ChunkStore, offer: Offer, spec: GuestSpec) -> Found:
    """Looks for what need not be sent. Reads only."""
    manifest = find_manifest(store, offer)
    known = manifest is not None
    missing = len(store.missing(manifest.unique())) * CHUNK if manifest is not None else offer.disk_bytes
    here = retained.candidates(core.site, spec.name, spec.uuid, spec.golden)
    base = next((picture for picture in offer.memory_bases if picture in here), "")
    return Found(spec, known, base, missing)


def find_manifest(store: ChunkStore, offer: Offer) -> Manifest | None:
    """The offered disk's base, if its manifest is here under any name."""
    wanted = bytes.fromhex(offer.manifest)
    for name in store.manifest_names():
        with contextlib.suppress(Corrupt, UnknownThing):
            manifest = store.load_manifest(name)
            if name.startswith(IMAGE_PREFIX) and offer.spec.get("container"):
                manifest = grown(manifest, int(offer.spec["disk_size"]))
            if manifest.digest == wanted:
                return manifest
    return None


def look(core: Core, store: ChunkStore, cache: Cache, body: Any, caller: str) -> dict[str, Any]:
    """What stands against an offer ({"reasons": [[exit code, text], ...]}), and what is here already."""
    offer, spec = read_offer(body, caller)
    found = find_here(core, store, offer, spec)
    return {
        "site": core.site.name,
        "reasons": [[kind.exit_code, text] for kind, text in reasons(core, cache, offer, found)],
        "manifest": found.manifest,
        "memory_base": found.memory_base,
        "missing_bytes": found.missing_bytes,
        "qemu": _qemu(),
        "accelerator": probe().kind,
    }


def take(core: Core, store: ChunkStore, cache: Cache, body: Any, caller: str) -> dict[str, Any]:
    """Takes an offer, or raises all that stands against it. An offer that is repeated is answered as before."""
    offer, spec = read_offer(body, caller)
    prefetching.end_here(core, spec.name)
    with core.taken_in(spec.name, f"being offered by site {caller!r}"):
        again = _answered(core, offer, caller)
        if again is not None:
            return again
        found = find_here(core, store, offer, spec)
        against = reasons(core, cache, offer, found)
        if against:
            kind, _ = against[0]
            text = "; ".join(text for _, text in against)
            raise kind(f"site {core.site.name!r} cannot take guest {spec.name!r}: {text}")
        _make_room(core, store, cache, offer, found)
        accept, process = spawning.accept(
            core.site, core.journal, offer, manifest=found.manifest, memory_base=found.memory_base
        )
        core.children.append(process)
        address = _address_for(core, spec)
    complete = found.manifest and not found.missing_bytes
    accept = msgspec.structs.replace(
        accept,
        qemu=_qemu(),
        accelerator=probe().kind,
        complete=complete,
        site_address=address,
        same_vdso=same_kernel_pages(offer.host),
    )
    _remember(core, offer, accept)
    return dict(msgspec.to_builtins(accept))


def _address_for(core: Core, spec: GuestSpec) -> str:
    """The address that the guest will have here, where its clients move to one; without it they join later."""
    if spec.net == "mptcp":
        with contextlib.suppress(HaulierError):
            return clients.leases(core.site).take(spec.name)
    return ""


def take_prefetch(core: Core, store: ChunkStore, cache: Cache, body: Any, caller: str) -> dict[str, Any]:
    """Takes what another site sends ahead of a handoff; raises what stands against it."""
    offer, spec = read_offer(body, caller)
    if spec.container is not None:
        raise Unsupported(f"guest {spec.name!r} is a container, which cannot be prefetched: hand it over")
    prefetching.end_here(core, spec.name)
    with core.taken_in(spec.name, f"being prefetched by site {caller!r}"):
        row = core.journal.find_guest(spec.name)
        if row is not None and record_of(row).state in (*MAY_RUN, *UNDER_WAY):
            raise Conflict(f"site {core.site.name!r} has a guest {spec.name!r} already, or takes it just now")
        if core.journal.find_handoff(offer.handoff) is not None:
            raise Conflict(f"prefetch {offer.handoff} is known at site {core.site.name!r} already: begin a new one")
        found = find_here(core, store, offer, spec)
        need = found.missing_bytes + spec.memory_bytes + _SLACK
        free = shutil.disk_usage(core.site.root).free
        if not core.site.keep_bytes:
            raise NoRoom(f"site {core.site.name!r} keeps nothing for guests that are to come (keep_bytes in site.toml)")
        if free < need:
            raise NoRoom(f"site {core.site.name!r} has {free // MIB} MiB free, up to {need // MIB} MiB are needed")
        accept, process = spawning.accept_prefetch(
            core.site, core.journal, offer, manifest=found.manifest, memory_base=found.memory_base
        )
        core.children.append(process)
    complete = found.manifest and not found.missing_bytes
    return dict(msgspec.to_builtins(msgspec.structs.replace(accept, complete=complete)))


def lacking(store: ChunkStore, request: Lacking) -> dict[str, Any]:
    """Positions of those fingerprints whose chunks are not here."""
    try:
        packed = base64.b64decode(request.fingerprints, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("fingerprints are given in base64") from None
    if len(packed) % FINGERPRINT:
        raise UsageError(f"a fingerprint has {FINGERPRINT} bytes")
    fps = [packed[i : i + FINGERPRINT] for i in range(0, len(packed), FINGERPRINT)]
    missing = set(store.missing(fps))
    if request.kept:
        pinned = [name for name in store.manifest_names(IMAGE_PREFIX) if store.is_pinned(name)]
        missing |= set(fps).difference(*(store.load_manifest(name).unique() for name in pinned))
    return {"lacking": [i for i, fp in enumerate(fps) if fp in missing]}


def reasons(core: Core, cache: Cache, offer: Offer, here: Found) -> list[tuple[type[HaulierError], str]]:
    """All that stands against an offer here: which kind of error, and what to do about it."""
    spec = here.spec
    found: list[tuple[type[HaulierError], str]] = []
    taken = _name_taken(core, offer, spec)
    if taken:
        found.append((Conflict, taken))
    if spec.container is not None:
        found += [(Unsupported, text) for text in differences(offer.host)]
    else:
        found += _qemu_reasons(offer, spec)
    if POST_COPY in offer.options.allow and (why := postcopy_missing()):
        found.append((Unsupported, f"post-copy is not possible there ({why}): do not allow it"))
    for text in memory_reasons(spec, core.site.ram_dir):
        found.append((NoRoom, f"{text} (stop another guest there)"))
    need = here.missing_bytes + spec.memory_bytes + _SLACK
    found += [(NoRoom, text) for text in cache.against(need, here.missing_bytes)]
    if spec.address and not exists(BRIDGE):
        found.append((Unsupported, f"there is no bridge {BRIDGE} for its network ('haulier doctor' tells more)"))
    if spec.address and spec.net != "hook" and (why := tunnel.missing()):
        found.append((Unsupported, f"its address cannot be kept, that host makes no VXLAN tunnel ({why})"))
    if spec.net == "mptcp" and not core.site.pool:
        text = "that site has no addresses that clients could move to"
        found.append((Unsupported, f"{text} (pool in its site.toml, or 'haulier guest net {spec.name} keep')"))
    path = residence.guest_paths(core.site, spec.name).handoff_sock
    try:
        core.site.check_socket_path(path)
    except UsageError as error:
        found.append((Unsupported, str(error)))
    return found


def _make_room(core: Core, store: ChunkStore, cache: Cache, offer: Offer, here: Found) -> None:
    """Lets the cache give way where the disk would be full otherwise; the budget is seen to as chunks come."""
    lacking = here.missing_bytes + here.spec.memory_bytes + _SLACK - shutil.disk_usage(core.site.root).free
    if lacking > 0:
        wanted = find_manifest(store, offer)
        cache.evict(lacking, wanted.unique() if wanted is not None else ())


def _qemu_reasons(offer: Offer, spec: GuestSpec) -> list[tuple[type[HaulierError], str]]:
    try:
        texts = refuse_reasons(spec, qemu_info(), source_accel=offer.accelerator or None)
    except HaulierError as error:
        return [(Unsupported, str(error))]
    return [(Unsupported, f"{text} (install the same QEMU at both sites, or choose another site)") for text in texts]


def _name_taken(core: Core, offer: Offer, spec: GuestSpec) -> str:
    row = core.journal.find_guest(spec.name)
    if row is None:
        return ""
    record = record_of(row)
    if record.state in MAY_RUN:
        return f"a guest of that name lives there already, at epoch {record.epoch} (rename one of them)"
    if record.state in (State.GRANTED, State.SERVING) and row.spec.get("uuid") != spec.uuid:
        return f"another guest of that name is on its way from there ({row.handoff}): rename one of them"
    step = find(record, Event.OFFER, offer.epoch)
    if step is None or step.to is not State.RECEIVING:
        if record.state in UNDER_WAY:
            return f"a handoff of a guest of that name is under way there ({row.handoff}; see 'haulier status' there)"
        return (
            f"that site remembers a guest of that name at epoch {record.last}, which is not before the offered "
            f"{offer.epoch} (if it is another guest, run 'haulier guest remove {spec.name} --force' there)"
        )
    return ""


def _answered(core: Core, offer: Offer, caller: str) -> dict[str, Any] | None:
    row = core.journal.find_handoff(offer.handoff)
    if row is None:
        return None
    if row.peer != caller or row.role != "target" or row.epoch != offer.epoch or row.state == "ended":
        raise Conflict(f"handoff {offer.handoff!r} is known at site {core.site.name!r} and over: begin a new one")
    accept = row.detail.get("accept")
    if not accept:
        raise Conflict(f"handoff {offer.handoff!r} is being accepted at site {core.site.name!r}: ask again")
    return dict(accept)


def _remember(core: Core, offer: Offer, accept: Accept) -> None:
    with core.journal.transaction():
        row = core.journal.handoff(offer.handoff)
        core.journal.update_handoff(row.id, detail={**row.detail, "accept": msgspec.to_builtins(accept)})


def _qemu() -> str:
    try:
        return ".".join(map(str, qemu_version()))
    except HaulierError:
        return ""
