"""Bringing an image with all its layers to another site ahead of need: the side that has it.

What the other site has is not sent: layers, chunks, and blocks of chunks that it lacks. A push that was cut and is
begun again sends only what had not arrived.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from haulier.chunks.blocks import BlockIndex
from haulier.chunks.images import PREFIX as IMAGE_PREFIX
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.disks.transfer import DiskCounters, DiskSender
from haulier.errors import HaulierError
from haulier.guests.golden import Golden, list_goldens
from haulier.images import common, layers, snapshots
from haulier.images.messages import (
    DISK,
    GOLDEN,
    IMAGE,
    MEMORY,
    PART,
    Begin,
    End,
    Failed,
    Item,
    Kept,
    Lacks,
    Part,
    PushAccept,
    PushOffer,
    Ready,
)
from haulier.images.talk import Talk
from haulier.network import paths as networks
from haulier.session import Session, TlsConfig
from haulier.units import CHUNK

Progress = Callable[[float, str], None]
FindPaths = Callable[[Sequence[str], int], list[networks.Way]]
"""Addresses of the other site and a port there -> the paths to it."""
SLOW_BPS: Final = 40e6
TELL_S: Final = 0.3
KEEP_S: Final = 1800.0
"""How long the other site may take to make a snapshot out of what has arrived."""


class Peer(Protocol):
    """The other site's agent, as far as a push needs it."""

    def offer_push(self, offer: PushOffer) -> PushAccept: ...


@dataclass
class Load:
    """One manifest to be brought there."""

    kind: str
    name: str
    manifest: Manifest
    meta: dict[str, Any]
    near: tuple[str, ...] = ()
    """Digests of manifests that share most with it."""
    lacking: int = 0
    figures: dict[str, Any] = field(default_factory=dict)


