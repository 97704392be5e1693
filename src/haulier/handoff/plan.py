"""The forecast of a handoff: what would be sent, how long it takes and how long the guest stands still.

It samples what is there: pages of the running guest's memory, compared with the picture that both sites have; chunks
that the overlay holds; the guest's dirty rate over a second. Nothing changes at either site.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from haulier.agent.site import Site
from haulier.chunks.blocks import StoreBlockFinder
from haulier.chunks.store import ChunkStore
from haulier.compress import StreamCompressor
from haulier.containers.container import Container
from haulier.containers.preflight import host_facts
from haulier.disks.rounds import DiskRounds
from haulier.errors import Conflict, GuestError, HaulierError
from haulier.guests.model import GuestSpec
from haulier.guests.qemu import Qemu
from haulier.handoff import container_plan, retained
from haulier.handoff.custody import record_of
from haulier.handoff.journal import GuestRow, Journal
from haulier.handoff.messages import LEAVE_BYTES, Offer, Options
from haulier.handoff.ownership import State
from haulier.handoff.residence import container_paths, guest_paths, spec_of
from haulier.handoff.shared import blocks_of, golden_manifest
from haulier.images.layers import INSTANCE, Split, split_of
from haulier.memory.base import MemoryBase
from haulier.units import CHUNK, PAGE

SAMPLE_RUN = 32
"""Pages in a row: neighbours compress together, as they will on the wire."""
SAMPLE_RUNS = 160
SAMPLE_CHUNKS = 48
SAMPLE_LACKING = 4096
MISSING_SHARE = 0.4
"""Of a missing chunk's bytes goes over the wire, compressed or as a recipe."""
DEFAULT_RATE_BPS = 10e6
FIXED_S = 2.0
"""Offer, connection, start of the target's QEMU, switchover: what does not depend on bytes."""


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
        return _plan_container(site, row, spec, record.last + 1, to, peer)
    qemu = Qemu.adopt(guest_paths(site, guest), worker=True)
    try:
        if qemu.status() != "running":
            raise GuestError(f"guest {guest!r} is {qemu.status()}, not running: start it first")
        with ChunkStore(site.store) as store:
            manifest = store.load_manifest(row.manifest)
            offer = Offer(
                handoff="plan",
                source=site.name,
                spec=row.spec,
                epoch=record.last + 1,
                secret="0" * 64,
                manifest=manifest.digest.hex(),
                disk_bytes=len(manifest.unique()) * CHUNK,
                memory_bases=tuple(retained.candidates(site, spec.name, spec.uuid, spec.golden)),
                accelerator=qemu.accel,
            )
            found = peer.look(offer)
            rate, rtt = peer.measure()
            golden = golden_manifest(store, spec.golden)
            ready = site.golden / spec.golden / "blocks.idx"
            finder = StoreBlockFinder(*blocks_of(store, manifest, golden, ready))
            base = retained.open_base(site, spec.name, spec.uuid, str(found.get("memory_base", "")))
            memory = _sample_memory(guest_paths(site, guest).ram, base, finder)
            disk = _sample_disk(qemu, guest_paths(site, guest).rounds_sock)
            missing = int(found.get("missing_bytes", 0 if found.get("manifest") else offer.disk_bytes))
            split = split_of(store, spec.image, spec.golden, spec.uuid)
            layers = _layers(split, manifest.unique(), missing, peer)
            missing = sum(layer["missing"] for layer in layers.values())
            dirty_bps = _dirty_rate(qemu)
    finally:
        qemu.close()
    left = 0
    if options is not None and options.disk == "on-demand":
        left, missing = missing, 0
        if disk["chunks"] * CHUNK > LEAVE_BYTES:
            left, disk = left + round(disk["chunks"]) * CHUNK, disk | {"chunks": 0}
    forecast = _forecast(spec.memory_bytes, memory, disk, missing, dirty_bps, rate or DEFAULT_RATE_BPS, rtt)
    forecast["bytes"]["left_behind"] = left
    for name, layer in layers.items():
        layer["wire"] = round(layer["missing"] * MISSING_SHARE)
        if name == INSTANCE:
            layer["wire"] += round(disk["chunks"] * disk["wire_per_chunk"])
            layer["memory_wire"] = forecast["bytes"]["memory"]
    return forecast | {
        "layers": layers,
        "guest": guest,
        "source": site.name,
        "target": to,
        "reasons": found.get("reasons", []),
        "manifest_at_target": bool(found.get("manifest")),
        "memory_base": found.get("memory_base", ""),
    }


def _plan_container(site: Site, row: GuestRow, spec: GuestSpec, epoch: int, to: str, peer: PlanPeer) -> dict[str, Any]:
    container = Container.adopt(container_paths(site, row.name))
    if container.status() != "running":
        raise GuestError(f"guest {row.name!r} is {container.status()}, not running: start it first")
    with ChunkStore(site.store) as store:
        manifest = store.load_manifest(row.manifest)
    offer = Offer(
        handoff="plan",
        source=site.name,
        spec=row.spec,
        epoch=epoch,
        secret="0" * 64,
        manifest=manifest.digest.hex(),
        disk_bytes=len(manifest.unique()) * CHUNK,
        memory_bases=tuple(retained.candidates(site, spec.name, spec.uuid, "")),
        host=host_facts(),
    )
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


