"""The coordinator's answers one by one, and reports that are wrong or hostile."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from haulier.agent.routes import Call
from haulier.chunks.fingerprint import ZERO
from haulier.coordinator import bitmaps
from haulier.coordinator import messages as m
from haulier.coordinator.service import Coordinator
from haulier.coordinator.uploads import MOST, Uploads
from haulier.errors import Conflict, Corrupt, UnknownThing, UsageError
from tests.coordinator.samples import Clock, Site, fps, manifest, sqlite_coordinator


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def coordinator(tmp_path: Path, clock: Clock) -> Coordinator:
    return sqlite_coordinator(tmp_path, clock)


def holders(coordinator: Coordinator, numbers: range, site: str = "rome", limit: int = 16) -> m.HoldersAnswer:
    return coordinator.holders(m.HoldersQuery(fingerprints=m.join(fps(numbers)), site=site, limit=limit))


def link(coordinator: Coordinator, source: str, target: str, mbps: float, ms: float) -> None:
    entry = m.LinkEntry(source=source, rate_bps=mbps * 1e6, rtt_s=ms / 1000, measured=1.0)
    coordinator.link_report(target, m.LinksReport(links=[entry]))


def test_the_cheapest_come_first_and_nothing_that_somebody_has_is_missed(coordinator: Coordinator) -> None:
    Site(coordinator, "near").report(range(50))
    Site(coordinator, "far").report(range(100))
    Site(coordinator, "slow").report(range(90, 101))
    Site(coordinator, "rome").report(range(10))
    link(coordinator, "near", "rome", 100, 5)
    link(coordinator, "far", "rome", 50, 20)
    link(coordinator, "slow", "rome", 1, 200)
    answer = holders(coordinator, range(110))
    assert [source.site for source in answer.sources] == ["near", "far", "slow"]
    assert [source.held for source in answer.sources] == [50, 100, 11]
    assert answer.unheld == 9
    # with room for two only: chunk 100 is nowhere but at the slow one, and 50 to 99 not at the near one
    assert [source.site for source in holders(coordinator, range(110), limit=2).sources] == ["near", "far"]
    assert [source.site for source in holders(coordinator, range(95, 101), limit=2).sources] == ["far", "slow"]
    assert [source.site for source in holders(coordinator, range(60, 70), limit=1).sources] == ["far"]


def test_images_and_guests_of_the_fleet(coordinator: Coordinator, clock: Clock) -> None:
    for site in ("oslo", "lisbon"):
        Site(coordinator, site).has_manifest("image/web", range(5))
        Site(coordinator, site).has_manifest("guest/x", range(3))
    (image,) = coordinator.images()
    assert (image["name"], image["sites"]) == ("web", ["lisbon", "oslo"])
    said = [
        ("oslo", "granted", "lisbon", 2),
        ("lisbon", "ready", "oslo", 1),
        ("lisbon", "owner", "lisbon", 2),
        ("oslo", "away", "lisbon", 1),
    ]
    for site, state, owner, epoch in said:
        clock.now += 1
        entry = m.GuestEntry(name="web1", state=state, owner=owner, epoch=epoch)
        coordinator.guest_report(site, m.GuestsReport(guests=[entry]))
    (guest,) = coordinator.guests()
    assert (guest["owner"], guest["epoch"], guest["disputed"]) == ("lisbon", 2, False)
    assert guest["sites"]["oslo"]["state"] == "away"
    entry = m.GuestEntry(name="web1", state="owner", owner="oslo", epoch=2)
    coordinator.guest_report("oslo", m.GuestsReport(guests=[entry]))
    assert coordinator.guests()[0]["disputed"]
    coordinator.guest_report("oslo", m.GuestsReport(replace=True))
    coordinator.guest_report("lisbon", m.GuestsReport(removed=["web1", "never"]))
    assert coordinator.guests() == []


def test_a_manifest_is_kept_while_a_site_names_it(coordinator: Coordinator) -> None:
    oslo, lisbon = Site(coordinator, "oslo"), Site(coordinator, "lisbon")
    digest = oslo.has_manifest("image/web", range(5))
    # known: the second site is not asked for it
    made = manifest(range(5))
    entry = m.ManifestEntry(name="image/same", digest=digest, size=made.size)
    assert coordinator.manifests("lisbon", m.ManifestsReport(manifests=[entry])).unknown == []
    coordinator.manifests("oslo", m.ManifestsReport(removed=["image/web"]))
    assert len(coordinator.index.manifest(digest)) == 5
    lisbon.has_manifest("image/same", range(9))
    with pytest.raises(UnknownThing):
        coordinator.index.manifest(digest)
    with pytest.raises(UnknownThing):
        coordinator.image_holders(m.ImageQuery(digest=digest, site="oslo"))
    # and "all of that manifest" then says nothing
    assert coordinator.holdings("oslo", m.HoldingsReport(base=0, complete=[digest])).again


def test_the_zero_chunk_is_nobodys(coordinator: Coordinator) -> None:
    coordinator.holdings("oslo", m.HoldingsReport(base=0, added=ZERO * 3 + fps([1])[0]))
    assert coordinator.index.pairs() == 1


def test_popularity_fades_and_outlives_a_restart(tmp_path: Path, clock: Clock) -> None:
    one = sqlite_coordinator(tmp_path / "a", clock)
    Site(one, "oslo").report(range(4))
    for _ in range(8):
        holders(one, range(2))
    clock.now += 86400
    holders(one, range(1, 3))
    query = m.FactsQuery(fingerprints=m.join(fps(range(4))))
    assert one.facts(query).popularity == pytest.approx([4, 5, 1, 0], rel=1e-3)
    one.close()
    one.backend.close()
    clock.now += 86400
    two = sqlite_coordinator(tmp_path / "a", clock)
    assert two.facts(query).popularity == pytest.approx([2, 2.5, 0.5, 0], rel=1e-2)
    # a hundred half-lives later the scale starts over, and new requests count for one
    clock.now += 100 * 86400
    holders(two, range(3, 4))
    assert two.facts(query).popularity == pytest.approx([0, 0, 0, 1], abs=1e-6)


# -- hostile


def test_a_false_manifest_is_refused(coordinator: Coordinator) -> None:
    good, other = manifest(range(5)), manifest(range(6))
    entry = m.ManifestEntry(name="image/web", digest=good.digest, size=good.size)
    assert coordinator.manifests("oslo", m.ManifestsReport(manifests=[entry])).unknown == [good.digest]

    def send(data: bytes, digest: bytes = good.digest, site: str = "oslo") -> m.ManifestPartAnswer:
        return coordinator.manifest_part(site, m.ManifestPart(digest=digest, at=0, total=len(data), data=data))

    with pytest.raises(Corrupt, match="sent manifest"):
        send(other.encode())
    for damaged in (b"x", good.encode()[:-1], good.encode() + b"x", os.urandom(5000)):
        with pytest.raises(Corrupt):
            send(damaged)
    with pytest.raises(Conflict, match="has not reported"):
        send(other.encode(), other.digest)
    with pytest.raises(Conflict, match="has not reported"):
        send(good.encode(), site="lisbon")
    assert not coordinator.index.manifests
    assert send(good.encode()).complete and send(good.encode()).complete


def test_pieces_come_in_order_and_are_bounded() -> None:
    uploads = Uploads()

    def add(at: int, data: bytes, site: str = "oslo", total: int = 6) -> tuple[int, bytes | None]:
        return uploads.add(site, m.ManifestPart(digest=b"d" * 32, at=at, total=total, data=data))

    assert add(0, b"ab") == (2, None)
    assert add(0, b"ab") == (2, None), "sent twice"
    assert add(4, b"ef") == (2, None), "one is missing"
    assert add(2, b"cdefgh") == (2, None), "longer than the whole"
    assert add(2, b"cd", site="lisbon") == (0, None), "another's upload"
    assert add(2, b"cdef") == (6, b"abcdef")
    for number in range(MOST + 2):
        add(0, b"a", f"site{number}")
    assert add(1, b"b", "site0") == (0, None), "the oldest made room"
    assert add(1, b"b", f"site{MOST + 1}") == (2, None)


def read(kind: type, body: bytes) -> object:
    return Call("oslo", {}, body, {}).read(kind)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (m.HoldersQuery, {"site": "x", "fingerprints": "AA==", "limit": 0}),
        (m.HoldersQuery, {"site": "x", "fingerprints": "AA==", "limit": 65}),
        (m.HoldersQuery, {"site": "x" * 201, "fingerprints": "AA=="}),
        (m.HoldersQuery, {"site": "x", "fingerprints": "not base64!"}),
        (m.LackingQuery, {"site": "x"}),
        (m.LackingQuery, {"site": "x", "fingerprints": "AA==", "more": 1}),
        (m.HoldingsReport, {"base": -1}),
        (m.HoldingsReport, {"base": 1 << 62}),
        (m.HoldingsReport, {"base": 0, "complete": ["AA=="]}),
        (m.ManifestPart, {"digest": "AA==", "at": 0, "total": 1, "data": ""}),
        (m.LinksReport, {"links": [{"source": "x", "rate_bps": 0, "rtt_s": 0, "measured": 0}]}),
        (m.LinksReport, {"links": [{"source": "x", "rate_bps": 1, "rtt_s": -1, "measured": 0}]}),
        (m.LinksReport, {"links": [{"source": "x", "rate_bps": 1e14, "rtt_s": 1, "measured": 0}]}),
        (m.GuestsReport, {"guests": [{"name": "x", "state": "s", "owner": "o", "epoch": "3"}]}),
    ],
)
def test_messages_that_make_no_sense(kind: type, body: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        read(kind, msgspec.json.encode(body))


def test_bounds(coordinator: Coordinator) -> None:
    many = b"x" * 32 * (m.BATCH + 1)
    with pytest.raises(UsageError):
        read(m.LackingQuery, msgspec.json.encode({"site": "x", "fingerprints": many}))
    with pytest.raises(UsageError):
        read(m.ManifestsReport, msgspec.json.encode({"removed": ["x"] * (m.MAX_NAMES + 1)}))
    for cut in (b"x", b"x" * 33):
        with pytest.raises(UsageError, match="whole number"):
            coordinator.lacking(m.LackingQuery(site="oslo", fingerprints=cut))
        with pytest.raises(UsageError, match="whole number"):
            coordinator.holdings("oslo", m.HoldingsReport(base=0, added=cut))
    assert coordinator.sites() == []


def test_damaged_bits_are_said() -> None:
    with pytest.raises(Corrupt):
        bitmaps.unpack(b"\0" * 3, 100)
    with pytest.raises(Corrupt, match="holdings"):
        bitmaps.load(b"nonsense", "holdings of x")


def test_slices_cut_where_they_should() -> None:
    import numpy as np

    edge = 1 << bitmaps.SLICE_BITS
    ids = np.array([0, edge - 1, edge, 5 * edge + 3, bitmaps.MAX_IDS - 1], dtype=np.int64)
    bits = bitmaps.of_ids(ids)
    numbers = bitmaps.slices(bits)
    assert numbers == [0, 1, 5, (1 << 32 - bitmaps.SLICE_BITS) - 1]
    parts = [bitmaps.one_slice(bits, number) for number in numbers]
    assert [bitmaps.to_ids(part).tolist() for part in parts] == [
        [0, edge - 1],
        [edge],
        [5 * edge + 3],
        [bitmaps.MAX_IDS - 1],
    ]
    assert bitmaps.slices(bitmaps.empty()) == []
