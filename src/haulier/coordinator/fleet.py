"""What the coordinator knows of the fleet besides chunks: sites, links, names of manifests, guests. Kept in memory,
written through; loaded at the start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from haulier.coordinator.backend import Rows
from haulier.coordinator.index import Link
from haulier.coordinator.messages import GuestEntry, ManifestEntry
from haulier.handoff.ownership import MAY_RUN

IMAGE: Final = "image/"


class SiteRecord(msgspec.Struct, frozen=True):
    """A site as it reported itself. `seen` is when it last did; `revision` counts its reports of holdings."""

    site: str
    control: str = ""
    bulk: tuple[str, ...] = ()
    budget: int = 0
    seen: float = 0.0
    revision: int = 0
    room: int = -1
    """In bytes, for what nothing there refers to; -1 until it has said so. In memory only, as are `unpinned` names."""
    unpinned: frozenset[str] = frozenset()


@dataclass
class Fleet:
    """`links[target][source]`; `names[site][name]`; `guests[site][name]` is (entry, since)."""

    sites: dict[str, SiteRecord] = field(default_factory=dict)
    links: dict[str, dict[str, Link]] = field(default_factory=dict)
    names: dict[str, dict[str, ManifestEntry]] = field(default_factory=dict)
    guests: dict[str, dict[str, tuple[GuestEntry, float]]] = field(default_factory=dict)

    def image_list(self) -> list[dict[str, Any]]:
        """Images by name and content, with the sites that have them whole."""
        found: dict[tuple[str, bytes], dict[str, Any]] = {}
        for site, names in sorted(self.names.items()):
            for name, entry in sorted(names.items()):
                if not name.startswith(IMAGE):
                    continue
                image = found.setdefault(
                    (name, entry.digest),
                    {
                        "name": name.removeprefix(IMAGE),
                        "digest": entry.digest.hex(),
                        "size": entry.size,
                        "layer": entry.layer,
                        "parent": entry.parent.hex(),
                        "sites": [],
                    },
                )
                if entry.complete:
                    image["sites"].append(site)
        return [found[key] for key in sorted(found)]

    def guest_list(self) -> list[dict[str, Any]]:
        """Guests by name: the owner of the highest epoch that any site reported, and what each site says."""
        reports: dict[str, dict[str, tuple[GuestEntry, float]]] = {}
        for site, guests in self.guests.items():
            for name, report in guests.items():
                reports.setdefault(name, {})[site] = report
        return [_guest(name, reports[name]) for name in sorted(reports)]

    def link_list(self) -> list[dict[str, Any]]:
        return [
            {
                "from": source,
                "to": target,
                "rate_bps": link.rate_bps,
                "rtt_s": link.rtt_s,
                "measured": link.measured,
            }
            for target, links in sorted(self.links.items())
            for source, link in sorted(links.items())
        ]

    # -- writing through

    def load(self, rows: Rows) -> None:
        for site, control, bulk, budget, seen, revision in rows.all(
            "SELECT site, control, bulk, budget, seen, revision FROM sites"
        ):
            self.sites[site] = SiteRecord(site, control, tuple(bulk.split()), budget, seen, revision)
        for source, target, rate, rtt, measured in rows.all(
            "SELECT source, target, rate_bps, rtt_s, measured FROM links"
        ):
            self.links.setdefault(target, {})[source] = Link(rate, rtt, measured)
        for site, name, digest, size, complete, layer, parent in rows.all(
            "SELECT site, name, digest, size, complete, layer, parent FROM names"
        ):
            self.names.setdefault(site, {})[name] = ManifestEntry(
                name=name, digest=bytes(digest), size=size, complete=bool(complete), layer=layer, parent=bytes(parent)
            )
        for site, name, state, owner, epoch, manifest, since in rows.all(
            "SELECT site, name, state, owner, epoch, manifest, since FROM guests"
        ):
            entry = GuestEntry(name=name, state=state, owner=owner, epoch=epoch, manifest=manifest)
            self.guests.setdefault(site, {})[name] = (entry, since)


def put_site(rows: Rows, record: SiteRecord) -> None:
    rows.do(
        "INSERT INTO sites VALUES (?,?,?,?,?,?) ON CONFLICT (site) DO UPDATE SET control=excluded.control,"
        " bulk=excluded.bulk, budget=excluded.budget, seen=excluded.seen, revision=excluded.revision",
        (record.site, record.control, " ".join(record.bulk), record.budget, record.seen, record.revision),
    )


def put_links(rows: Rows, links: Iterable[tuple[str, str, Link]]) -> None:
    rows.many(
        "INSERT INTO links VALUES (?,?,?,?,?) ON CONFLICT (source, target) DO UPDATE SET rate_bps=excluded.rate_bps,"
        " rtt_s=excluded.rtt_s, measured=excluded.measured",
        [(source, target, link.rate_bps, link.rtt_s, link.measured) for source, target, link in links],
    )


def put_names(rows: Rows, site: str, gone: Iterable[str], entries: Iterable[ManifestEntry]) -> None:
    rows.many("DELETE FROM names WHERE site=? AND name=?", [(site, name) for name in gone])
    rows.many(
        "INSERT INTO names VALUES (?,?,?,?,?,?,?) ON CONFLICT (site, name) DO UPDATE SET digest=excluded.digest,"
        " size=excluded.size, complete=excluded.complete, layer=excluded.layer, parent=excluded.parent",
        [(site, e.name, e.digest, e.size, int(e.complete), e.layer, e.parent) for e in entries],
    )


def put_guests(rows: Rows, site: str, gone: Iterable[str], entries: Iterable[GuestEntry], now: float) -> None:
    rows.many("DELETE FROM guests WHERE site=? AND name=?", [(site, name) for name in gone])
    rows.many(
        "INSERT INTO guests VALUES (?,?,?,?,?,?,?) ON CONFLICT (site, name) DO UPDATE SET state=excluded.state,"
        " owner=excluded.owner, epoch=excluded.epoch, manifest=excluded.manifest, since=excluded.since",
        [(site, e.name, e.state, e.owner, e.epoch, e.manifest, now) for e in entries],
    )


def _guest(name: str, reports: dict[str, tuple[GuestEntry, float]]) -> dict[str, Any]:
    newest = max((entry for entry, _ in reports.values()), key=lambda entry: (entry.epoch, entry.state in MAY_RUN))
    owners = [s for s, (entry, _) in reports.items() if entry.state in MAY_RUN and entry.epoch == newest.epoch]
    return {
        "name": name,
        "owner": newest.owner,
        "epoch": newest.epoch,
        "disputed": len(owners) > 1,
        "sites": {
            site: {"state": entry.state, "epoch": entry.epoch, "since": since}
            for site, (entry, since) in sorted(reports.items())
        },
    }