def _layers(split: Split, chunks: frozenset[bytes], missing: int, peer: PlanPeer) -> dict[str, dict[str, int]]:
    """Bytes of the disk by layer, and of those that the target lacks: by a sample where there are many."""
    found = {}
    for name, mine in split.sort(chunks).items():
        lacking = 0.0
        if missing and mine:
            asked = mine if len(mine) <= SAMPLE_LACKING else random.Random(1).sample(mine, SAMPLE_LACKING)
            lacking = len(peer.lacking(asked)) / len(asked)
        found[name] = {"bytes": len(mine) * CHUNK, "missing": round(lacking * len(mine)) * CHUNK}
    return found


def _sample_memory(ram: Path, base: MemoryBase | None, finder: StoreBlockFinder) -> dict[str, float]:
    """Shares of pages by kind in a sample, and wire bytes per page that has to be sent."""
    size = os.stat(ram).st_size
    pages = size // PAGE
    view = base.view("ram0") if base is not None and base.blocks.get("ram0") == size else None
    chosen = random.Random(1)
    counts = dict.fromkeys(("zero", "same", "block", "xor", "literal"), 0)
    compressor = StreamCompressor(9, 24, True)
    wire = 0
    with ram.open("rb") as file:
        for _ in range(SAMPLE_RUNS):
            first = chosen.randrange(max(1, pages - SAMPLE_RUN))
            data = os.pread(file.fileno(), SAMPLE_RUN * PAGE, first * PAGE)
            got = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
            zero = ~got.any(axis=1)
            old = view[first : first + len(got)] if view is not None else np.zeros_like(got)
            differing = np.count_nonzero(got != old, axis=1)
            same = ~zero & (differing == 0)
            rest = ~zero & ~same
            block = np.zeros(len(got), bool)
            if rest.any():
                block[np.flatnonzero(rest)] = finder.find(np.ascontiguousarray(got[rest])) >= 0
            rest &= ~block
            xor = rest & (differing < PAGE // 2)
            literal = rest & ~xor
            for kind, mask in (("zero", zero), ("same", same), ("block", block), ("xor", xor), ("literal", literal)):
                counts[kind] += int(mask.sum())
            payload = (got[xor] ^ old[xor]).tobytes() + got[literal].tobytes()
            if payload:
                wire += len(compressor.compress(payload))
    total = sum(counts.values())
    sent = counts["xor"] + counts["literal"]
    found = {kind: count / total for kind, count in counts.items()}
    found["wire_per_sent_page"] = wire / sent if sent else 0.0
    return found


def _sample_disk(qemu: Qemu, socket: Path) -> dict[str, float]:
    """Chunks that the overlay holds, and wire bytes per chunk in a sample."""
    rounds = DiskRounds(qemu.qmp, "disk0", socket)
    compressor = StreamCompressor(3, 24, True)
    wire = sampled = 0
    try:
        with rounds.begin() as current:
            dirty = [index for index in current.chunks if index not in current.zero]
            for index in random.Random(1).sample(dirty, min(SAMPLE_CHUNKS, len(dirty))):
                wire += len(compressor.compress(current.read(index)))
                sampled += 1
    finally:
        with contextlib.suppress(HaulierError):
            rounds.abort()
    return {"chunks": len(dirty), "wire_per_chunk": wire / sampled if sampled else 0.0}


def _dirty_rate(qemu: Qemu) -> float:
    """Bits of memory dirtied per second, by QEMU's own sampling over one second."""
    try:
        qemu.qmp.execute("calc-dirty-rate", {"calc-time": 1, "sample-pages": 512})
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            found = qemu.qmp.execute("query-dirty-rate")
            if found.get("status") == "measured":
                return float(found.get("dirty-rate", 0)) * 8e6
            time.sleep(0.05)
    except GuestError:
        pass
    return 0.0


def _forecast(
    memory_bytes: int,
    memory: dict[str, float],
    disk: dict[str, float],
    missing: int,
    dirty_bps: float,
    rate_bps: float,
    rtt_s: float,
) -> dict[str, Any]:
    pages = memory_bytes // PAGE
    sent_pages = (memory["xor"] + memory["literal"]) * pages
    first = sent_pages * memory["wire_per_sent_page"] + pages * 0.05
    ratio = memory["wire_per_sent_page"] / PAGE if memory["wire_per_sent_page"] else 0.25
    disk_wire = disk["chunks"] * disk["wire_per_chunk"] + missing * MISSING_SHARE
    # Rounds form a geometric series: what gets dirty while a round is sent is the next round.
    growth = min(0.8, dirty_bps * ratio / rate_bps)
    wire = disk_wire + first / (1 - growth)
    seconds = FIXED_S + 6 * rtt_s + wire * 8 / rate_bps
    downtime = 2.5 * rtt_s + 0.06 + min(0.3, 64e3 * 8 / rate_bps)
    return {
        "bytes": {
            "total": round(wire),
            "disk": round(disk_wire),
            "memory": round(wire - disk_wire),
            "memory_pages": {kind: round(memory[kind] * pages) for kind in ("zero", "same", "block", "xor", "literal")},
            "disk_chunks": round(disk["chunks"]),
            "missing_at_target": missing,
        },
        "seconds": _interval(seconds, 0.25),
        "downtime_ms": _interval(downtime * 1000, 0.5),
        "rate_bps": rate_bps,
        "rtt_s": rtt_s,
        "dirty_bps": dirty_bps,
        "mode": {"level": 9 if rate_bps < 50e6 else 3},
    }


def _interval(value: float, spread: float) -> dict[str, float]:
    return {"low": round(value * (1 - spread), 2), "likely": round(value, 2), "high": round(value * (1 + spread), 2)}
