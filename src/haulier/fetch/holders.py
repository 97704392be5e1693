"""Who may hold chunks: the sites that this one knows, an object store, and whoever knows better.

A `Holders` gives hints, nothing more: a site that turns out not to hold a chunk says so, and is passed over for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

from haulier.agent.site import Site
from haulier.errors import HaulierError
from haulier.fetch.origin import OriginSource
from haulier.fetch.peer import PeerSource
from haulier.fetch.source import Source
from haulier.handoff.journal import Journal, SiteRow

HINT_S: Final = 3.0
"""Longer is not waited for the coordinator: the sites can be asked themselves."""


class Holders(Protocol):
    """Somebody who knows who holds what, the coordinator for one. Raises PeerError when it cannot be asked."""

    def holders(self, fingerprints: Sequence[bytes]) -> Mapping[str, Collection[bytes]]:
        """Site name -> those of the chunks that it is said to hold."""
        ...


def peer_rows(site: Site) -> list[SiteRow]:
    """The other sites that this one knows."""
    with Journal(site.journal) as journal:
        return [row for row in journal.sites() if row.name != site.name]


def _find(site: Site, name: str) -> SiteRow:
    with Journal(site.journal) as journal:
        return journal.site(name)


def sources_of(site: Site, *, exclude: Collection[str] = (), only: Collection[str] | None = None) -> list[Source]:
    """All sources that this site can ask: every other site of the fleet, and the origin in site.toml, if there is one.

    `exclude` and `only` name sites (the origin is called "origin").
    """
    found: list[Source] = [
        PeerSource(site, partial(_find, site, row.name), row.name)
        for row in peer_rows(site)
        if row.name not in exclude and (only is None or row.name in only)
    ]
    if site.origin and "origin" not in exclude and (only is None or "origin" in only):
        found.append(OriginSource.of(site))
    return found


class CoordinatorHolders:
    """What the fleet's coordinator knows."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def holders(self, fingerprints: Sequence[bytes]) -> Mapping[str, Collection[bytes]]:
        # Here, for the coordinator's client brings more with it than most callers need.
        from haulier.coordinator.client import CoordinatorClient

        client = CoordinatorClient.of(self._site, HINT_S)
        if client is None:
            return {}
        found = client.holders(fingerprints, self._site.name)
        return {source.site: [fingerprints[place] for place in source.positions.tolist()] for source in found}


def hints_for(site: Site, fingerprints: Sequence[bytes]) -> Mapping[str, Collection[bytes]]:
    """Who is said to hold these, by the coordinator of the site's fleet; nothing where there is none."""
    return hints(CoordinatorHolders(site), fingerprints) if site.coordinator else {}


def hints(ask: Holders | None, fingerprints: Sequence[bytes]) -> Mapping[str, Collection[bytes]]:
    """What `ask` says, nothing where it cannot be asked: without it the sites themselves are."""
    if ask is None:
        return {}
    with contextlib.suppress(HaulierError):
        return ask.holders(fingerprints)
    return {}
