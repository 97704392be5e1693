"""Images pushed between two stores over a real session: what is sent, what is kept, what is refused."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from haulier.chunks.blocks import BlockIndex
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Cancelled, Conflict, Corrupt, HaulierError, NoRoom
from haulier.guests import golden_scrub
from haulier.guests.golden import Golden, GoldenMeta, block_fingerprints
from haulier.images import arrival, layers, push, snapshots
from haulier.images.messages import PushAccept, PushOffer
from haulier.memory.base import MemoryBase
from haulier.session import Session
from haulier.units import BLOCK, CHUNK
from tests.support import goldens
from tests.support.certs import TestCa
from tests.support.qemustream import PAGE, mapped_ram

Progress = Callable[[float, str], None]


def blocks(*seeds: int) -> bytes:
    """A chunk of sixteen blocks that do not compress."""
    return b"".join(random.Random(seed).randbytes(BLOCK) for seed in seeds)


def chunk(number: int) -> bytes:
    return blocks(*range(number * 16, number * 16 + 16))


def shifted(number: int) -> bytes:
    """The same blocks as two neighbouring chunks have, cut elsewhere: as an image that was built independently."""
    return blocks(*range(number * 16 + 5, number * 16 + 21))


def quiet(share: float, what: str) -> None:
    pass


def keep(store: ChunkStore, name: str, data: list[bytes], **meta: Any) -> Manifest:
    manifest = Manifest(len(data) * CHUNK, b"".join(store.put(each) for each in data))
    store.save_manifest(f"image/{name}", manifest, meta)
    return manifest


@dataclass
class Sites:
    """Two sites of a fleet, with their stores."""

    root: Path
    here: ChunkStore
    there: ChunkStore
    ca: TestCa
    errors: list[HaulierError] = field(default_factory=list)
    session: Session | None = None
    thread: threading.Thread | None = None
    elsewhere: arrival.Elsewhere | None = None

    def goldens(self, site: str) -> Path:
        path = self.root / f"golden-{site}"
        path.mkdir(exist_ok=True)
        return path

    def offer_push(self, offer: PushOffer) -> PushAccept:
        accept = arrival.look(self.there, self.goldens("lisbon"), offer)
        if arrival.complete(offer, accept):
            return accept
        session = Session.listen(self.ca.site("lisbon", peer="oslo"), bytes.fromhex(offer.secret), bind=["127.0.0.1"])
        self.session = session

        def work() -> None:
            try:
                with self.there.sibling() as own:
                    arrival.Arrival(
                        own, self.goldens("lisbon"), session, "oslo", offer.push, lambda text: None, self.elsewhere
                    ).run()
            except HaulierError as error:
                self.errors.append(error)
            finally:
                session.close(linger_s=3)

        self.thread = threading.Thread(target=work)
        self.thread.start()
        return msgspec.structs.replace(accept, port=session.port, bulk=("127.0.0.1",))

    def push(self, name: str, progress: Progress = quiet) -> dict[str, Any]:
        tls = self.ca.site("oslo", peer="lisbon")
        try:
            return push.Push(self.here, self.goldens("oslo"), tls, name, progress).run(self)
        finally:
            if self.thread is not None:
                self.thread.join(20)
                assert not self.thread.is_alive()


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    with ChunkStore(tmp_path / "here") as here, ChunkStore(tmp_path / "there") as there:
        yield Sites(tmp_path, here, there, TestCa(tmp_path / "ca"))


def test_an_image_arrives_with_the_layers_below_it_and_only_once(sites: Sites) -> None:
    data = [chunk(number) for number in range(40)]
    keep(sites.here, "debian", data, created=1.0)
    data[3] = chunk(100)
    keep(sites.here, "web", data, parent="debian", guest="g")
    report = sites.push("web")
    assert report["layers"] == ["debian", "web"]
    assert [(item["name"], item["lacking"]) for item in report["items"]] == [("debian", 40), ("web", 1)]
    assert report["wire_bytes"] > 41 * CHUNK
    for name in ("debian", "web"):
        theirs, ours = layers.facts(sites.there, name), layers.facts(sites.here, name)
        assert theirs == ours
        assert sites.there.missing(sites.there.load_manifest(f"image/{name}").unique()) == []
    assert sites.there.manifest_names("incoming/") == [] and sites.there.leases() == []
    assert sites.here.leases() == []
    again = sites.push("web")
    assert again["items"] == [] and again["wire_bytes"] == 0


def test_disks_that_are_too_large_together_are_refused(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests of zeros are short on the wire, and not in memory."""
    monkeypatch.setattr(arrival, "MAX_DISKS", 60 * CHUNK)
    data = [chunk(number) for number in range(40)]
    keep(sites.here, "debian", data)
    keep(sites.here, "web", data[:30], parent="debian", guest="g")
    with pytest.raises(NoRoom, match="push the layers one by one"):
        sites.push("web")
    assert sites.there.manifest_names() == [] and sites.there.leases() == []
    assert sites.push("debian")["items"]


