"""Images in layers, as the agent serves them: committed from guests, shown, removed, pushed to other sites."""

from __future__ import annotations

import base64
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import msgspec

from haulier.agent import containers, prefetching
from haulier.agent.cache import Cache
from haulier.agent.client import Client, path_segment
from haulier.agent.core import Core
from haulier.agent.images import Images
from haulier.agent.jobs import Job, Progress
from haulier.agent.site import Site, check_name
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, HaulierError, NoRoom, PeerError, UnknownThing, UsageError
from haulier.fetch.fetching import fetch
from haulier.fetch.holders import hints_for, sources_of
from haulier.guests.golden import IMAGE_PREFIX, list_goldens
from haulier.handoff import residence
from haulier.handoff.journal import GuestRow
from haulier.handoff.ownership import MAY_RUN, State
from haulier.images import arrival, commit, layers
from haulier.images.messages import PushAccept, PushOffer
from haulier.images.push import Push
from haulier.network import paths as networks
from haulier.session import Session, TlsConfig
from haulier.units import MIB

log = logging.getLogger(__name__)

PUSH_OFFER_S: Final = 120.0
FETCH_STALL_S: Final = 20.0
LEARN_AGAIN_S: Final = 300.0
RELEASE_AGAIN_S: Final = 60.0
MAX_LEARNT: Final = 16 * MIB
MAX_ARRIVALS: Final = (2, 8)
"""Pushes that are taken at a time, of one site and in all: each may hold on to memory for its manifests."""


class CommitRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Make the image `name` out of what `guest` has written."""

    guest: str
    name: str


class PushRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Bring image `name` to the site `to`; with `warm` its golden snapshots, too."""

    name: str
    to: str
    warm: bool = True


