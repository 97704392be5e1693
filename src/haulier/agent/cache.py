"""The site's cache: chunks that nothing here refers to any more, kept while the budget has room for them.

What the site's guests, handoffs under way, what was left behind for others, and pinned images refer to is never
evicted. The rest is the policy's, which is named in site.toml (`cache_policy`, `store_budget`) and may be changed at
any time. Sizes are bytes of pack that records take.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Collection
from typing import Any, Final

import msgspec

from haulier.agent.core import Core
from haulier.agent.prices import Prices
from haulier.agent.site import Site, check_name
from haulier.chunks import books
from haulier.chunks.collect import Cached, GcReport, Room
from haulier.chunks.store import ChunkStore
from haulier.coordinator.inventory import LOW_DISK
from haulier.errors import Conflict, Corrupt, HaulierError, NoRoom, UnknownThing, UsageError
from haulier.guests.golden import IMAGE_PREFIX, MANIFEST_PREFIX, list_goldens
from haulier.policy.choice import Choice, choose
from haulier.policy.model import COORDINATED_NAME, DEFAULT_NAME, GDSF_NAME, S3FIFO_NAME, Item, check_policy
from haulier.units import MIB

log = logging.getLogger(__name__)

SLACK: Final = 0.02
"""Of the budget: evicted beyond what is needed, so that it need not be done again at once."""
REST: Final = 20.0
"""Times as long as upkeep took, until it is done again."""
UNUSED_S: Final = 30 * 86_400.0
"""What was not used for so long is not worth its room to `gc`, even when the budget has some left."""
MAX_BUDGET: Final = 1 << 60


class Change(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What to set; None leaves it. `budget` in bytes, 0 for no limit."""

    policy: str | None = None
    budget: int | None = None


class PinRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pinned: bool
    force: bool = False


