"""The chunk index in memory: one bitmap of dense ids a site, and one a manifest. Pure: no clock, no files.

Reference counts are derived from manifests and not kept a chunk at a time, so that they cannot drift. A site with
60 whole images costs about a kilobyte; scattered chunks two bytes each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.coordinator import bitmaps
from haulier.coordinator.bitmaps import Bits, Ids
from haulier.errors import UnknownThing
from haulier.units import CHUNK

DEFAULT_RATE: Final = 10e6
DEFAULT_RTT: Final = 0.05
"""What is assumed of a link that nobody has measured: bits per second, seconds."""


@dataclass(frozen=True)
class Link:
    """From one site to another: bits per second, round trip in seconds, and when that was measured (0 = never)."""

    rate_bps: float = DEFAULT_RATE
    rtt_s: float = DEFAULT_RTT
    measured: float = 0.0

    def seconds(self, chunks: int) -> float:
        """Time to fetch so many chunks over it: the bytes over the rate, plus a round trip."""
        return chunks * CHUNK * 8 / self.rate_bps + self.rtt_s


UNMEASURED: Final = Link()


@dataclass(frozen=True)
class Holder:
    """A site that has some of the chunks asked for. `mask` is aligned with the request (empty if there was none)."""

    site: str
    held: int
    cost_s: float
    link: Link
    mask: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_))


@dataclass
class ChunkIndex:
    """`holdings[site]`, `manifests[digest]` are sets of ids; `names[site][name]` is the digest of a manifest there."""

    holdings: dict[str, Bits] = field(default_factory=dict)
    manifests: dict[bytes, Bits] = field(default_factory=dict)
    names: dict[str, dict[str, bytes]] = field(default_factory=dict)

    # -- what sites hold

    def of_site(self, site: str) -> Bits:
        return self.holdings.get(site, _NOTHING)

    def changed(self, site: str, added: Bits, removed: Bits, replace: bool = False) -> Bits:
        """What the site would hold after a change; an id in both is held."""
        before = bitmaps.empty() if replace else self.of_site(site) - removed
        return before | added

    def lacking(self, site: str, ids: Ids) -> NDArray[np.bool_]:
        """Which of `ids` the site lacks, as far as known; chunks that nobody ever reported are lacking."""
        return np.asarray(~bitmaps.members(ids, self.of_site(site)))

    def holders(
        self, ids: Ids, links: Mapping[str, Link], exclude: Iterable[str] = (), limit: int = 16
    ) -> tuple[list[Holder], int]:
        """Sites from which to fetch `ids`, cheapest a chunk first, and how many of `ids` nobody has.

        `links[site]` leads from that site to the one that asks. First come those that together have all that anybody
        has, then others as further sources, at most `limit`. The cost is that of all the chunks that the site has.
        """
        found, unheld = self.holders_of(bitmaps.of_ids(ids), links, exclude, limit)
        masked = [replace(each, mask=bitmaps.members(ids, self.holdings[each.site])) for each in found]
        return masked, unheld + int(np.count_nonzero(ids < 0))

    def holders_of(
        self, wanted: Bits, links: Mapping[str, Link], exclude: Iterable[str] = (), limit: int = 16
    ) -> tuple[list[Holder], int]:
        """As `holders`, for a set of ids, and without saying who has which."""
        left_out = set(exclude)
        offers: list[tuple[float, str, int, Link]] = []
        for site, bits in self.holdings.items():
            count = wanted.intersection_cardinality(bits)
            if count and site not in left_out:
                link = links.get(site, UNMEASURED)
                offers.append((link.seconds(count) / count, site, count, link))
        offers.sort(key=lambda offer: offer[:2])
        chosen: list[tuple[float, str, int, Link]] = []
        spare: list[tuple[float, str, int, Link]] = []
        rest = wanted.copy()
        for offer in offers:
            useful = len(rest) and rest.intersect(self.holdings[offer[1]])
            if useful and len(chosen) < limit:
                chosen.append(offer)
                rest -= self.holdings[offer[1]]
            elif len(spare) < limit:
                spare.append(offer)
            if not len(rest) and len(chosen) + len(spare) >= limit:
                break
        chosen = sorted(chosen + spare[: limit - len(chosen)], key=lambda offer: offer[:2])
        return [Holder(site, count, link.seconds(count), link) for _, site, count, link in chosen], len(rest)

    def copies(self, ids: Ids) -> NDArray[np.int64]:
        """For each of `ids`, how many sites hold it."""
        return _count(ids, self.holdings.values())

    # -- what refers to chunks

    def references(self, ids: Ids) -> NDArray[np.int64]:
        """For each of `ids`, how many named manifests of all sites refer to it."""
        used: dict[bytes, int] = {}
        for names in self.names.values():
            for digest in names.values():
                used[digest] = used.get(digest, 0) + 1
        counts = np.zeros(len(ids), dtype=np.int64)
        for digest, times in used.items():
            if digest in self.manifests:
                counts += times * _count(ids, [self.manifests[digest]])
        return counts

    def referenced(self, site: str | None = None) -> Bits:
        """Ids that some manifest refers to: at one site, or anywhere."""
        sites = self.names.values() if site is None else [self.names.get(site, {})]
        digests = {digest for names in sites for digest in names.values()}
        return bitmaps.union([self.manifests[digest] for digest in digests if digest in self.manifests])

    def unreferenced(self, site: str | None = None) -> Bits:
        """Ids that are held though no manifest refers to them: at one site (by its own manifests), or anywhere."""
        held = self.of_site(site) if site is not None else bitmaps.union(list(self.holdings.values()))
        return held - self.referenced(site)

    def manifest(self, digest: bytes) -> Bits:
        """UnknownThing if no site has sent it."""
        found = self.manifests.get(digest)
        if found is None:
            raise UnknownThing(
                f"the coordinator has no manifest {digest[:6].hex()}: let the site that has it report it"
            )
        return found

    def pairs(self) -> int:
        """Number of (chunk, site) pairs."""
        return sum(len(bits) for bits in self.holdings.values())


_NOTHING: Final = bitmaps.empty()


def _count(ids: Ids, sets: Iterable[Bits]) -> NDArray[np.int64]:
    wanted = bitmaps.of_ids(ids)
    order = bitmaps.to_ids(wanted)
    counts = np.zeros(len(order) + 1, dtype=np.int64)
    for bits in sets:
        both = wanted & bits
        if len(both):
            counts[np.searchsorted(order, bitmaps.to_ids(both))] += 1
    if not len(order):
        return np.zeros(len(ids), dtype=np.int64)
    places = np.searchsorted(order, np.maximum(ids, 0))
    counts[-1] = 0
    return np.where(ids >= 0, counts[np.minimum(places, len(order))], 0)
