"""What the coordinator answers, from what it has in memory; only fingerprints are looked up in the database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from haulier.coordinator import bitmaps
from haulier.coordinator import messages as m
from haulier.coordinator.backend import Backend
from haulier.coordinator.bitmaps import Ids
from haulier.coordinator.dictionary import Dictionary
from haulier.coordinator.fleet import Fleet, SiteRecord
from haulier.coordinator.index import UNMEASURED, ChunkIndex, Holder
from haulier.coordinator.planner import Planner
from haulier.coordinator.popularity import Popularity

_SCAN: Final = 65536


class Answers:
    """Questions to a coordinator. Raises PeerError where the database cannot be reached."""

    backend: Backend
    database: str

    def __init__(self, backend: Backend, clock: Callable[[], float]) -> None:
        self.backend = backend
        self.dictionary = Dictionary(backend)
        self.index = ChunkIndex()
        self.fleet = Fleet()
        self.popularity = Popularity()
        self._clock = clock
        self._memory = threading.RLock()
        """Held for moments only, never while the database is asked."""
        self.planner = Planner(self._memory, clock)

    def lacking(self, query: m.LackingQuery) -> m.LackingAnswer:
        """Which of these chunks does the site lack."""
        ids = self.dictionary.lookup(query.fingerprints)
        with self._memory:
            mask = self.index.lacking(query.site, ids)
        return m.LackingAnswer(lacking=bitmaps.pack(mask))

    def holders(self, query: m.HoldersQuery) -> m.HoldersAnswer:
        """Which of these the site lacks, who holds which, and at what cost to the site. Counts as demand for them."""
        ids = self.dictionary.lookup(query.fingerprints)
        now = self._clock()
        with self._memory:
            links = self.fleet.links.get(query.site, {})
            found, unheld = self.index.holders(ids, links, {query.site, *query.exclude}, query.limit)
            self.popularity.bump(ids, now)
            self.planner.note(query.site, ids)
            records = {each.site: self.fleet.sites.get(each.site, SiteRecord(each.site)) for each in found}
            lacking = self.index.lacking(query.site, ids)
        sources = [_source(each, records[each.site], bitmaps.pack(each.mask)) for each in found]
        return m.HoldersAnswer(lacking=bitmaps.pack(lacking), sources=sources, unheld=unheld)

    def image_holders(self, query: m.ImageQuery) -> m.ImageAnswer:
        """The same for all chunks of a manifest, without a word about each. UnknownThing if it is not known here."""
        with self._memory:
            wanted = self.index.manifest(query.digest)
            links = self.fleet.links.get(query.site, {})
            found, unheld = self.index.holders_of(wanted, links, {query.site}, query.limit)
            records = {each.site: self.fleet.sites.get(each.site, SiteRecord(each.site)) for each in found}
            lacking = wanted.difference_cardinality(self.index.of_site(query.site))
        return m.ImageAnswer(
            chunks=len(wanted),
            lacking=lacking,
            unheld=unheld,
            sources=[_source(each, records[each.site], b"") for each in found],
        )

    def facts(self, query: m.FactsQuery) -> m.FactsAnswer:
        """What a cache has to know of each chunk: references, copies, popularity, cost of fetching it again."""
        ids = self.dictionary.lookup(query.fingerprints)
        with self._memory:
            links = self.fleet.links.get(query.site, {})
            refetch = np.full(len(ids), -1.0)
            near = sorted((links.get(site, UNMEASURED).seconds(1), site) for site in self.index.holdings)
            for seconds, site in near:
                if site != query.site:
                    refetch[(refetch < 0) & bitmaps.members(ids, self.index.holdings[site])] = seconds
                if (refetch >= 0).all():
                    break
            return m.FactsAnswer(
                references=self.index.references(ids).tolist(),
                copies=self.index.copies(ids).tolist(),
                popularity=self.popularity.of(ids, self._clock()).tolist(),
                refetch_s=refetch.tolist(),
                plan=self._planned(query.site, ids),
            )

    def _planned(self, site: str, ids: Ids) -> list[int]:
        plan = self.planner.current()
        if plan is None or site not in plan.keep:
            return []
        signs = bitmaps.members(ids, plan.keep[site]).astype(np.int64)
        return list((signs - bitmaps.members(ids, plan.over[site])).tolist())

    def plan(self) -> dict[str, Any]:
        """Which site should keep which layers, made anew."""
        plan = self.planner.make(self.index, self.fleet, self.popularity, wait=True)
        return plan.facts if plan is not None else {}

    def unreferenced(self, site: str | None, after: bytes, limit: int = m.BATCH) -> m.UnreferencedAnswer:
        """Chunks that are held (at `site`, or anywhere) and that no manifest (of the site, or of anybody) refers to."""
        with self._memory:
            free = self.index.unreferenced(site)
        found: list[bytes] = []
        while len(free) and len(found) < limit:
            page = self.backend.scan(after, _SCAN)
            if not page:
                return m.UnreferencedAnswer(fingerprints=m.join(found))
            for fp, number in page:
                after = fp
                if number in free:
                    found.append(fp)
                    if len(found) == limit:
                        break
        return m.UnreferencedAnswer(fingerprints=m.join(found), after=after.hex() if found else "")

    def images(self) -> list[dict[str, Any]]:
        with self._memory:
            return self.fleet.image_list()

    def guests(self) -> list[dict[str, Any]]:
        with self._memory:
            return self.fleet.guest_list()

    def links(self) -> list[dict[str, Any]]:
        with self._memory:
            return self.fleet.link_list()

    def sites(self) -> list[dict[str, Any]]:
        with self._memory:
            return [
                {
                    "name": record.site,
                    "control": record.control,
                    "seen": record.seen,
                    "revision": record.revision,
                    "budget": record.budget,
                    "chunks": len(self.index.of_site(record.site)),
                    "manifests": len(self.fleet.names.get(record.site, {})),
                    "guests": len(self.fleet.guests.get(record.site, {})),
                }
                for record in sorted(self.fleet.sites.values(), key=lambda each: each.site)
            ]

    def status(self) -> dict[str, Any]:
        """Everything but chunks, and how large the index is."""
        with self._memory:
            numbers = {
                "held": len(bitmaps.union(list(self.index.holdings.values()))),
                "pairs": self.index.pairs(),
                "unreferenced": len(self.index.unreferenced()),
                "manifests": len(self.index.manifests),
            }
        return {
            "time": self._clock(),
            "database": {**self.backend.facts(), "id": self.database},
            "chunks": numbers,
            "sites": self.sites(),
            "links": self.links(),
            "images": self.images(),
            "guests": self.guests(),
        }


def _source(holder: Holder, record: SiteRecord, positions: bytes) -> m.SourceAnswer:
    return m.SourceAnswer(
        site=holder.site,
        control=record.control,
        bulk=list(record.bulk),
        rate_bps=holder.link.rate_bps,
        rtt_s=holder.link.rtt_s,
        measured=holder.link.measured,
        seen=record.seen,
        held=holder.held,
        cost_s=holder.cost_s,
        positions=positions,
    )