class Cache:
    """One agent's. Blocking; any thread may call."""

    def __init__(self, core: Core, store: ChunkStore) -> None:
        self.core = core
        self.store = store
        self.policy = core.site.cache_policy or DEFAULT_NAME
        self.budget = core.site.store_budget
        self.prices = Prices(core)
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._monotonic = time.monotonic
        self._rest_until = float("-inf")
        self.evicted_chunks = 0
        self.evicted_bytes = 0

    # -- settings

    def facts(self) -> dict[str, Any]:
        """What `haulier cache show` shows. `over` is what the budget lacks even with nothing cached."""
        room = self.store.room()
        referenced = room.used - room.cached
        return {
            "site": self.core.site.name,
            "policy": self.policy,
            "budget": self.budget,
            "used": room.used,
            "referenced": referenced,
            "cached": room.cached,
            "chunks": room.chunks,
            "cached_chunks": room.cached_chunks,
            "over": max(0, referenced - self.budget) if self.budget else 0,
            "evicted_chunks": self.evicted_chunks,
            "evicted_bytes": self.evicted_bytes,
            "images": self._images(),
        }

    def _images(self) -> list[dict[str, Any]]:
        found = []
        for name in self.store.manifest_names(IMAGE_PREFIX):
            unique = self.store.load_manifest(name).unique()
            here = len(unique) - len(self.store.missing(unique))
            pinned = self.store.is_pinned(name)
            found.append(
                {"name": name.removeprefix(IMAGE_PREFIX), "pinned": pinned, "chunks": len(unique), "here": here}
            )
        return found

    def change(self, change: Change) -> dict[str, Any]:
        """Sets the policy, the budget or both, in site.toml too; evicts at once where the new budget asks for it."""
        if change.policy is not None:
            check_policy(change.policy)
        if change.budget is not None and not 0 <= change.budget <= MAX_BUDGET:
            raise UsageError(f"a budget of {change.budget} bytes: give 0 (no limit) to {MAX_BUDGET}")
        with self._lock:
            policy = self.policy if change.policy is None else change.policy
            budget = self.budget if change.budget is None else change.budget
            Site.load(self.core.site.root).set(cache_policy=policy, store_budget=budget)
            self.policy, self.budget, self._seen = policy, budget, None
        self.upkeep()
        return self.facts()

    def pin(self, image: str, request: PinRequest) -> dict[str, Any]:
        """Keeps all of an image, or lets the policy rule over it.

        Conflict if no other site is known to keep all of it, unless forced: evicted here it would be gone.
        """
        check_name(image, "image")
        name = IMAGE_PREFIX + image
        if name not in self.store.manifest_names(name):
            raise UnknownThing(f"no image {image!r} at this site: 'haulier image list' shows those there are")
        with self.core.alone(f"image {image}", "being pinned"):
            if request.pinned or request.force or not self.store.is_pinned(name):
                self._pin(image, request.pinned)
            else:
                self._let_go(image, self.store.load_manifest(name).unique())
        return next(found for found in self._images() if found["name"] == image)

    def _pin(self, image: str, pinned: bool) -> None:
        for each in (IMAGE_PREFIX + image, *self._goldens(image)):
            self.store.pin_manifest(each, pinned)

    def _let_go(self, image: str, unique: Collection[bytes]) -> None:
        self._check_elsewhere(image, unique)
        self._pin(image, False)
        try:
            # Two sites that let go of an image at once both saw that the other has it: then neither lets go.
            self._check_elsewhere(image, unique)
        except Conflict:
            self._pin(image, True)
            raise

    def _goldens(self, image: str) -> list[str]:
        """Manifests of the disks of its golden snapshots."""
        there = self.store.manifest_names(MANIFEST_PREFIX)
        mine = [g.manifest_name for g in list_goldens(self.core.site.golden) if g.meta.image == image]
        return [name for name in mine if name in there]

    def _check_elsewhere(self, image: str, unique: Collection[bytes]) -> None:
        fps = list(unique)
        for row in self.core.journal.sites():
            if row.name == self.core.site.name:
                continue
            try:
                if not self.core.peer(row.name).lacking(fps, kept=True):
                    return
            except HaulierError:
                continue
        raise Conflict(
            f"no other site has all of image {image!r} pinned: what the cache evicts of it would be gone; "
            "push it to another site and pin it there first, or use --force"
        )

    # -- evicting

    def upkeep(self) -> GcReport | None:
        """Writes down uses, and evicts what the budget, or a disk that is nearly full, has no room for."""
        self.store.flush_uses()
        low = max(0, LOW_DISK - shutil.disk_usage(self.core.site.root).free)
        with self.store.index.read() as db:
            tails = int(db.execute("SELECT coalesce(sum(tail), 0) FROM packs").fetchone()[0])
        if not low and (not self.budget or (tails, self.budget) == self._seen):
            return None
        room = self.store.room()
        over = max(0, room.used - self.budget) if self.budget else 0
        if not over and not low:
            self._seen = (tails, self.budget)  # nothing has come since, so nothing needs to be added up again
            return None
        if not room.cached:
            return None
        return self.evict(max(over, low))

    def tick(self) -> None:
        """What the agent's loop calls."""
        began = self._monotonic()
        if began < self._rest_until:
            return
        self.upkeep()
        # adding up a million chunks takes a while; it must not become the agent's main occupation
        now = self._monotonic()
        self._rest_until = now + REST * (now - began)

    def room(self) -> Room:
        """What the chunks take; `cached` of it could be evicted."""
        return self.store.room()

    def against(self, disk: int, chunks: int) -> list[str]:
        """What stands against `disk` bytes more on the disk, `chunks` of them in the store. What is cached counts as
        free."""
        root = self.core.site.root
        free = shutil.disk_usage(root).free
        if free >= disk and not self.budget:
            return []
        room, found = self.room(), []
        if free + room.cached < disk:
            found.append(
                f"{root} has {free // MIB} MiB free and {room.cached // MIB} MiB in the cache, up to "
                f"{disk // MIB} MiB are needed (remove guests or images there, or enlarge the disk)"
            )
        if self.budget and room.used - room.cached + chunks > self.budget:
            left = max(0, self.budget - room.used + room.cached)
            found.append(
                f"its store's budget of {self.budget // MIB} MiB leaves {left // MIB} MiB beside what is in use, up "
                f"to {chunks // MIB} MiB are needed ('haulier cache budget' there raises it)"
            )
        return found

    def check_room(self, disk: int, chunks: int) -> None:
        """NoRoom, with all that `against` finds."""
        if against := self.against(disk, chunks):
            raise NoRoom(f"site {self.core.site.name!r} has no room: {'; '.join(against)}")

    def make_room(self, disk: int, chunks: int) -> None:
        """Evicts what is in the way of so much. NoRoom, and nothing is evicted, where that would not do."""
        self.check_room(disk, chunks)
        need = disk - shutil.disk_usage(self.core.site.root).free
        if self.budget:
            need = max(need, self.room().used + chunks - self.budget)
        if need > 0:
            self.evict(need)

    def evict(self, need: int, spare: Collection[bytes] = ()) -> GcReport | None:
        """Evicts `need` bytes and a little more, if there are, but nothing of `spare`. None when another is at it."""
        slack = int(self.budget * SLACK)
        kept = frozenset(spare)

        def victims(found: list[Cached]) -> set[bytes]:
            choice = self._choose(found, need + slack, kept)
            self._remember(found, choice)
            return set(choice.victims)  # type: ignore[arg-type]

        try:
            report = self.store.gc(choose=victims)
        except Conflict:
            return None
        self._count(report)
        if report.chunks:
            log.info("evicted %d chunks, %d MiB, by %s", report.chunks, report.bytes // MIB, self.policy)
        return report

    def collect(self, dry_run: bool, everything: bool, leases: list[str], manifests: list[str]) -> GcReport:
        """What `gc` takes of the cache: what was not used for a month, and with a budget what is beyond it.

        Without one: what no manifest names, pinned or not (of disks that moved away, of images that were let go).
        """

        def victims(found: list[Cached]) -> set[bytes]:
            if everything:
                return {row.fp for row in found}
            old = {row.fp for row in found if row.used < time.time() - UNUSED_S}
            if not self.budget:
                named = self._named()
                return old | {row.fp for row in found if row.fp not in named}
            over = used() - self.budget - sum(row.room for row in found if row.fp in old)
            choice = self._choose([row for row in found if row.fp not in old], over, frozenset())
            if not dry_run:
                self._remember(found, choice)
            return old | set(choice.victims)  # type: ignore[arg-type]

        def used() -> int:
            return self.store.room().used

        self.store.flush_uses()
        report = self.store.gc(dry_run, leases=leases, manifests=manifests, choose=victims)
        if not dry_run:
            self._count(report)
        return report

    def _named(self) -> set[bytes]:
        """Chunks of unpinned manifests."""
        found: set[bytes] = set()
        for name in self.store.manifest_names():
            with contextlib.suppress(UnknownThing, Corrupt):
                if not self.store.is_pinned(name):
                    found |= self.store.load_manifest(name).unique()
        return found

    def _count(self, report: GcReport) -> None:
        with self._lock:
            self.evicted_chunks += report.chunks
            self.evicted_bytes += report.bytes

    def _choose(self, found: list[Cached], need: int, spare: frozenset[bytes]) -> Choice:
        if need <= 0:
            return Choice(memory=books.read_memory(self.store))
        policy = self.policy
        back = books.returned(self.store, found) if policy == S3FIFO_NAME else set()
        items = [_item(row, policy, row.fp in back) for row in found]
        facts = self.prices.of([row.fp for row in found]) if policy in (GDSF_NAME, COORDINATED_NAME) else None
        capacity = sum(row.room for row in found) - need
        return choose(
            policy,
            items,
            need,
            capacity=capacity,
            now=time.time(),
            memory=books.read_memory(self.store),
            facts=facts.__getitem__ if facts is not None else None,  # type: ignore[arg-type]
            sites=len(self.core.journal.sites()),
            spare=spare.__contains__,
        )

    def _remember(self, found: list[Cached], choice: Choice) -> None:
        gone: list[bytes] = choice.victims  # type: ignore[assignment]
        books.write_memory(self.store, choice.memory, choice.moved, gone, len(found) - len(gone))  # type: ignore[arg-type]


def _item(row: Cached, policy: str, back: bool) -> Item:
    queued = row.queue > 0
    hits = row.hits - (row.queue - 1) if policy == S3FIFO_NAME and queued else row.hits
    return Item(row.fp, row.room, 0.0, max(hits, 0), row.came, row.used, queued or back)