class Push:
    """One push of image `name` to a site. `run` returns a report; raises what went wrong; may be repeated."""

    def __init__(
        self,
        store: ChunkStore,
        goldens: Path,
        tls: TlsConfig,
        name: str,
        progress: Progress,
        *,
        warm: bool = True,
        find: FindPaths = networks.find,
    ) -> None:
        self.id = "p" + secrets.token_hex(6)
        self._store = store
        self._goldens = goldens
        self._tls = tls
        self._name = name
        self._progress = progress
        self._warm = warm
        self._find = find
        self._total = 0
        self._done = 0
        self._sender: DiskSender | None = None
        self._over = threading.Event()
        self._stop: HaulierError | None = None
        self._began = 0.0

    @property
    def lease(self) -> str:
        return f"push/{self.id}"

    def run(self, peer: Peer) -> dict[str, Any]:
        """Brings it there. Raises Conflict where another image has its name there, NoRoom, PeerError, Cancelled."""
        began = time.monotonic()
        names = layers.chain(self._store, self._name)
        images = [(name, self._store.load_manifest(IMAGE_PREFIX + name)) for name in names]
        snaps = self._snapshots(images[-1][1]) if self._warm else []
        offer = PushOffer(
            push=self.id,
            secret=secrets.token_hex(32),
            images=tuple((name, manifest.digest.hex()) for name, manifest in images),
            goldens=tuple(golden.id for golden in snaps),
            bytes=sum(len(manifest.unique()) for _, manifest in images) * CHUNK,
        )
        accept = peer.offer_push(offer)
        report: dict[str, Any] = {"image": self._name, "layers": names, "items": [], "wire_bytes": 0}
        if accept.port:
            try:
                loads = self._loads(images, [g for g in snaps if g.id not in accept.goldens], set(accept.have))
                report["wire_bytes"] = self._send(loads, offer, accept)
                report["items"] = [load.figures for load in loads]
            finally:
                self._store.drop_lease(self.lease)
        return report | {"seconds": round(time.monotonic() - began, 3)}

    def _snapshots(self, image: Manifest) -> list[Golden]:
        """The golden snapshots of the image as it is now, one for each machine that it was made for."""
        found: dict[tuple[int, int, str], Golden] = {}
        for golden in list_goldens(self._goldens):
            meta = golden.meta
            if meta.image == self._name and meta.image_manifest == image.digest.hex():
                found.setdefault((meta.memory_mib, meta.vcpus, meta.accel), golden)
        return list(found.values())

    def _loads(self, images: list[tuple[str, Manifest]], snaps: list[Golden], have: set[str]) -> list[Load]:
        loads = []
        below: tuple[str, ...] = ()
        for name, manifest in images:
            if name not in have:
                meta = self._store.manifest_meta(IMAGE_PREFIX + name)
                loads.append(Load(IMAGE, name, manifest, meta, below))
            below = (manifest.digest.hex(), *below)
        for golden in snaps:
            disk = self._store.load_manifest(golden.manifest_name)
            meta = msgspec.to_builtins(golden.meta)
            loads.append(Load(GOLDEN, golden.id, disk, meta, below))
            memory = snapshots.memory_manifest(
                golden, self._store, self.lease, lambda share: self._progress(0.05 * share, "reading the snapshot")
            )
            loads.append(Load(MEMORY, golden.id, memory, meta, (disk.digest.hex(), *below)))
        return loads

    # -- the session

    def _send(self, loads: list[Load], offer: PushOffer, accept: PushAccept) -> int:
        paths = [way.address(accept.port) for way in self._find(accept.bulk, accept.port)]
        session = Session.connect(self._tls, bytes.fromhex(offer.secret), peers=paths)
        talk = Talk(session, str(self._tls.peer_name), self._check)
        watch = threading.Thread(target=self._watch, args=(session,), name="push", daemon=True)
        try:
            talk.connect()
            session.on(DISK, self._disk)
            for load in loads:
                self._name_item(talk, load)
            self._total = sum(load.lacking for load in loads)
            self._began = time.monotonic()
            watch.start()
            theirs = set(accept.digests)
            for number, load in enumerate(loads):
                self._send_item(talk, number, load, theirs)
                theirs.add(load.manifest.digest.hex())
            talk.send(End())
            session.wait_below(1, timeout=10)
            return sum(session.wire_bytes())
        except HaulierError as error:
            self._stop = self._stop or error
            if session.error is None and not session.over:
                talk.send(Failed(str(error), error.exit_code))
            raise
        finally:
            self._over.set()
            session.close(linger_s=3)

    def _name_item(self, talk: Talk, load: Load) -> None:
        data = load.manifest.encode()
        talk.send(Item(load.kind, load.name, len(data), load.meta))
        for start in range(0, len(data), PART):
            talk.send(Part(data[start : start + PART]))
        load.lacking = talk.next(Lacks).chunks

    def _send_item(self, talk: Talk, number: int, load: Load, theirs: set[str]) -> None:
        mine = common.held(self._store)
        chosen = common.choose(mine, theirs, load.near) if load.lacking else ()
        fps = common.block_list([mine[digest] for digest in chosen], load.manifest)
        index = common.block_index(self._store, fps) if load.lacking else BlockIndex()
        sender = DiskSender(
            self._store,
            load.manifest,
            common.block_space(self._store, fps),
            index,
            lambda data: talk.session.send(DISK, data),
            self.lease,
            level=9 if 0 < talk.session.rate_bps() < SLOW_BPS else 3,
        )
        self._sender = sender
        talk.send(Begin(number, chosen))
        talk.next(Ready)
        sender.offer_manifest()
        sender.commit(final=True)
        talk.next(Kept, deadline_s=KEEP_S)
        counters = sender.counters
        load.figures = {
            "kind": load.kind,
            "name": load.name,
            "bytes": len(load.manifest.unique()) * CHUNK,
            "lacking": load.lacking,
            "recipes": counters.chunks_recipe,
            "whole": counters.chunks_sent,
            "elsewhere": counters.chunks_elsewhere,
            "wire_bytes": counters.wire_bytes,
        }
        self._done += load.lacking

    def _disk(self, data: bytes) -> None:
        if self._sender is not None:
            self._sender.handle(data)

    # -- watched

    def _check(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _watch(self, session: Session) -> None:
        """Tells how far it is, and wakes the sender when the push is cancelled or the session is lost."""
        while not self._over.wait(TELL_S):
            try:
                self._tell(session)
            except HaulierError as error:
                self._stop = error
            found = self._stop or session.error
            if found is not None and self._sender is not None:
                self._sender.fail(found)

    def _tell(self, session: Session) -> None:
        sender = self._sender
        counters = sender.counters if sender is not None else DiskCounters()
        now = counters.chunks_recipe + counters.chunks_sent + counters.chunks_elsewhere
        # Beyond what the transport has taken nothing is known: the last item's chunks are counted when it is kept.
        done = min(self._total, self._done + now) if self._total else 0
        share = done / self._total if self._total else 1.0
        took = time.monotonic() - self._began
        text = f"{sum(session.wire_bytes()) / 1e6:.1f} MB sent, {session.rate_bps() / 1e6:.1f} Mbit/s"
        if share > 0.02 and share < 1:
            text += f", ETA {took / share * (1 - share):.0f} s"
        self._progress(0.05 + 0.95 * share, text)
