"""The forecast of a handoff: what would be sent, how long it takes and how long the guest stands still.

It samples what is there (`sampling`): pages of the running guest's memory against the picture that both sites have,
what of them the guest dirties, chunks that the overlay holds; and asks the target what it has. Nothing changes at
either site. The forecast itself is arithmetic (`forecast`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from haulier.agent.site import Site
from haulier.chunks.blocks import StoreBlockFinder
from haulier.chunks.store import ChunkStore
from haulier.containers.container import Container
from haulier.containers.preflight import host_facts
from haulier.disks.rounds import DiskRounds
from haulier.errors import Conflict, GuestError
from haulier.guests.model import GuestSpec
from haulier.guests.qemu import Qemu
from haulier.handoff import clients, container_plan, forecast, foretold, readdressing, retained, sampling
from haulier.handoff.adapting import level_at
from haulier.handoff.custody import record_of
from haulier.handoff.journal import GuestRow, Journal
from haulier.handoff.messages import LEAVE_BYTES, Job, Offer, Options
from haulier.handoff.offering import make_offer
from haulier.handoff.ownership import State
from haulier.handoff.residence import container_paths, guest_paths, spec_of
from haulier.handoff.shared import blocks_of, golden_manifest
from haulier.images.layers import INSTANCE, Split, split_of
from haulier.units import CHUNK

SAMPLE_LACKING = 4096
DEFAULT_RATE_BPS = 10e6


class PlanPeer(Protocol):
    """The target's agent, as far as a plan needs it."""

    def look(self, offer: Offer) -> dict[str, Any]: ...
    def measure(self) -> tuple[float, float]: ...
    def lacking(self, fingerprints: Sequence[bytes]) -> list[int]: ...


def make_plan(
    site: Site, journal: Journal, guest: str, to: str, peer: PlanPeer, options: Options | None = None
) -> dict[str, Any]:
    """A forecast as JSON values. Raises what stands against the handoff before anything would be sent."""
    row = journal.guest(guest)
    record = record_of(row)
    if record.state is not State.OWNER:
        raise Conflict(f"guest {guest!r} is {record.state.value!r} at site {site.name!r}: only its owner can plan")
    spec = spec_of(row)
    if spec.container is not None:
        plan = _plan_container(site, row, spec, record.last + 1, to, peer)
        return plan | {"clients": clients.outlook(spec, journal.site(to).bulk)}
    qemu = Qemu.adopt(guest_paths(site, guest), worker=True)
    try:
        if qemu.status() != "running":
            raise GuestError(f"guest {guest!r} is {qemu.status()}, not running: start it first")
        with ChunkStore(site.store) as store:
            manifest = store.load_manifest(row.manifest)
            offer = make_offer(site, store, _job(guest, to), row, manifest, record.last + 1)
            offer = msgspec.structs.replace(offer, accelerator=qemu.accel)
            found = peer.look(offer)
            rate, rtt = peer.measure()
            golden = golden_manifest(store, spec.golden)
            ready = site.golden / spec.golden / "blocks.idx"
            index, space = blocks_of(store, manifest, golden, ready)
            picture = str(found.get("memory_base", ""))
            base = retained.open_base(site, spec.name, spec.uuid, picture)
            rate = rate or DEFAULT_RATE_BPS
            level = (options.level if options is not None else 0) or level_at(site, rate)
            finder, paths = StoreBlockFinder(index, space), guest_paths(site, guest)
            rounds = DiskRounds(qemu.qmp, "disk0", paths.rounds_sock)
            memory = partial(sampling.memory, paths.ram, base, finder, level)
            sampled, disk = sampling.disk(rounds, index, space, peer.lacking, memory)
            missing = int(found.get("missing_bytes", 0 if found.get("manifest") else offer.disk_bytes))
            split = split_of(store, spec.image, spec.golden, spec.uuid)
            layers, lacking = _layers(split, manifest.unique(), missing, peer)
            missing = sum(layer["missing"] for layer in layers.values())
            per_missing = sampling.missing(store, lacking) if missing else 0.0
    finally:
        qemu.close()
    left = 0
    if options is not None and options.disk == "on-demand":
        left, missing = missing, 0
        if disk.chunks * CHUNK > LEAVE_BYTES:
            left, disk = left + round(disk.chunks) * CHUNK, sampling.Disk(0.0, 0.0, 0.0, disk.wire_s)
    sampled = msgspec.structs.replace(
        sampled,
        disk_chunks=disk.chunks,
        disk_wire=disk.wire,
        disk_error=disk.error,
        disk_wire_s=disk.wire_s,
        missing=missing,
        missing_wire=missing / CHUNK * per_missing,
    )
    made = forecast.make(sampled, rate, rtt, foretold.pace(site), level)
    made["bytes"]["left_behind"] = left
    for name, layer in layers.items():
        layer["wire"] = round(layer["missing"] / CHUNK * per_missing)
        if name == INSTANCE:
            layer["wire"] += round(disk.wire)
            layer["memory_wire"] = made["bytes"]["memory"]
    plan = made | {
        "layers": layers,
        "guest": guest,
        "source": site.name,
        "target": to,
        "reasons": found.get("reasons", []),
        "clients": [
            *(readdressing.outlook(site, guest, spec.site_address) if spec.net == "mptcp" else ()),
            *clients.outlook(spec, journal.site(to).bulk),
        ],
        "manifest_at_target": bool(found.get("manifest")),
        "memory_base": picture,
    }
    foretold.keep_plan(site, plan)
    return plan


def _job(guest: str, to: str) -> Job:
    """One that nobody begins."""
    return Job(handoff="plan", role="source", guest=guest, peer=to)


def _plan_container(site: Site, row: GuestRow, spec: GuestSpec, epoch: int, to: str, peer: PlanPeer) -> dict[str, Any]:
    container = Container.adopt(container_paths(site, row.name))
    if container.status() != "running":
        raise GuestError(f"guest {row.name!r} is {container.status()}, not running: start it first")
    with ChunkStore(site.store) as store:
        offer = make_offer(site, store, _job(row.name, to), row, store.load_manifest(row.manifest), epoch)
    offer = msgspec.structs.replace(offer, host=host_facts())
    found = peer.look(offer)
    rate, rtt = peer.measure()
    missing = int(found.get("missing_bytes", 0 if found.get("manifest") else offer.disk_bytes))
    picture = str(found.get("memory_base", ""))
    sampled = container_plan.sample(site, spec, container, picture)
    return container_plan.forecast(sampled, missing, rate or DEFAULT_RATE_BPS, rtt) | {
        "guest": row.name,
        "kind": "container",
        "source": site.name,
        "target": to,
        "reasons": found.get("reasons", []),
        "manifest_at_target": bool(found.get("manifest")),
        "memory_base": picture,
        "layers": {},
    }


def _layers(
    split: Split, chunks: frozenset[bytes], missing: int, peer: PlanPeer
) -> tuple[dict[str, dict[str, int]], list[bytes]]:
    """Bytes of the disk by layer, and of those that the target lacks: by a sample where there are many. And those."""
    found = {}
    gone: list[bytes] = []
    for name, mine in split.sort(chunks).items():
        lacking = 0.0
        if missing and mine:
            asked = mine if len(mine) <= SAMPLE_LACKING else random.Random(1).sample(mine, SAMPLE_LACKING)
            there_not = [asked[position] for position in peer.lacking(asked)]
            lacking = len(there_not) / len(asked)
            gone += there_not
        found[name] = {"bytes": len(mine) * CHUNK, "missing": round(lacking * len(mine)) * CHUNK}
    return found, gone
