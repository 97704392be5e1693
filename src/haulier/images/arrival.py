"""An image that another site brings: the side that takes it.

Nothing is believed: manifests are decoded with bounds, each chunk is fingerprinted, a snapshot has to be what its id
says. What has arrived stays under `incoming/push-...` when a push is cut, so that the next one goes on from there; a
collection of garbage forgets it.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from haulier.chunks.images import PREFIX as IMAGE_PREFIX
from haulier.chunks.manifest import Manifest, peek
from haulier.chunks.store import ChunkStore
from haulier.disks.transfer import DiskReceiver
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, UnknownThing
from haulier.guests.golden import MANIFEST_PREFIX as GOLDEN_PREFIX
from haulier.guests.model import check_name
from haulier.images import common, layers, snapshots
from haulier.images.messages import (
    DISK,
    GOLDEN,
    IMAGE,
    KINDS,
    MAX_COMMON,
    MAX_ITEMS,
    MAX_MANIFEST,
    MEMORY,
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
from haulier.session import Session
from haulier.units import CHUNK, MAX_DISK, MIB

Elsewhere = Callable[[ChunkStore, list[bytes], str, Callable[[], bool], Callable[[bytes], None]], None]
"""Fetches chunks from other sites into a store, under a lease, until that is enough; tells of each that came."""
ENOUGH_S: Final = 10.0
MAX_DISKS: Final = 4 * MAX_DISK
"""Of all layers and memories of one push: their manifests take 2 GiB of memory."""
COMMIT_BYTES: Final = 8 * MIB
"""Of messages, after which what has come is made durable, so that a push that dies need not bring it again."""
SLACK: Final = 64 * MIB
LEASE: Final = "push/"
INCOMING: Final = "incoming/push-"


class Room(Protocol):
    """Where there is room for what comes: `disk` more bytes in all, `chunks` of them in the store."""

    def check_room(self, disk: int, chunks: int) -> None:
        """NoRoom if there is none, whatever the cache gives up. Changes nothing."""

    def make_room(self, disk: int, chunks: int) -> None:
        """As `check_room`; then the cache gives up what is in the way."""


class DiskRoom:
    """A store without a cache: what is free on its disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check_room(self, disk: int, chunks: int) -> None:
        free = shutil.disk_usage(self._path).free
        if free < disk:
            raise NoRoom(
                f"{self._path} has {free // MIB} MiB free, {disk // MIB} MiB are needed: "
                "run 'haulier gc' there, or give it more"
            )

    def make_room(self, disk: int, chunks: int) -> None:
        self.check_room(disk, chunks)


@dataclass
class Expected:
    """An item that was named."""

    kind: str
    name: str
    manifest: Manifest
    meta: dict[str, Any]

    @property
    def incoming(self) -> str:
        return f"{INCOMING}{self.manifest.digest.hex()[:32]}"


def look(store: ChunkStore, goldens: Path, offer: PushOffer) -> PushAccept:
    """What is here already of an offer; `port` is still 0. Conflict where another image has a name of it."""
    if not 0 < len(offer.images) <= MAX_ITEMS or len(offer.goldens) > MAX_ITEMS:
        raise Corrupt(f"a push of {len(offer.images)} images; at most {MAX_ITEMS} layers are taken")
    have = []
    for name, digest in offer.images:
        check_name(name, "image")
        if IMAGE_PREFIX + name not in store.manifest_names(IMAGE_PREFIX + name):
            continue
        manifest = store.load_manifest(IMAGE_PREFIX + name)
        if manifest.digest.hex() != digest:
            raise Conflict(
                f"there is another image {name!r} there (digest {manifest.digest.hex()[:12]}, not {digest[:12]}): "
                "remove it there, or give this one another name"
            )
        if not store.missing(manifest.unique()):
            have.append(name)
    snaps = tuple(name for name in offer.goldens if _is_id(name) and (goldens / name / "meta.json").exists())
    digests = tuple(common.held(store))[:1024]
    return PushAccept(port=0, have=tuple(have), goldens=snaps, digests=digests)


def complete(offer: PushOffer, accept: PushAccept) -> bool:
    """There is nothing to bring."""
    return len(accept.have) == len(offer.images) and len(accept.goldens) == len(offer.goldens)


def _is_id(name: str) -> bool:
    return len(name) == 64 and not set(name) - set("0123456789abcdef")