def test_chunks_are_told_by_blocks_that_the_other_site_has(sites: Sites) -> None:
    for store in (sites.here, sites.there):
        keep(store, "debian", [chunk(number) for number in range(40)])
    keep(sites.here, "rebuilt", [shifted(number) for number in range(39)])
    report = sites.push("rebuilt")
    (item,) = report["items"]
    assert item["lacking"] == item["recipes"] == 39 and item["whole"] == 0
    # As blocks each chunk takes a few bytes.
    assert item["wire_bytes"] < 39 * CHUNK / 50
    assert sites.there.load_manifest("image/rebuilt") == sites.here.load_manifest("image/rebuilt")


def test_a_cancelled_push_leaves_what_arrived_for_the_next_one(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "COMMIT_BYTES", 1)
    monkeypatch.setattr(push, "TELL_S", 0.01)
    keep(sites.here, "debian", [chunk(number) for number in range(600)])
    share = 0.0

    def stop(now: float, what: str) -> None:
        nonlocal share
        share = now
        if now > 0.3:
            raise Cancelled("push of debian was cancelled")

    with pytest.raises(Cancelled):
        sites.push("debian", stop)
    assert 0.3 < share < 1 and sites.errors
    assert sites.there.manifest_names("image/") == []
    assert len(sites.there.manifest_names("incoming/push-")) == 1
    (item,) = sites.push("debian")["items"]
    assert 0 < item["lacking"] < 590, "what had arrived is not sent again"
    assert sites.there.manifest_names() == ["image/debian"]


def test_what_other_sites_bring_is_not_sent(sites: Sites) -> None:
    data = [chunk(number) for number in range(300)]
    keep(sites.here, "debian", data)
    begun = threading.Event()
    asked: list[bytes] = []

    def elsewhere(
        store: ChunkStore, lacking: list[bytes], lease: str, enough: Callable[[], bool], came: Callable[[bytes], None]
    ) -> None:
        asked.extend(lacking)
        for fp in lacking[:100]:
            store.put(data[fps.index(fp)], fp, lease)
            came(fp)
        begun.set()

    fps = [sites.here.put(each) for each in data]
    sites.elsewhere = elsewhere
    (item,) = sites.push("debian")["items"]
    assert begun.is_set() and asked == fps[::-1]
    assert 0 < item["elsewhere"] <= 100 and item["whole"] == 300 - item["elsewhere"]
    assert sites.there.missing(sites.there.load_manifest("image/debian").unique()) == []


def test_another_image_of_that_name_is_refused_before_anything_is_sent(sites: Sites) -> None:
    keep(sites.here, "debian", [chunk(1)])
    keep(sites.there, "debian", [chunk(2)])
    with pytest.raises(Conflict, match="another image 'debian'"):
        sites.push("debian")
    assert sites.session is None


