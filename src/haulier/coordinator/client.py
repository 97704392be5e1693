"""How agents and handoff workers ask the coordinator, and tell it what they have.

    coordinator = CoordinatorClient.of(site)      None where the site has none
    for source in coordinator.holders(fingerprints, for_site=site.name): ...

What it answers are hints: a holder may have dropped a chunk since, and says so when asked. Every call raises PeerError
when the coordinator does not answer; go on without it then. Blocking; may be shared by threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlencode

import msgspec
import numpy as np
from numpy.typing import NDArray

from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.coordinator import bitmaps
from haulier.coordinator import messages as m
from haulier.coordinator.address import Address
from haulier.errors import Corrupt, PeerError, UnknownThing
from haulier.units import CHUNK

PREFIX: Final = "/v1/coordinator"
TIMEOUT_S: Final = 20.0
"""Questions are hints; who asks must not wait long where the coordinator is cut off."""
_A = TypeVar("_A")


@dataclass(frozen=True)
class Source:
    """A site that has some of the chunks asked for, as far as the coordinator knows.

    `control` is its host:port, `bulk` its addresses. `positions` are ascending indexes into the request, `held` their
    number. `rate_bps`
    (bits per second) and `rtt_s` are of the link from it to the asking site, a guess unless `measured` (Unix seconds).
    `cost_s` is the time that all its positions would take over that link; `seen` is when it last reported.
    """

    site: str
    control: str
    bulk: tuple[str, ...]
    rate_bps: float
    rtt_s: float
    measured: float
    seen: float
    held: int
    cost_s: float
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Survey:
    """Positions that the asking site lacks, how many of all nobody else has, and who has which, cheapest first."""

    lacking: list[int]
    unheld: int
    sources: list[Source]


@dataclass(frozen=True)
class ImageSurvey:
    """Chunks of a manifest, how many of them the site lacks, how many nobody else has, and who has how many."""

    chunks: int
    lacking: int
    unheld: int
    sources: list[Source]


@dataclass(frozen=True)
class ChunkFacts:
    """Of one chunk: manifests that refer to it, sites that hold it, decayed requests, seconds to fetch it again from
    the nearest other holder (infinite if there is none), what the plan for the asking site says (see `Facts`)."""

    references: int
    copies: int
    popularity: float
    refetch_s: float
    plan: int = 0


class CoordinatorClient:
    """Calls to the coordinator over any `Client`."""

    def __init__(self, client: Client, timeout_s: float = TIMEOUT_S) -> None:
        self._client = client
        self._timeout = timeout_s
        self.where = client.where

    @staticmethod
    def of(site: Site, timeout_s: float = TIMEOUT_S) -> CoordinatorClient | None:
        """The coordinator that the site's settings name; None where they name none."""
        if not site.coordinator:
            return None
        address = Address.parse(site.coordinator)
        client = Client.local(site) if address.here else address.client(site)
        return CoordinatorClient(client, timeout_s)

    @staticmethod
    def near(site: Site) -> CoordinatorClient:
        """As `of`, for an operator: first the one that runs here by itself. UnknownThing if there is none."""
        own = site.run / "coordinator.sock"
        if own.exists():
            return CoordinatorClient(Client.unix(own, f"the coordinator of site {site.name!r}"))
        found = CoordinatorClient.of(site)
        if found is None:
            raise UnknownThing(
                f"site {site.name!r} has no coordinator: name one with 'haulier coordinator use https://HOST:PORT'"
            )
        return found

    # -- questions

    def lacking(self, site: str, fingerprints: Sequence[bytes]) -> list[int]:
        """Positions of those chunks that `site` lacks, as far as known."""
        found: list[int] = []
        for start, batch in _batches(fingerprints):
            answer = self._ask("/lacking", m.LackingQuery(site=site, fingerprints=m.join(batch)), m.LackingAnswer)
            found += (start + self._positions(answer.lacking, len(batch))).tolist()
        return found

    def holders(
        self, fingerprints: Sequence[bytes], for_site: str, *, limit: int = 16, exclude: Sequence[str] = ()
    ) -> list[Source]:
        """Sites from which `for_site` can fetch these chunks, cheapest a chunk first.

        `for_site` itself and the sites in `exclude` are left out. Each call counts as one request for each chunk.
        """
        return self.survey(fingerprints, for_site, limit=limit, exclude=exclude).sources

    def survey(
        self, fingerprints: Sequence[bytes], for_site: str, *, limit: int = 16, exclude: Sequence[str] = ()
    ) -> Survey:
        """`lacking` and `holders` in one question."""
        parts: dict[str, list[tuple[m.SourceAnswer, NDArray[np.int64]]]] = {}
        lacking: list[int] = []
        unheld = 0
        for start, batch in _batches(fingerprints):
            query = m.HoldersQuery(fingerprints=m.join(batch), site=for_site, limit=limit, exclude=list(exclude))
            answer = self._ask("/holders", query, m.HoldersAnswer)
            for source in answer.sources:
                places = start + self._positions(source.positions, len(batch))
                parts.setdefault(source.site, []).append((source, places))
            lacking += (start + self._positions(answer.lacking, len(batch))).tolist()
            unheld += answer.unheld
        found = [
            self._source(each[0][0], np.concatenate([positions for _, positions in each])) for each in parts.values()
        ]
        found.sort(key=lambda source: (source.cost_s / max(source.held, 1), source.site))
        return Survey(lacking, unheld, found)

    def image_holders(self, digest: bytes, for_site: str, *, limit: int = 16) -> ImageSurvey:
        """The same for all chunks of a manifest, by its digest: a small question with a small answer, no positions.

        UnknownThing if no site has reported that manifest.
        """
        answer = self._ask("/image-holders", m.ImageQuery(digest=digest, site=for_site, limit=limit), m.ImageAnswer)
        sources = [self._source(each, None) for each in answer.sources]
        return ImageSurvey(answer.chunks, answer.lacking, answer.unheld, sources)

    def _source(self, answer: m.SourceAnswer, places: NDArray[np.int64] | None) -> Source:
        if not answer.rate_bps > 0 or not answer.rtt_s >= 0:
            raise PeerError(f"{self.where} names an impossible link from {answer.site!r}: run the same haulier there")
        held = answer.held if places is None else len(places)
        return Source(
            site=answer.site,
            control=answer.control,
            bulk=tuple(answer.bulk),
            rate_bps=answer.rate_bps,
            rtt_s=answer.rtt_s,
            measured=answer.measured,
            seen=answer.seen,
            held=held,
            cost_s=held * CHUNK * 8 / answer.rate_bps + answer.rtt_s,
            positions=np.empty(0, dtype=np.int64) if places is None else places,
        )

    def facts(self, fingerprints: Sequence[bytes], for_site: str = "") -> list[ChunkFacts]:
        """What a cache has to know of each chunk, aligned with the request."""
        found: list[ChunkFacts] = []
        for _, batch in _batches(fingerprints):
            answer = self._ask("/facts", m.FactsQuery(fingerprints=m.join(batch), site=for_site), m.FactsAnswer)
            plans = answer.plan or [0] * len(batch)
            columns = (answer.references, answer.copies, answer.popularity, answer.refetch_s, plans)
            if {len(column) for column in columns} != {len(batch)}:
                raise PeerError(f"{self.where} answered for another number of chunks: run the same haulier there")
            found += [
                ChunkFacts(references, copies, popularity, refetch if refetch >= 0 else float("inf"), plan)
                for references, copies, popularity, refetch, plan in zip(*columns, strict=True)
            ]
        return found

    def unreferenced(self, site: str = "") -> Iterator[bytes]:
        """Fingerprints of chunks that are held (at `site`, or anywhere) though no manifest (of it, or any) needs them.

        To look at, or to know where to look: what may be deleted is for each site's own store to say.
        """
        after = ""
        while True:
            query = urlencode({"site": site, "after": after})
            answer = self._read(self._client.get(f"{PREFIX}/unreferenced?{query}", self._timeout), m.UnreferencedAnswer)
            yield from m.split(answer.fingerprints)
            if not answer.after or answer.after == after:
                return
            after = answer.after

    def images(self) -> list[dict[str, Any]]:
        """Images of all sites: name, digest (hex), size, layer, parent (hex), sites that have it whole."""
        return self._list("images")

    def guests(self) -> list[dict[str, Any]]:
        """Guests of all sites: name, owner, epoch, disputed, and what each site says of it."""
        return self._list("guests")

    def sites(self) -> list[dict[str, Any]]:
        """Sites that reported: name, control, seen, revision, budget, chunks, manifests, guests."""
        return self._list("sites")

    def links(self) -> list[dict[str, Any]]:
        """Links that were measured: from, to, rate_bps, rtt_s, measured."""
        return self._list("links")

    def status(self) -> dict[str, Any]:
        """All of these, and what the index and its database amount to."""
        return self._client.get(PREFIX, self._timeout)

    def plan(self) -> dict[str, Any]:
        """Which site should keep which layers: made, layers, left_out, fetch_s_now, fetch_s_planned, fetch_s_saved,
        and for each site its room in bytes and the layers that it should keep, that are missing, that are over."""
        return self._client.get(f"{PREFIX}/plan", self._timeout)

    def forget(self, site: str) -> None:
        """Forgets what a site reported; for operators."""
        self._client.post(f"{PREFIX}/forget", {"site": site}, self._timeout)

    # -- reports about the calling site

    def report_hello(self, report: m.HelloReport) -> m.HelloAnswer:
        return self._ask("/hello", report, m.HelloAnswer)

    def report_holdings(self, report: m.HoldingsReport) -> m.HoldingsAnswer:
        return self._ask("/holdings", report, m.HoldingsAnswer)

    def report_manifests(self, report: m.ManifestsReport) -> m.ManifestsAnswer:
        return self._ask("/manifests", report, m.ManifestsAnswer)

    def report_manifest(self, digest: bytes, encoded: bytes) -> None:
        """Sends a manifest that the coordinator asked for, piece by piece."""
        at, stuck = 0, 0
        while True:
            data = encoded[at : at + m.PART]
            part = m.ManifestPart(digest=digest, at=at, total=len(encoded), data=data)
            answer = self._ask("/manifest", part, m.ManifestPartAnswer)
            if answer.complete:
                return
            # one step back is a coordinator that was restarted meanwhile; more of them lead nowhere
            stuck += answer.at != at + len(data)
            if answer.at >= len(encoded) or stuck > 3:
                raise PeerError(f"{self.where} does not take manifest {digest[:6].hex()}: run the same haulier there")
            at = answer.at

    def report_guests(self, report: m.GuestsReport) -> None:
        self._client.post(f"{PREFIX}/guests", msgspec.to_builtins(report), self._timeout)

    def report_links(self, report: m.LinksReport) -> None:
        self._client.post(f"{PREFIX}/links", msgspec.to_builtins(report), self._timeout)

    # -- the wire

    def _ask(self, path: str, query: m.Message, kind: type[_A]) -> _A:
        return self._read(self._client.post(PREFIX + path, msgspec.to_builtins(query), self._timeout), kind)

    def _read(self, answer: Mapping[str, Any], kind: type[_A]) -> _A:
        try:
            return msgspec.convert(answer, kind)
        except (msgspec.MsgspecError, ValueError):
            raise PeerError(f"{self.where} answered wrongly: run the same haulier there") from None

    def _positions(self, data: bytes, count: int) -> NDArray[np.int64]:
        try:
            return np.flatnonzero(bitmaps.unpack(data, count)).astype(np.int64)
        except Corrupt as error:
            raise PeerError(f"{self.where}: {error}") from None

    def _list(self, what: str) -> list[dict[str, Any]]:
        found = self._client.get(f"{PREFIX}/{what}", self._timeout).get(what)
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise PeerError(f"{self.where} answered wrongly which {what} there are: run the same haulier there")
        return cast("list[dict[str, Any]]", found)


def _batches(fingerprints: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
    for start in range(0, len(fingerprints), m.BATCH):
        yield start, fingerprints[start : start + m.BATCH]
