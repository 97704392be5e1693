"""The coordinator itself: takes reports, answers questions. Blocking; usable from any thread.

Everything is written through to the database before it is believed; sites' bitmaps and the small tables are kept in
memory as well. A report that failed is simply sent again. Times are Unix seconds, from the clock passed in.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from haulier.chunks.manifest import Manifest
from haulier.compress import zstd
from haulier.coordinator import bitmaps, fleet
from haulier.coordinator import messages as m
from haulier.coordinator.answers import Answers
from haulier.coordinator.backend import Backend, Rows
from haulier.coordinator.bitmaps import Bits
from haulier.coordinator.fleet import Fleet, SiteRecord
from haulier.coordinator.index import ChunkIndex, Link
from haulier.coordinator.popularity import Popularity
from haulier.coordinator.uploads import Uploads
from haulier.errors import Conflict, Corrupt
from haulier.units import FINGERPRINT

SAVE_POPULARITY_S: Final = 300.0
_SCAN: Final = 65536
_SEEN_EVERY_S: Final = 10.0
"""How exact the time of a site's last report is after a restart."""


class Coordinator(Answers):
    """See the module. Raises PeerError where the database cannot be reached; nothing has changed then."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.time) -> None:
        super().__init__(backend, clock)
        self._writing = threading.RLock()
        """Held from reading what is, to having written what will be."""
        self._uploads = Uploads()
        self._popularity_saved = clock()
        self.database = backend.run(self._load)

    def _load(self, rows: Rows) -> str:
        now = self._clock()
        index, known, popularity = ChunkIndex(), Fleet(), Popularity()
        known.load(rows)
        pieces: dict[str, list[Bits]] = {}
        for site, bits in rows.all("SELECT site, bits FROM holdings"):
            pieces.setdefault(site, []).append(bitmaps.load(bits, f"holdings of site {site!r}"))
        index.holdings = {site: bitmaps.union(each) for site, each in pieces.items()}
        for digest, bits in rows.all("SELECT digest, bits FROM manifests"):
            index.manifests[bytes(digest)] = bitmaps.load(bits, f"manifest {bytes(digest)[:6].hex()}")
        index.names = {site: {n: e.digest for n, e in names.items()} for site, names in known.names.items()}
        for number, saved, counts in rows.all("SELECT slice, saved, counts FROM popularity"):
            try:
                popularity.restore(number, zstd.decompress(counts), now - saved, now)
            except zstd.ZstdError:
                raise Corrupt(f"popularity slice {number} in {self.backend.where} is damaged: delete it") from None
        found = rows.all("SELECT value FROM meta WHERE name='database'")
        name = str(found[0][0]) if found else secrets.token_hex(8)
        if not found:
            rows.do("INSERT INTO meta VALUES ('database', ?)", (name,))
        self.index, self.fleet, self.popularity = index, known, popularity
        return name

    def close(self) -> None:
        """Saves what is not written through; the backend stays open."""
        self.save_popularity()

    # -- reports of one site about itself

    def hello(self, site: str, report: m.HelloReport) -> m.HelloAnswer:
        """A site says that it is there; it may go on with what it said before if `database` is the same."""
        with self._writing:
            old = self.fleet.sites.get(site, SiteRecord(site))
            new = msgspec.structs.replace(
                old,
                control=report.control,
                bulk=tuple(report.bulk),
                budget=report.budget,
                room=report.room,
                unpinned=frozenset(report.unpinned),
                seen=self._clock(),
            )
            if msgspec.structs.replace(new, seen=old.seen) != old or new.seen - old.seen > _SEEN_EVERY_S:
                self.backend.run(lambda rows: fleet.put_site(rows, new))
                with self._memory:
                    self.fleet.sites[site] = new
        self._now_and_then()
        return m.HelloAnswer(database=self.database, revision=new.revision)

    def holdings(self, site: str, report: m.HoldingsReport) -> m.HoldingsAnswer:
        """A site says which chunks it has now, or no longer."""
        removed = bitmaps.of_ids(self.dictionary.lookup(report.removed))
        added = bitmaps.of_ids(self.dictionary.intern(report.added))
        with self._writing:
            record = self.fleet.sites.get(site, SiteRecord(site))
            whole = [self.index.manifests.get(digest) for digest in report.complete]
            if (report.base != record.revision and not report.replace) or None in whole:
                return m.HoldingsAnswer(revision=record.revision, again=True)
            before = self.index.of_site(site)
            after = self.index.changed(site, bitmaps.union([added, *whole]), removed, report.replace)
            record = msgspec.structs.replace(record, revision=record.revision + 1, seen=self._clock())

            def write(rows: Rows) -> None:
                fleet.put_site(rows, record)
                numbers = bitmaps.slices(before ^ after)
                parts = [(number, bitmaps.one_slice(after, number)) for number in numbers]
                rows.many(
                    "INSERT INTO holdings VALUES (?,?,?) ON CONFLICT (site, slice) DO UPDATE SET bits=excluded.bits",
                    [(site, number, bitmaps.dump(part)) for number, part in parts if len(part)],
                )
                rows.many(
                    "DELETE FROM holdings WHERE site=? AND slice=?",
                    [(site, number) for number, part in parts if not len(part)],
                )

            self.backend.run(write)
            after.run_optimize()
            with self._memory:
                self.index.holdings[site] = after
                self.fleet.sites[site] = record
        return m.HoldingsAnswer(revision=record.revision)

    def manifests(self, site: str, report: m.ManifestsReport) -> m.ManifestsAnswer:
        """A site says which manifests it has; the answer names those whose content is not known here."""
        with self._writing:
            old = self.fleet.names.get(site, {})
            entries = {entry.name: entry for entry in report.manifests}
            gone = set(old) - set(entries) if report.replace else set(report.removed) & set(old) - set(entries)
            new = {name: entry for name, entry in old.items() if name not in gone} | entries
            with self._memory:
                names = {**self.fleet.names, site: new}
            used = {entry.digest for each in names.values() for entry in each.values()}
            dropped = [digest for digest in self.index.manifests if digest not in used]

            def write(rows: Rows) -> None:
                fleet.put_names(rows, site, gone, [e for e in entries.values() if old.get(e.name) != e])
                rows.many("DELETE FROM manifests WHERE digest=?", [(digest,) for digest in dropped])

            self.backend.run(write)
            with self._memory:
                self.fleet.names[site] = new
                self.index.names[site] = {name: entry.digest for name, entry in new.items()}
                for digest in dropped:
                    del self.index.manifests[digest]
                known = self.index.manifests
                unknown = dict.fromkeys(e.digest for e in entries.values() if e.digest not in known)
        return m.ManifestsAnswer(unknown=list(unknown))

    def manifest_part(self, site: str, part: m.ManifestPart) -> m.ManifestPartAnswer:
        """A piece of a manifest that was asked for. Corrupt if the whole is not the manifest of that digest."""
        with self._memory:
            if part.digest in self.index.manifests:
                return m.ManifestPartAnswer(at=part.total, complete=True)
            if part.digest not in self.index.names.get(site, {}).values():
                raise Conflict(f"site {site!r} sends manifest {part.digest[:6].hex()}, which it has not reported")
            at, data = self._uploads.add(site, part)
        if data is None:
            return m.ManifestPartAnswer(at=at)
        manifest = Manifest.decode(data)
        if manifest.digest != part.digest:
            raise Corrupt(f"site {site!r} sent manifest {manifest.digest[:6].hex()} for {part.digest[:6].hex()}")
        self.register(part.digest, manifest)
        return m.ManifestPartAnswer(at=part.total, complete=True)

    def register(self, digest: bytes, manifest: Manifest) -> None:
        """Enters a manifest; chunks that are new get ids in its order."""
        step = _SCAN * FINGERPRINT
        table = manifest.fingerprints
        pieces = [self.dictionary.intern(table[at : at + step]) for at in range(0, len(table), step)]
        bits = bitmaps.of_ids(np.concatenate(pieces)) if pieces else bitmaps.empty()
        data = bitmaps.dump(bits)
        with self._writing:
            self.backend.run(
                lambda rows: rows.do(
                    "INSERT INTO manifests VALUES (?,?,?) ON CONFLICT (digest) DO NOTHING",
                    (digest, manifest.size, data),
                )
            )
            with self._memory:
                self.index.manifests[digest] = bits

    def guest_report(self, site: str, report: m.GuestsReport) -> None:
        """A site says which guests it knows, and in which state they are there."""
        now = self._clock()
        with self._writing:
            old = self.fleet.guests.get(site, {})
            entries = {entry.name: entry for entry in report.guests}
            gone = set(old) - set(entries) if report.replace else set(report.removed) & set(old) - set(entries)
            fresh = [e for e in entries.values() if e.name not in old or old[e.name][0] != e]
            self.backend.run(lambda rows: fleet.put_guests(rows, site, gone, fresh, now))
            with self._memory:
                kept = {name: each for name, each in old.items() if name not in gone}
                self.fleet.guests[site] = kept | {e.name: (e, now) for e in fresh}

    def link_report(self, site: str, report: m.LinksReport) -> None:
        """A site says how fast links are that end (or begin) at it; what is older than the known is passed over."""
        with self._writing:
            fresh = []
            for entry in report.links:
                source, target = (site, entry.source) if entry.outgoing else (entry.source, site)
                known = self.fleet.links.get(target, {}).get(source)
                if source != target and (known is None or known.measured < entry.measured):
                    fresh.append((source, target, Link(entry.rate_bps, entry.rtt_s, entry.measured)))
            if not fresh:
                return
            self.backend.run(lambda rows: fleet.put_links(rows, fresh))
            with self._memory:
                for source, target, link in fresh:
                    self.fleet.links.setdefault(target, {})[source] = link

    def forget(self, site: str) -> None:
        """Forgets all that a site reported: it has left the fleet. If it has not, it reports anew."""
        with self._writing:

            def write(rows: Rows) -> None:
                for table in ("sites", "holdings", "names", "guests"):
                    rows.do(f"DELETE FROM {table} WHERE site=?", (site,))
                rows.do("DELETE FROM links WHERE source=? OR target=?", (site, site))

            self.backend.run(write)
            with self._memory:
                for table in (self.fleet.sites, self.fleet.names, self.fleet.guests, self.fleet.links):
                    table.pop(site, None)
                for links in self.fleet.links.values():
                    links.pop(site, None)
                self.index.holdings.pop(site, None)
                self.index.names.pop(site, None)

    # -- popularity

    def _now_and_then(self) -> None:
        if self._clock() - self._popularity_saved > SAVE_POPULARITY_S:
            self.save_popularity()
        if self.planner.due():
            self.planner.make(self.index, self.fleet, self.popularity, wait=False)

    def save_popularity(self) -> None:
        """Writes down the counts that changed; what a crash takes of them is a few minutes' demand."""
        now = self._clock()
        with self._writing:
            self._popularity_saved = now
            with self._memory:
                changes = self.popularity.take_changes(now)
            if changes:
                packed = [(number, now, zstd.compress(data, 1)) for number, data in changes.items()]
                self.backend.run(
                    lambda rows: rows.many(
                        "INSERT INTO popularity VALUES (?,?,?)"
                        " ON CONFLICT (slice) DO UPDATE SET saved=excluded.saved, counts=excluded.counts",
                        packed,
                    )
                )
