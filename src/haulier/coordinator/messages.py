"""What agents and the coordinator say to each other: JSON objects, bytes as base64, every size bounded.

Fingerprints travel as one byte string of 32 each. Positions in an answer are those of the request's fingerprints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from haulier.errors import UsageError
from haulier.units import FINGERPRINT

BATCH: Final = 16384
"""Fingerprints in one message: 512 KiB, under the body limit of the control API as base64."""
MAX_NAMES: Final = 2000
"""Manifests, guests or links in one message."""
PART: Final = 512 << 10
"""Bytes of an encoded manifest in one message."""
MAX_MANIFEST: Final = 256 << 20
MAX_SOURCES: Final = 64

Text = Annotated[str, msgspec.Meta(max_length=200)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Fingerprints = Annotated[bytes, msgspec.Meta(max_length=BATCH * FINGERPRINT)]
Names = Annotated[list[Text], msgspec.Meta(max_length=MAX_NAMES)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request; what has unknown fields is refused."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer; a newer coordinator may say more."""


# -- questions


class LackingQuery(Message, frozen=True, kw_only=True):
    site: Text
    fingerprints: Fingerprints


class LackingAnswer(_Answer, frozen=True, kw_only=True):
    """`lacking` is a bit set over positions."""

    lacking: bytes


class HoldersQuery(Message, frozen=True, kw_only=True):
    """`site` asks: links towards it decide the cost. It is not named as a holder, nor are those in `exclude`."""

    fingerprints: Fingerprints
    site: Text
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_SOURCES)] = 16
    exclude: Names = []


class SourceAnswer(_Answer, frozen=True, kw_only=True):
    site: Text
    control: Text
    bulk: list[Text] = []
    rate_bps: float
    rtt_s: float
    measured: float = 0.0
    seen: float = 0.0
    held: Count
    cost_s: float
    positions: bytes


class HoldersAnswer(_Answer, frozen=True, kw_only=True):
    """Cheapest a chunk first. `lacking` is a bit set of what the asking site itself lacks; `unheld` of the chunks
    nobody else has, as far as known."""

    lacking: bytes
    sources: Annotated[list[SourceAnswer], msgspec.Meta(max_length=MAX_SOURCES)]
    unheld: Count = 0


class ImageQuery(Message, frozen=True, kw_only=True):
    """`site` wants all chunks of a manifest."""

    digest: Digest
    site: Text
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_SOURCES)] = 16


class ImageAnswer(_Answer, frozen=True, kw_only=True):
    """`chunks` of the manifest, `lacking` of them at the site, `unheld` nowhere else; sources without positions."""

    chunks: Count
    lacking: Count
    unheld: Count
    sources: Annotated[list[SourceAnswer], msgspec.Meta(max_length=MAX_SOURCES)]


class FactsQuery(Message, frozen=True, kw_only=True):
    fingerprints: Fingerprints
    site: Text = ""


class FactsAnswer(_Answer, frozen=True, kw_only=True):
    """By position: manifests that refer to it, sites that hold it, its decayed requests, seconds to fetch it again
    from the nearest other holder (-1: nobody else has it); what the plan keeps at the site (1), copies that it does
    not want there (-1), else 0. Empty without a plan."""

    references: list[int]
    copies: list[int]
    popularity: list[float]
    refetch_s: list[float]
    plan: list[int] = []


class UnreferencedAnswer(_Answer, frozen=True, kw_only=True):
    """A page of fingerprints that are held and that no manifest refers to; `after` continues, "" at the end."""

    fingerprints: bytes
    after: str = ""


# -- reports


class HelloReport(Message, frozen=True, kw_only=True):
    """`room` is how many bytes chunks may take there that nothing there refers to (-1: not known); `unpinned` names
    manifests that keep none of theirs."""

    control: Text
    bulk: Annotated[list[Text], msgspec.Meta(max_length=16)] = []
    budget: Count = 0
    room: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 62)] = -1
    unpinned: Names = []


class HelloAnswer(_Answer, frozen=True, kw_only=True):
    """`database` names the coordinator's data: another one knows nothing of what was reported before."""

    database: Text
    revision: Count


class HoldingsReport(Message, frozen=True, kw_only=True):
    """What changed since `base`, the revision that the last answer named.

    With `replace` nothing older counts. `complete` are digests of manifests whose chunks are all held.
    """

    base: Count
    replace: bool = False
    complete: Annotated[list[Digest], msgspec.Meta(max_length=MAX_NAMES)] = []
    added: Fingerprints = b""
    removed: Fingerprints = b""


class HoldingsAnswer(_Answer, frozen=True, kw_only=True):
    """With `again`, nothing was taken: begin anew with `replace`."""

    revision: Count
    again: bool = False


class ManifestEntry(Message, frozen=True, kw_only=True):
    """A manifest of a site. `layer` is "base", "application", "instance" or ""; `parent` the digest it builds on."""

    name: Text
    digest: Digest
    size: Count
    complete: bool = True
    layer: Text = ""
    parent: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


class ManifestsReport(Message, frozen=True, kw_only=True):
    """With `replace`, names that are not among `manifests` are gone; else those in `removed`."""

    replace: bool = False
    manifests: Annotated[list[ManifestEntry], msgspec.Meta(max_length=MAX_NAMES)] = []
    removed: Names = []


class ManifestsAnswer(_Answer, frozen=True, kw_only=True):
    """`unknown` digests: the coordinator would like to have those manifests."""

    unknown: Annotated[list[Digest], msgspec.Meta(max_length=MAX_NAMES)] = []


class ManifestPart(Message, frozen=True, kw_only=True):
    """Bytes of an encoded manifest (docs/formats/manifests.md) from offset `at` of `total`."""

    digest: Digest
    at: Count
    total: Annotated[int, msgspec.Meta(ge=1, le=MAX_MANIFEST)]
    data: Annotated[bytes, msgspec.Meta(max_length=PART)]


class ManifestPartAnswer(_Answer, frozen=True, kw_only=True):
    """Go on at `at`; `complete` when the manifest is known."""

    at: Count
    complete: bool = False


class GuestEntry(Message, frozen=True, kw_only=True):
    """A guest of which the reporting site has a record; `state` as in its journal ("owner", "sending", ...)."""

    name: Text
    state: Text
    owner: Text
    epoch: Count
    manifest: Text = ""


class GuestsReport(Message, frozen=True, kw_only=True):
    replace: bool = False
    guests: Annotated[list[GuestEntry], msgspec.Meta(max_length=MAX_NAMES)] = []
    removed: Names = []


class LinkEntry(Message, frozen=True, kw_only=True):
    """From `source` to the reporting site, unless `outgoing`: then from the reporting site to `source`."""

    source: Text
    rate_bps: Annotated[float, msgspec.Meta(gt=0, le=1e13)]
    rtt_s: Annotated[float, msgspec.Meta(ge=0, le=3600)]
    measured: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    outgoing: bool = False


class LinksReport(Message, frozen=True, kw_only=True):
    links: Annotated[list[LinkEntry], msgspec.Meta(max_length=MAX_NAMES)]


# -- fingerprints


def join(fingerprints: Sequence[bytes]) -> bytes:
    return b"".join(fingerprints)


def split(data: bytes) -> list[bytes]:
    """UsageError if it is no whole number of fingerprints."""
    if len(data) % FINGERPRINT:
        raise UsageError(f"{len(data)} bytes are no whole number of {FINGERPRINT}-byte fingerprints")
    return [data[at : at + FINGERPRINT] for at in range(0, len(data), FINGERPRINT)]