class Arrival:
    """Takes one push. `run` returns when the other side says it was all."""

    def __init__(
        self,
        store: ChunkStore,
        goldens: Path,
        session: Session,
        peer: str,
        push: str,
        progress: Callable[[str], None],
        elsewhere: Elsewhere | None = None,
        room: Room | None = None,
    ) -> None:
        self._room = room or DiskRoom(store.path)
        self._elsewhere = elsewhere
        self._store = store
        self._goldens = goldens
        self._progress = progress
        self._lease = LEASE + push
        self._session = session
        self._talk = Talk(session, peer, lambda: None)
        self._items: list[Expected] = []
        self._named: set[bytes] = set()
        self._chunks = 0
        """Bytes of chunks that are to come, each once."""
        self._disks = 0
        """Bytes of the disks that are pushed."""
        self._files = 0
        """Bytes of what is made out of them."""
        self._fresh: list[str] = []
        """Names of incoming manifests that were not here before this push."""
        self._begun = False
        self._receiver: DiskReceiver | None = None
        self._uncommitted = 0
        self._asking: threading.Thread | None = None

    def run(self) -> None:
        """Raises what went wrong; the other side has been told, and what has arrived is kept for the next time."""
        try:
            self._talk.connect()
            self._store.add_lease(self._lease)
            self._session.on(DISK, self._disk)
            while True:
                message = self._talk.next(Item, Begin, End)
                if isinstance(message, Item):
                    self._expect(message)
                elif isinstance(message, Begin):
                    self._take(message)
                else:
                    return
        except HaulierError as error:
            if not self._begun:
                self._forget()
            if self._session.error is None and not self._session.over:
                self._talk.send(Failed(str(error), error.exit_code))
            raise
        finally:
            self._store.commit()
            self._store.drop_lease(self._lease)

    def _expect(self, item: Item) -> None:
        if item.kind not in KINDS or len(self._items) == MAX_ITEMS or not 0 < item.length <= MAX_MANIFEST:
            raise Corrupt(f"a push of a {item.kind[:20]!r} with {item.length} bytes is not taken")
        if item.kind == IMAGE:
            check_name(item.name, "image")
            if parent := layers.parent_of(item.meta):
                check_name(parent, "image")
        else:
            snapshots.read_meta(item.meta, item.name)
        data = bytearray()
        while len(data) < item.length:
            data += self._talk.next(Part).data
        # A manifest of zeros is short, and takes its disk's share of memory once it is decoded.
        self._disks += peek(bytes(data))[0]
        if self._disks > MAX_DISKS:
            raise NoRoom(f"a push of disks of more than {MAX_DISKS >> 30} GiB together: push the layers one by one")
        expected = Expected(item.kind, item.name, Manifest.decode(bytes(data)), item.meta)
        if not self._store.manifest_names(expected.incoming):
            self._fresh.append(expected.incoming)
        # From here on what is here of it is not evicted, and what comes is kept, also if this push is cut.
        self._store.save_manifest(expected.incoming, expected.manifest, partial=True)
        missing = set(self._store.missing(expected.manifest.unique(), self._lease))
        # Layers share most of their chunks: each counts once.
        lacking = len(missing - self._named)
        self._named |= missing
        self._chunks += lacking * CHUNK
        if item.kind == MEMORY:
            self._files += len(expected.manifest.unique()) * CHUNK
        self._room.check_room(self._chunks + self._files + SLACK, self._chunks)
        self._items.append(expected)
        self._talk.send(Lacks(lacking))

    def _forget(self) -> None:
        """Nothing was sent: what was only named here must not keep the cache from giving it up."""
        for name in self._fresh:
            with contextlib.suppress(UnknownThing):
                self._store.drop_manifest(name)

    def _take(self, begin: Begin) -> None:
        if not 0 <= begin.number < len(self._items) or len(begin.common) > MAX_COMMON:
            raise Corrupt(f"item {begin.number} of a push of {len(self._items)}")
        item = self._items[begin.number]
        if not self._begun:
            # all has been named by now: nothing is evicted for a push that is refused
            self._room.make_room(self._chunks + self._files + SLACK, self._chunks)
            self._begun = True
        self._progress(f"{item.kind} {item.name[:12]}")
        enough = threading.Event()
        here = common.held(self._store)
        unknown = [digest for digest in begin.common if digest not in here]
        if unknown:
            raise UnknownThing(f"manifest {unknown[0][:12]} is not here any more: push again")
        fps = common.block_list([here[digest] for digest in begin.common], item.manifest)
        self._receiver = DiskReceiver(
            self._store,
            item.manifest,
            common.block_space(self._store, fps),
            lambda data: self._session.send(DISK, data, urgent=True),
            self._lease,
            manifest_name=item.incoming,
            on_lacking=lambda lacking: self._ask_others(lacking, enough),
        )
        self._talk.send(Ready())
        try:
            while not self._receiver.wait_final(0.2):
                if self._session.error is not None:
                    raise self._session.error
                if self._session.over:
                    raise Conflict("the push was ended by the other site; what came is kept for the next one")
        finally:
            enough.set()
            if self._asking is not None:
                self._asking.join(ENOUGH_S)
        self._keep(item)
        self._talk.send(Kept())

    def _ask_others(self, lacking: list[bytes], enough: threading.Event) -> None:
        """Other sites may hold what is lacking: they are asked from the end, while one sends from the beginning."""
        ask, receiver = self._elsewhere, self._receiver
        if ask is None or receiver is None:
            return

        def work() -> None:
            with contextlib.suppress(HaulierError):
                ask(self._store, lacking[::-1], self._lease, enough.is_set, lambda fp: receiver.came([fp]))

        self._asking = threading.Thread(target=work, name="elsewhere", daemon=True)
        self._asking.start()

    def _disk(self, data: bytes) -> None:
        receiver = self._receiver
        try:
            if receiver is None:
                raise Corrupt("disk messages came before their manifest: run the same haulier at both sites")
            receiver.handle(data)
            self._uncommitted += len(data)
            if self._uncommitted >= COMMIT_BYTES and not receiver.final:
                self._uncommitted = 0
                self._store.commit()
        except HaulierError as error:
            self._talk.fail(error)

    def _keep(self, item: Expected) -> None:
        """Gives it its lasting name."""
        store = self._store
        if item.kind == IMAGE:
            name = IMAGE_PREFIX + item.name
            if name in store.manifest_names(name) and store.load_manifest(name).digest != item.manifest.digest:
                raise Conflict(f"another image {item.name!r} was made here meanwhile: remove one of them")
            store.save_manifest(name, item.manifest, item.meta)
        elif item.kind == GOLDEN:
            store.save_manifest(GOLDEN_PREFIX + item.name, item.manifest, {"image": str(item.meta.get("image", ""))})
        elif item.kind == MEMORY:
            self._progress(f"making snapshot {item.name[:12]}")
            snapshots.keep_snapshot(store, self._goldens, snapshots.read_meta(item.meta, item.name), item.manifest)
        with contextlib.suppress(UnknownThing):
            store.drop_manifest(item.incoming)
