"""Keeps the plan of the fleet's caches, and what it is made of that nobody else remembers: which site wanted what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from haulier.coordinator import bitmaps
from haulier.coordinator.bitmaps import Bits, Ids
from haulier.coordinator.fleet import Fleet
from haulier.coordinator.index import ChunkIndex
from haulier.coordinator.inventory import GUEST
from haulier.coordinator.planning import HALF_LIFE_S, MAX_SITES, Layer, Place, Plan, layers_of, make_plan
from haulier.coordinator.popularity import Popularity
from haulier.handoff.ownership import State

PLAN_EVERY_S: Final = 300.0
PLAN_FOR_S: Final = 1800.0
"""An older plan is not followed."""
SILENT_S: Final = 900.0
"""Sites that did not report for so long are not planned for."""
MAX_WANTED: Final = 50_000
"""(site, manifest) pairs whose demand is remembered; the least are forgotten first."""


class Planner:
    """Of one coordinator. `memory` is the lock under which the index and the fleet are read."""

    def __init__(self, memory: threading.RLock, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._clock = clock
        self._planning = threading.Lock()
        self._asked: dict[str, Bits] = {}
        self._wanted: dict[tuple[str, bytes], float] = {}
        self._faded = clock()
        self._plan: Plan | None = None

    def note(self, site: str, ids: Ids) -> None:
        """`site` wants these. Under the memory's lock."""
        if site in self._asked or len(self._asked) < MAX_SITES:
            self._asked[site] = self._asked.get(site, bitmaps.empty()) | bitmaps.of_ids(ids)

    def current(self) -> Plan | None:
        """The last plan, unless it is old."""
        plan = self._plan
        return plan if plan is not None and 0 <= self._clock() - plan.made <= PLAN_FOR_S else None

    def due(self) -> bool:
        return self._plan is None or not 0 <= self._clock() - self._plan.made <= PLAN_EVERY_S

    def make(self, index: ChunkIndex, fleet: Fleet, popularity: Popularity, *, wait: bool) -> Plan | None:
        """Plans anew. None if another thread is at it, and this one is not to `wait`."""
        if not self._planning.acquire(blocking=wait):
            return None
        try:
            now = self._clock()
            with self._memory:
                layers, places, links = self._gather(index, fleet, popularity, now)
            plan = self._plan = make_plan(layers, places, links, now)
            return plan
        finally:
            self._planning.release()

    def _gather(
        self, index: ChunkIndex, fleet: Fleet, popularity: Popularity, now: float
    ) -> tuple[list[Layer], list[Place], dict[str, Any]]:
        places = [
            Place(site, record.room, index.of_site(site))
            for site, record in sorted(fleet.sites.items())
            if record.room >= 0 and now - record.seen <= SILENT_S
        ]
        names: dict[bytes, set[str]] = {}
        kinds: dict[bytes, str] = {}
        pinned: dict[str, set[bytes]] = {}
        for site in [each.site for each in places[:MAX_SITES]]:
            loose = fleet.sites[site].unpinned
            for name, entry in fleet.names.get(site, {}).items():
                names.setdefault(entry.digest, set()).add(name)
                kinds[entry.digest] = entry.layer or kinds.get(entry.digest, "")
                if entry.complete and name not in loose:
                    pinned.setdefault(site, set()).add(entry.digest)
        known = [
            (digest, tuple(sorted(each)), kinds[digest], index.manifests[digest])
            for digest, each in names.items()
            if digest in index.manifests
        ]
        layers = layers_of(known)
        self._fold(layers, now)
        coming = _coming(index, fleet)
        by_layer: dict[bytes, dict[str, float]] = {}
        for (site, digest), uses in self._wanted.items():
            by_layer.setdefault(digest, {})[site] = uses
        found = []
        for layer in layers:
            wanted = by_layer.get(layer.digest, {})
            ids = bitmaps.to_ids(layer.bits).astype("int64")
            spread = max(float(popularity.of(ids, now).mean()) - sum(wanted.values()), 0.0)
            for site, needed in coming.items():
                if both := layer.bits.intersection_cardinality(needed):
                    wanted[site] = wanted.get(site, 0.0) + both / len(layer.bits)
            found.append(replace(layer, wanted=wanted, spread=spread))
        places = [replace(each, pinned=frozenset(pinned.get(each.site, ()))) for each in places]
        return found, places, {target: dict(each) for target, each in fleet.links.items()}

    def _fold(self, layers: list[Layer], now: float) -> None:
        """What was asked for since the last plan becomes demand; older demand fades."""
        fade = 0.5 ** (max(now - self._faded, 0.0) / HALF_LIFE_S)
        self._faded = now
        there = {layer.digest for layer in layers}
        self._wanted = {key: uses * fade for key, uses in self._wanted.items() if key[1] in there}
        for site, asked in self._asked.items():
            for layer in layers:
                if both := layer.bits.intersection_cardinality(asked):
                    key = (site, layer.digest)
                    self._wanted[key] = self._wanted.get(key, 0.0) + both / len(layer.bits)
        self._asked = {}
        if len(self._wanted) > MAX_WANTED:
            first = sorted(self._wanted, key=self._wanted.__getitem__, reverse=True)[:MAX_WANTED]
            self._wanted = {key: self._wanted[key] for key in first}


def _coming(index: ChunkIndex, fleet: Fleet) -> dict[str, Bits]:
    """What sites are going to need for guests that are on their way to them."""
    found: dict[str, Bits] = {}
    for site, guests in fleet.guests.items():
        for name, (entry, _) in guests.items():
            if entry.state not in (State.RECEIVING, State.READY, State.POISED):
                continue
            for names in index.names.values():
                bits = index.manifests.get(names.get(entry.manifest) or names.get(f"{GUEST}{name}") or b"")
                if bits is not None:
                    found[site] = found.get(site, bitmaps.empty()) | bits
    return found
