"""What the coordinator says about holders, in the form in which `haulier.fetch` takes hints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from haulier.agent.site import Site
from haulier.coordinator.client import CoordinatorClient


class CoordinatorHolders:
    """Who holds what, for one site that fetches. Raises PeerError when the coordinator does not answer."""

    def __init__(self, client: CoordinatorClient, for_site: str, limit: int = 16) -> None:
        self._client = client
        self._site = for_site
        self._limit = limit

    @staticmethod
    def of(site: Site) -> CoordinatorHolders | None:
        """None where the site has no coordinator."""
        client = CoordinatorClient.of(site)
        return CoordinatorHolders(client, site.name) if client is not None else None

    def holders(self, fingerprints: Sequence[bytes]) -> Mapping[str, frozenset[bytes]]:
        """Site name -> those of the chunks that it is said to hold, the cheapest source first."""
        sources = self._client.holders(fingerprints, self._site, limit=self._limit)
        return {source.site: frozenset(fingerprints[at] for at in source.positions.tolist()) for source in sources}