def test_no_room_there(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(sites.here, "debian", [chunk(1)])
    monkeypatch.setattr(arrival, "SLACK", 1 << 60)
    with pytest.raises(NoRoom, match=r"lisbon.*free"):
        sites.push("debian")
    assert sites.there.manifest_names("image/") == []


# -- golden snapshots ----------------------------------------------------------------------------------------------


def snapshot(sites: Sites, image: Manifest, disk: Manifest) -> GoldenMeta:
    """A golden snapshot of `image` at oslo, whose memory has a page that is a block of the disk."""
    root = sites.goldens("oslo")
    half = root / "half"
    half.mkdir()
    pages = {number: random.Random(1000 + number).randbytes(PAGE) for number in range(8)}
    pages |= {100 + number: chunk(1)[number * BLOCK : (number + 1) * BLOCK] for number in range(16)}
    mapped_ram(half / "memory", {"ram0": pages}, {"ram0": 4096 * PAGE})
    base = MemoryBase.from_mapped_ram(half / "memory")
    meta = goldens.meta(
        image_manifest=image.digest.hex(),
        manifest=disk.digest.hex(),
        memory=base.digest.hex(),
        memory_size=(half / "memory").stat().st_size,
        memory_mib=16,
        disk_size=disk.size,
    )
    base.close()
    BlockIndex.build(sites.here, block_fingerprints(disk)).save(half / "blocks.idx")
    (half / "meta.json").write_bytes(msgspec.json.encode(meta))
    half.rename(root / meta.id)
    sites.here.save_manifest(f"golden/{meta.id}", disk)
    return meta


def test_golden_snapshots_come_along(sites: Sites) -> None:
    data = [chunk(number) for number in range(8)]
    image = keep(sites.here, "debian", data)
    disk = Manifest(image.size, b"".join(sites.here.put(each) for each in [*data[:7], chunk(50)]))
    meta = snapshot(sites, image, disk)
    report = sites.push("debian")
    assert [(item["kind"], item["lacking"] > 0) for item in report["items"]] == [
        ("image", True),
        ("golden", True),
        ("memory", True),
    ]
    assert report["items"][2]["recipes"] >= 1, "pages of memory are blocks of the disk"
    there = Golden.load(sites.goldens("lisbon") / meta.id)
    assert there.meta == meta
    golden_scrub.verify(there)
    ours = Golden.load(sites.goldens("oslo") / meta.id)
    assert there.memory.read_bytes() == ours.memory.read_bytes()
    assert there.memory.stat().st_blocks * 512 < there.memory.stat().st_size / 4, "holes stay holes"
    index = BlockIndex.load(there.index)
    assert len(index) == len(BlockIndex.load(ours.index))
    assert sites.there.manifest_names() == [f"golden/{meta.id}", "image/debian"]
    assert sites.push("debian")["items"] == []


def test_a_snapshot_that_is_not_what_its_id_says_is_not_kept(sites: Sites) -> None:
    image = keep(sites.here, "debian", [chunk(number) for number in range(8)])
    meta = snapshot(sites, image, image)
    golden = Golden.load(sites.goldens("oslo") / meta.id)
    with golden.memory.open("r+b") as file:
        file.seek((1 << 20) + 50)
        file.write(b"wrong")
    with pytest.raises(Corrupt, match="arrived damaged"):
        sites.push("debian")
    assert list(sites.goldens("lisbon").iterdir()) == []


def test_notes_about_a_snapshot_are_checked(sites: Sites) -> None:
    image = keep(sites.here, "debian", [chunk(1)])
    meta = snapshot(sites, image, image)
    notes = msgspec.to_builtins(meta)
    assert snapshots.read_meta(notes, meta.id) == meta
    for wrong in ({"memory": "00" * 32}, {"memory_size": -1}, {"vcpus": "x"}, {"id": "00" * 32}):
        with pytest.raises(Corrupt):
            snapshots.read_meta(notes | wrong, meta.id)
    with pytest.raises(Corrupt):
        snapshots.read_meta({}, "")