class _PushPeer:
    """The other site's agent, as a push needs it."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def offer_push(self, offer: PushOffer) -> PushAccept:
        answer = self._client.post("/v1/peer/pushes", msgspec.to_builtins(offer), timeout=PUSH_OFFER_S)
        try:
            return msgspec.convert(answer, PushAccept)
        except msgspec.ValidationError as error:
            raise PeerError(f"{self._client.where} answered a push in a way that makes no sense: {error}") from None


def release(site: Site, row: GuestRow) -> None:
    """Lets a guest of this site run on that still stands still for a commit that is over. GuestError if not.

    Nothing else may be under way with it.
    """
    paths = residence.guest_paths(site, row.name)
    if not commit.still_mark(paths.root).exists():
        return
    if row.spec.get("container"):
        containers.release(site, row.name)
    else:
        commit.release(paths)


class Layers:
    """Which image lies on which, and which guests lie on them."""

    def __init__(self, core: Core, store: ChunkStore, images: Images, cache: Cache) -> None:
        self.core = core
        self.site = core.site
        self.store = store
        self.images = images
        self.cache = cache
        self._ask_again: dict[str, float] = {}
        self._release_again: dict[str, float] = {}
        self._arrivals: Counter[str] = Counter()
        """Pushes that are being taken, by the site that pushes."""
        self._arrivals_lock = threading.Lock()

    def adopt(self) -> None:
        """At the agent's start: lets guests run on that stood still for a commit when the agent was killed."""
        for lease in self.store.leases():
            if lease.startswith(arrival.LEASE):
                self.store.drop_lease(lease)
        self._let_run_on()

    def supervise(self) -> None:
        """Lets guests run on that a commit could not let, and asks what images consist of (`learn`)."""
        self._let_run_on()
        self.learn()

    def _let_run_on(self) -> None:
        for row in self.core.journal.guests():
            mark = commit.still_mark(self.site.guest_root(row.name))
            if row.state != State.OWNER or self.core.is_busy(row.name) or not mark.exists():
                continue
            if self._release_again.get(row.name, 0.0) > time.monotonic():
                continue
            try:
                with self.core.alone(row.name, "being let run on after a commit", brief=True):
                    state = self.core.journal.guest(row.name).state
                    # What is being handed over began that running; if it stands still now, then for the handoff.
                    if state == State.OWNER and not self.core.journal.handoffs(guest=row.name, live=True):
                        release(self.site, row)
            except (HaulierError, OSError) as error:
                log.error("guest %s may still stand still for a commit: %s", row.name, error)
                # It is busy meanwhile, and somebody may want to restart it.
                self._release_again[row.name] = time.monotonic() + RELEASE_AGAIN_S

    # -- seen ----------------------------------------------------------------------------------------------------

    def show(self, name: str) -> dict[str, Any]:
        """All about an image: its layers, the base first, what lies on it, and how large it is."""
        self._known(name)
        facts = self.facts(name)
        facts["layers"] = [
            {"name": each.name, "layer": each.layer, "bytes": each.own_bytes if number else each.bytes}
            for number, each in enumerate(layers.facts(self.store, part) for part in layers.chain(self.store, name))
        ]
        facts["golden"] = [
            {"id": g.id, "memory_mib": g.meta.memory_mib, "vcpus": g.meta.vcpus, "accel": g.meta.accel}
            for g in list_goldens(self.site.golden)
            if g.meta.image == name
        ]
        return facts

    def facts(self, name: str) -> dict[str, Any]:
        """An image's own figures, and what lies on it."""
        found: dict[str, Any] = msgspec.to_builtins(layers.facts(self.store, name))
        found["children"] = layers.children(self.store, name)
        found["guests"] = [row.name for row in self._guests_of(name)]
        return found

    def tree(self) -> list[dict[str, Any]]:
        """The images that lie on none, each with its `children` and `guests`, nested."""
        names = [name.removeprefix(IMAGE_PREFIX) for name in self.store.manifest_names(IMAGE_PREFIX)]
        known = {name: layers.facts(self.store, name) for name in names}
        return [self._branch(name, known) for name, each in known.items() if each.parent not in known]

    def _branch(self, name: str, known: dict[str, layers.ImageFacts]) -> dict[str, Any]:
        mine = known[name]
        return {
            "name": name,
            "layer": mine.layer,
            "bytes": mine.own_bytes if mine.parent in known else mine.bytes,
            "guests": [self._instance(row) for row in self._guests_of(name)],
            "children": [self._branch(child, known) for child, each in known.items() if each.parent == name],
        }

    def _instance(self, row: GuestRow) -> dict[str, Any]:
        """A guest as a leaf: what its disk has beyond its application layer, but for its overlay."""
        found: dict[str, Any] = {"name": row.name, "layer": layers.INSTANCE}
        with contextlib.suppress(HaulierError):
            spec = residence.spec_of(row)
            split = layers.split_of(self.store, spec.image, spec.golden, spec.uuid)
            found["bytes"] = split.sizes(self.store.load_manifest(row.manifest).unique())[layers.INSTANCE]
            with contextlib.suppress(OSError):
                found["overlay_bytes"] = residence.guest_paths(self.site, row.name).overlay.stat().st_blocks * 512
        return found

    def _guests_of(self, image: str) -> list[GuestRow]:
        return [row for row in self.core.journal.guests() if row.state in MAY_RUN and row.spec.get("image") == image]

    # -- learnt --------------------------------------------------------------------------------------------------

    def manifest(self, name: str) -> dict[str, Any]:
        """What an image consists of, for a site that has guests of it: its manifest in base64, and its parent."""
        check_name(name, "image")
        stored = layers.stored_as(self.store, name)
        data = self.store.load_manifest(stored).encode()
        if len(data) > MAX_LEARNT:
            raise NoRoom(f"the manifest of image {name!r} has {len(data)} bytes: push the image instead")
        return {
            "manifest": base64.b64encode(data).decode(),
            "parent": layers.parent_of(self.store.manifest_meta(stored)),
        }

    def learn(self) -> None:
        """Asks where guests came from what their images consist of, so that their layers can be told apart here.

        Called now and then: nothing waits for it, and a site that does not answer is asked again later.
        """
        needed = {}
        for row in self.core.journal.guests():
            if row.state == State.OWNER and row.spec.get("image"):
                for handoff in self.core.journal.handoffs(guest=row.name)[:1]:
                    needed[str(row.spec["image"])] = handoff.peer
        kept: set[str] = set()
        for image, site in needed.items():
            while image and image not in kept:
                kept.add(image)
                try:
                    image = layers.parent_of(self.store.manifest_meta(layers.stored_as(self.store, image)))
                except UnknownThing:
                    image = self._learn(image, site)
        for name in self.store.manifest_names(layers.LEARNT):
            image = name.removeprefix(layers.LEARNT)
            if image not in kept or IMAGE_PREFIX + image in self.store.manifest_names(IMAGE_PREFIX + image):
                self.store.drop_manifest(name)

    def _learn(self, image: str, site: str) -> str:
        """The parent of an image that `site` knows; "" where it says nothing."""
        if self._ask_again.get(image, 0.0) > time.monotonic():
            return ""
        self._ask_again[image] = time.monotonic() + LEARN_AGAIN_S
        try:
            found = self.core.peer(site).get(f"/v1/images/{path_segment(image)}/manifest")
            manifest = Manifest.decode(base64.b64decode(str(found.get("manifest", "")), validate=True))
            parent = check_name(str(found["parent"]), "image") if found.get("parent") else ""
            self.store.save_manifest(
                layers.LEARNT + image, manifest, {"parent": parent} if parent else {}, partial=True, pinned=False
            )
        except (HaulierError, ValueError) as error:
            log.info("what image %s consists of is not known: %s", image, error)
            return ""
        return parent

    # -- committed and removed -----------------------------------------------------------------------------------

    def commit(self, request: CommitRequest) -> Job:
        """Makes an application layer out of a guest of this site, which may run."""
        check_name(request.name, "image")
        # Its rounds over the disk and a commit's would take each other for leftovers.
        prefetching.end_here(self.core, check_name(request.guest, "guest"))
        row = self._mine(request.guest)
        self._check_new(request.name)
        parent = str(row.spec.get("image", ""))
        if IMAGE_PREFIX + parent not in self.store.manifest_names(IMAGE_PREFIX + parent):
            raise UnknownThing(
                f"image {parent!r}, which guest {row.name!r} was made from, is not at this site: push it here first"
            )

        def work(progress: Progress) -> dict[str, Any]:
            with (
                self.core.alone(row.name, f"being committed as image {request.name}"),
                self.core.alone(f"image {request.name}", "being committed"),
            ):
                self._check_new(request.name)
                return self._commit(self._mine(request.guest), request.name, parent, progress)

        return self.core.jobs.start("commit", request.name, work)

    def _commit(self, row: GuestRow, name: str, parent: str, progress: Progress) -> dict[str, Any]:
        spec = residence.spec_of(row)
        if spec.container is not None:
            with self.store.sibling() as own:
                still_s = containers.commit(self.site, own, spec, name, progress)
            return self.show(name) | {"still_ms": round(still_s * 1000, 1)}
        paths = residence.guest_paths(self.site, row.name)
        below = self.store.load_manifest(row.manifest)
        if not self.store.is_complete(row.manifest) and self.store.missing(below.unique()):
            raise Conflict(
                f"some of the disk of guest {row.name!r} is at another site still: "
                f"'haulier fill {row.name}' brings it here, commit it then"
            )
        release(self.site, row)
        # Of its own, so that a commit that fails holds on to nothing.
        with self.store.sibling() as own:
            qemu = residence.adopt(self.site, row.name, worker=True)
            if qemu is None:
                overlay = commit.read_stopped(paths.overlay, below, own, progress)
            else:
                try:
                    overlay = commit.read_running(qemu, own, progress)
                finally:
                    qemu.close()
            progress(0.95, "keeping the layer")
            commit.save_layer(own, name, parent, below, overlay, guest=row.name, uuid=row.spec.get("uuid", ""))
        return self.show(name) | {"still_ms": round(overlay.still_s * 1000, 1)}

    def remove(self, name: str) -> dict[str, Any]:
        """Removes an image that nothing needs, with its golden snapshots. Conflict where something does."""
        self._known(name)
        lying = layers.children(self.store, name)
        if lying:
            raise Conflict(f"image {lying[0]!r} is a layer on image {name!r}: remove it first")
        guests = self._guests_of(name)
        if guests:
            raise Conflict(f"guest {guests[0].name!r} was made from image {name!r}: remove the guest first")
        return self.images.remove(name)

    # -- pushed --------------------------------------------------------------------------------------------------

    def push(self, request: PushRequest) -> Job:
        """Brings an image, its layers and golden snapshots to another site; its job may be cancelled and repeated."""
        self._known(request.name)
        peer = self.core.other_site(request.to)
        client = self.core.peer(peer.name)

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone(f"push of {request.name} to {peer.name}", "under way"), self.store.sibling() as own:
                find = partial(networks.find, rules=self.site.paths, explore=self.site.explores, uplinks=False)
                tls = self._tls(peer.name)
                pushing = Push(own, self.site.golden, tls, request.name, progress, warm=request.warm, find=find)
                return pushing.run(_PushPeer(client)) | {"source": self.site.name, "target": peer.name}

        return self.core.jobs.start("push", request.name, work)

    def take(self, offer: PushOffer, caller: str) -> PushAccept:
        """Another site's push: says what is here, and listens for the rest."""
        check_name(offer.push, "push")
        if len(offer.secret) != 64 or set(offer.secret) - set("0123456789abcdef"):
            raise UsageError("the offer's secret is not 64 hexadecimal digits: run the same haulier at both sites")
        accept = arrival.look(self.store, self.site.golden, offer)
        if arrival.complete(offer, accept):
            return accept
        with contextlib.ExitStack() as taking:
            taking.enter_context(self._arriving(caller))
            session = Session.listen(self._tls(caller), bytes.fromhex(offer.secret), bind=self.site.listening())
            taking.callback(session.close, linger_s=3)
            ends = taking.pop_all()

        def work(progress: Progress) -> dict[str, Any]:
            with ends, self.store.sibling() as own:
                arrival.Arrival(
                    own,
                    self.site.golden,
                    session,
                    caller,
                    offer.push,
                    lambda text: progress(0.5, text),
                    partial(self._fetch, caller),
                    self.cache,
                ).run()
            return {"images": [name for name, _ in offer.images]}

        try:
            self.core.jobs.start("arrival", offer.images[-1][0], work)
        except BaseException:
            ends.close()
            raise
        return msgspec.structs.replace(accept, port=session.port, bulk=self.site.reachable())

    @contextlib.contextmanager
    def _arriving(self, site: str) -> Iterator[None]:
        """Counts a push that is taken from `site`. NoRoom if too many are."""
        with self._arrivals_lock:
            of_one, in_all = MAX_ARRIVALS
            if self._arrivals[site] >= of_one or self._arrivals.total() >= in_all:
                raise NoRoom(
                    f"site {self.site.name!r} takes {of_one} pushes of a site at a time, and {in_all} in all: "
                    "try again when one has ended"
                )
            self._arrivals[site] += 1
        try:
            yield
        finally:
            with self._arrivals_lock:
                self._arrivals[site] -= 1

    def _fetch(
        self,
        pusher: str,
        store: ChunkStore,
        lacking: list[bytes],
        lease: str,
        enough: Callable[[], bool],
        came: Callable[[bytes], None],
    ) -> None:
        """Brings chunks of a push from sites other than the one that pushes."""
        sources = sources_of(self.site, exclude={pusher})
        if sources:
            fetch(
                lacking,
                sources,
                store,
                lease=lease,
                cancelled=enough,
                hints=hints_for(self.site, lacking),
                on_kept=came,
                stall_s=FETCH_STALL_S,
            )

    def _tls(self, peer: str) -> TlsConfig:
        return TlsConfig(self.site.certificate, self.site.key, self.site.ca_certificate, peer)

    # -- inside

    def _mine(self, guest: str) -> GuestRow:
        row = self.core.journal.guest(check_name(guest, "guest"))
        if row.state in (State.ABSENT, State.REFUSED):
            raise UnknownThing(f"no guest {guest!r} at this site: 'haulier guest list' shows those there are")
        if row.state == State.AWAY:
            raise Conflict(f"guest {guest!r} is at site {row.owner!r}: commit it there")
        # It may be this site's still: its worker looks first whether it can be handed over, and says so later.
        for handoff in self.core.journal.handoffs(guest=guest, live=True):
            raise Conflict(
                f"guest {guest!r} is being handed over (handoff {handoff.id}): commit it when that has ended"
            )
        if row.state != State.OWNER or row.wanted not in ("running", "stopped"):
            raise Conflict(f"guest {guest!r} is {row.wanted or row.state}: wait until that has ended")
        return row

    def _check_new(self, name: str) -> None:
        if IMAGE_PREFIX + name in self.store.manifest_names(IMAGE_PREFIX + name):
            raise Conflict(f"there is an image {name!r} already: remove it first, or choose another name")

    def _known(self, name: str) -> None:
        check_name(name, "image")
        if IMAGE_PREFIX + name not in self.store.manifest_names(IMAGE_PREFIX + name):
            raise UnknownThing(f"no image {name!r} at this site: 'haulier image list' shows those there are")
