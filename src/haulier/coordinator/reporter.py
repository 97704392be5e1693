"""The agent's side: tells the coordinator what this site has, as it changes, and catches up after an absence.

The agent calls `step` every few seconds. Nothing of this site depends on it: where the coordinator does not answer,
that is logged once, and tried again later. What was said is remembered in memory only; after a restart the site
says it all again, which costs little, as most chunks are named by the manifest they belong to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.chunks.manifest import peek
from haulier.chunks.store import ChunkStore
from haulier.coordinator import messages as m
from haulier.coordinator.address import Address
from haulier.coordinator.client import CoordinatorClient
from haulier.coordinator.fleet import IMAGE
from haulier.coordinator.inventory import Inventory, Rows, minus, pages
from haulier.errors import HaulierError
from haulier.handoff.journal import ABSENT, HandoffRow, Journal
from haulier.units import FINGERPRINT

log = logging.getLogger(__name__)

REPORT_EVERY_S: Final = 2.0
HELLO_EVERY_S: Final = 30.0
SETTINGS_EVERY_S: Final = 5.0
_BACKOFF_S: Final = (2.0, 30.0)
_SCAN_SHARE: Final = 20.0
"""A look through the whole store is repeated no sooner than after this many times what it took."""
PROBE_EVERY_S: Final = 60.0
LINK_AGE_S: Final = 6 * 3600.0
"""A link is measured when its last measurement is so old, and then one link in a minute at most."""
PROBED_SITES: Final = 16
_NO_ROWS: Final[Rows] = np.empty((0, FINGERPRINT), dtype=np.uint8)


class _Said:
    """What one coordinator was told, and what it answered."""

    def __init__(self) -> None:
        self.revision: int | None = None
        """None: the next report of holdings begins anew."""
        self.chunks: Rows = _NO_ROWS
        self.complete: set[bytes] = set()
        self.manifests: dict[str, m.ManifestEntry] | None = None
        self.unknown: set[bytes] = set()
        self.guests: dict[str, m.GuestEntry] | None = None
        self.store_version: int | None = None
        self.chunks_version: int | None = None


class Reporter:
    """Reports of one site. `step` is for one thread."""

    def __init__(
        self, site: Site, journal: Journal, store: ChunkStore, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._site = site
        self._journal = journal
        self._inventory = Inventory(store)
        self._monotonic = monotonic
        self._client: CoordinatorClient | None = None
        self._settings_due = self._hello_due = self._scan_due = self._next = float("-inf")
        self._probe_due = monotonic() + PROBE_EVERY_S
        self._room, self._unpinned = -1, list[str]()
        self._budget = site.store_budget
        self._room_seen: tuple[int, int] | None = None
        self._room_due = float("-inf")
        self._database = ""
        self._said = _Said()
        self._failing = ""
        self._backoff = _BACKOFF_S[0]
        self._links: dict[str, m.LinkEntry] = {}
        """Measured and not yet told."""
        self._measured: dict[str, float] = {}
        self._handoffs_seen = time.time()

    # -- what the agent calls

    def step(self) -> None:
        """Says what is new. Never raises because of the coordinator."""
        now = self._monotonic()
        if now >= self._settings_due:
            self._settings_due = now + SETTINGS_EVERY_S
            self._read_settings()
        if self._client is None or now < self._next:
            return
        self._note_handoffs()
        try:
            self._report(self._client)
        except HaulierError as error:
            self._next = self._monotonic() + self._backoff
            self._backoff = min(self._backoff * 2, _BACKOFF_S[1])
            self._hello_due = float("-inf")
            if str(error) != self._failing:
                self._failing = str(error)
                log.warning("going on without the coordinator: %s", error)
            return
        self._backoff = _BACKOFF_S[0]
        if self._failing:
            self._failing = ""
            log.info("%s answers again", self._client.where)

    def note_link(self, site: str, rate_bps: float, rtt_s: float, at: float = 0.0) -> None:
        """A link from this site to another was measured at that time, or now."""
        if site != self._site.name and 0 < rate_bps <= 1e13 and 0 <= rtt_s <= 3600:
            at = at or time.time()
            self._links[site] = m.LinkEntry(source=site, rate_bps=rate_bps, rtt_s=rtt_s, measured=at, outgoing=True)
            self._measured[site] = at

    # -- steps

    def _read_settings(self) -> None:
        try:
            site = Site.load(self._site.root)
            wanted = site.coordinator
            Address.parse(wanted) if wanted else None
        except HaulierError as error:
            if str(error) != self._failing:
                self._failing = str(error)
                log.warning("%s", error)
            return
        if site.store_budget != self._budget:
            self._budget = site.store_budget
            self._hello_due = self._room_due = float("-inf")
        if wanted != self._site.coordinator or (wanted and self._client is None):
            self._site = site
            self._client = CoordinatorClient.of(site)
            self._said, self._database = _Said(), ""
            self._hello_due = self._next = float("-inf")

    def _report(self, client: CoordinatorClient) -> None:
        if self._monotonic() >= self._hello_due:
            self._hello(client)
        self._report_guests(client)
        self._probe()
        self._report_links(client)
        busy = bool(self._journal.handoffs(live=True))
        version = self._inventory.version()
        if version != self._said.store_version:
            self._report_manifests(client)
            self._said.store_version = version
        until = self._monotonic() + REPORT_EVERY_S
        while self._send_manifests(client, images_only=busy):
            if self._monotonic() > until:
                return
        self._report_chunks(client, version)

    def _hello(self, client: CoordinatorClient) -> None:
        site = self._site
        version, began = self._inventory.version(), self._monotonic()
        seen = (version, self._budget)
        if seen != self._room_seen and began >= self._room_due:
            self._room, self._unpinned = self._inventory.room(self._budget)
            now = self._monotonic()
            self._room_seen, self._room_due = seen, now + _SCAN_SHARE * (now - began)
        report = m.HelloReport(
            control=site.control,
            bulk=list(site.bulk),
            budget=self._budget,
            room=self._room,
            unpinned=self._unpinned,
        )
        answer = client.report_hello(report)
        if answer.database != self._database:
            self._said, self._database = _Said(), answer.database
        if self._said.revision not in (None, answer.revision):
            # it lost something, or was given a copy of older data
            self._said = _Said()
        self._hello_due = self._monotonic() + HELLO_EVERY_S

    def _report_guests(self, client: CoordinatorClient) -> None:
        now = {
            row.name: m.GuestEntry(
                name=row.name, state=row.state, owner=row.owner, epoch=row.epoch, manifest=row.manifest
            )
            for row in self._journal.guests()
            if row.state != ABSENT
        }
        before = self._said.guests
        if before == now:
            return
        old = before or {}
        changed = [entry for name, entry in now.items() if old.get(name) != entry]
        for at in range(0, max(len(changed), 1), m.MAX_NAMES):
            gone = [name for name in old if name not in now][: m.MAX_NAMES] if at == 0 else []
            part = changed[at : at + m.MAX_NAMES]
            client.report_guests(m.GuestsReport(replace=before is None and at == 0, guests=part, removed=gone))
        self._said.guests = now

    def _report_links(self, client: CoordinatorClient) -> None:
        fresh = dict(self._links)
        if fresh:
            client.report_links(m.LinksReport(links=list(fresh.values())[: m.MAX_NAMES]))
            for site, entry in fresh.items():
                if self._links.get(site) is entry:
                    del self._links[site]

    def _report_manifests(self, client: CoordinatorClient) -> None:
        now = self._inventory.manifests()
        before = self._said.manifests
        if before == now:
            return
        old = before or {}
        changed = [entry for name, entry in now.items() if old.get(name) != entry]
        gone = [name for name in old if name not in now]
        self._said.manifests = None
        if before is None and not changed:
            client.report_manifests(m.ManifestsReport(replace=True))
        first = before is None
        while changed or gone:
            report = m.ManifestsReport(replace=first, manifests=changed[: m.MAX_NAMES], removed=gone[: m.MAX_NAMES])
            self._said.unknown.update(client.report_manifests(report).unknown)
            changed, gone, first = changed[m.MAX_NAMES :], gone[m.MAX_NAMES :], False
        self._said.manifests = now
        digests = {entry.digest for entry in now.values()}
        self._said.unknown &= digests
        self._said.complete &= digests

    def _send_manifests(self, client: CoordinatorClient, images_only: bool) -> bool:
        """Sends one manifest that is not known there; True if there may be more to send at once.

        While a handoff is under way only images are sent: the link has better things to carry.
        """
        for entry in (self._said.manifests or {}).values():
            if entry.digest in self._said.unknown and (not images_only or entry.name.startswith(IMAGE)):
                encoded = self._inventory.encoded(entry.name)
                if entry.digest == peek(encoded)[1]:
                    client.report_manifest(entry.digest, encoded)
                self._said.unknown.discard(entry.digest)
                return True
        return False

    def _report_chunks(self, client: CoordinatorClient, version: int) -> None:
        said = self._said
        if version == said.chunks_version or self._monotonic() < self._scan_due:
            return
        began = self._monotonic()
        now = self._inventory.chunks()
        added, removed = minus(now, said.chunks), minus(said.chunks, now)
        complete: list[bytes] = []
        if len(added):
            for name, entry in (said.manifests or {}).items():
                if entry.complete and entry.digest not in said.unknown | said.complete | set(complete):
                    left = minus(added, self._inventory.of_manifest(name))
                    if len(left) < len(added):
                        complete.append(entry.digest)
                        added = left
        self._scan_due = self._monotonic() + _SCAN_SHARE * (self._monotonic() - began)
        base, first = said.revision, said.revision is None
        # whatever goes wrong on the way, begin anew
        known = said.complete | set(complete)
        said.revision, said.chunks, said.complete, said.chunks_version = None, _NO_ROWS, set(), None
        reports = [
            m.HoldingsReport(base=0, complete=complete[at : at + m.MAX_NAMES])
            for at in range(0, len(complete), m.MAX_NAMES)
        ]
        reports += [m.HoldingsReport(base=0, removed=page) for page in pages(removed, m.BATCH)]
        reports += [m.HoldingsReport(base=0, added=page) for page in pages(added, m.BATCH)]
        if first and not reports:
            reports = [m.HoldingsReport(base=0)]
        revision = base or 0
        for report in reports:
            answer = client.report_holdings(msgspec.structs.replace(report, base=revision, replace=first))
            if answer.again:
                self._said = _Said()
                return
            revision, first = answer.revision, False
        said.revision, said.chunks, said.complete, said.chunks_version = revision, now, known, version

    # -- links

    def _note_handoffs(self) -> None:
        """Takes the rate of handoffs that ended since the last look from their reports."""
        ended = self._journal.handoffs(ended_after=self._handoffs_seen)
        for row in sorted(ended, key=lambda row: row.ended):
            self._handoffs_seen = max(self._handoffs_seen, row.ended)
            if row.role == "source" and row.outcome == "done":
                rate, rtt = _rate(self._site, row)
                self.note_link(row.peer, rate, rtt, row.ended)

    def _probe(self) -> None:
        """Measures one link that was not measured for long, unless a handoff is under way."""
        if self._monotonic() < self._probe_due:
            return
        self._probe_due = self._monotonic() + PROBE_EVERY_S
        if self._journal.handoffs(live=True):
            return
        peers = [row for row in self._journal.sites() if row.name != self._site.name][:PROBED_SITES]
        due = [row for row in peers if time.time() - self._measured.get(row.name, 0.0) > LINK_AGE_S]
        for row in due[:1]:
            self._measured[row.name] = time.time()
            try:
                self.note_link(row.name, *Client.peer(self._site, row).measure())
            except HaulierError as error:
                log.info("the link to %s cannot be measured: %s", row.name, error)


def _rate(site: Site, row: HandoffRow) -> tuple[float, float]:
    """(bits per second, round trip) that a handoff reported; (0, 0) if it did not."""
    try:
        report = msgspec.json.decode((site.handoff_root(row.id) / "report.json").read_bytes(), type=dict)
        return float(report.get("rate_bps", 0)), float(report.get("rtt_s", 0))
    except (OSError, ValueError, TypeError, msgspec.MsgspecError):
        return 0.0, 0.0
