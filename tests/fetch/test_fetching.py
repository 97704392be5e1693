"""Chunks between real agents, and from a real S3 server; stand-ins only for a site that lies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, TCPConnector

from haulier.agent import authority
from haulier.agent.publishing import publish
from haulier.agent.server import Agent
from haulier.agent.site import Site
from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Cancelled, Corrupt, PeerError, UnknownThing, UsageError
from haulier.fetch import wire
from haulier.fetch.fetching import fetch
from haulier.fetch.holders import hints, sources_of
from haulier.fetch.origin import OriginSource, key, upload
from haulier.fetch.scheduler import Urgency
from haulier.units import CHUNK
from tests.support import agents
from tests.support.agents import make_site, running
from tests.support.waiting import wait_for

COUNT = 60


def chunk(number: int) -> bytes:
    return number.to_bytes(8, "little") * (CHUNK // 8)


CHUNKS = [chunk(number + 1) for number in range(COUNT)]
FPS = [fingerprint(data) for data in CHUNKS]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Site, Site]]:
    """Three sites of one fleet; the second holds the even chunks, the third all but the last."""
    root = tmp_path_factory.mktemp("fetch")
    first = make_site(root / "one", "one")
    with running(first):
        second = agents.join(first, root / "two", "two")
        third = agents.join(first, root / "three", "three")
        with running(second) as two, running(third) as three:
            for data in CHUNKS[::2]:
                two.store.put(data, lease="test")
            for data in CHUNKS[:-1]:
                three.store.put(data, lease="test")
            two.store.commit(), three.store.commit()
            # the first learnt of the others when they joined; they of it by joining
            yield first, second, third


def test_chunks_come_from_whoever_holds_them(sites: tuple[Site, Site, Site], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with ChunkStore(tmp_path / "store") as store:
        store.put(CHUNKS[0], lease="here")
        store.commit()
        report = fetch(FPS[:-1], sources_of(sites[0]), store, lease="test", progress=lambda *now: seen.append(now))
        assert report.chunks == COUNT - 2
        assert report.here == 1
        by = {source.name: source.chunks for source in report.sources}
        assert by["two"] > 0
        assert by["three"] >= COUNT // 2 - 1
        assert all(store.get(fp) == data for fp, data in zip(FPS[:-1], CHUNKS[:-1], strict=True))
        assert seen[-1] == (COUNT - 2, COUNT - 2)
    # durable, and kept by the lease
    with ChunkStore(tmp_path / "store") as store:
        store.gc()
        assert store.missing(FPS) == [FPS[-1]]


def test_what_nobody_holds_is_said(sites: tuple[Site, Site, Site], tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        with pytest.raises(PeerError, match="1 chunks came from nowhere"):
            fetch(FPS[-3:], sources_of(sites[0]), store, lease="test", stall_s=1.0)
        assert store.missing(FPS[-3:]) == [FPS[-1]]
        with pytest.raises(PeerError, match="no source is known"):
            fetch(FPS[-1:], [], store, stall_s=0.1)
        with pytest.raises(Cancelled):
            fetch(FPS[-1:], sources_of(sites[0]), store, cancelled=lambda: True)


class Wrong:
    """Hints that are wrong, and one who cannot be asked."""

    def holders(self, fingerprints: Any) -> dict[str, list[bytes]]:
        return {"two": list(fingerprints), "elsewhere": list(fingerprints)}


class Silent:
    def holders(self, fingerprints: Any) -> dict[str, list[bytes]]:
        raise PeerError("gone")


def test_wrong_hints_cost_a_round_trip_only(sites: tuple[Site, Site, Site], tmp_path: Path) -> None:
    assert hints(Silent(), FPS) == {}
    with ChunkStore(tmp_path / "store") as store:
        fetch(FPS[:-1], sources_of(sites[0]), store, hints=hints(Wrong(), FPS[:-1]), urgency=Urgency.DEMAND)
        assert store.missing(FPS[:-1]) == []


class Lying:
    """A stand-in for a site: says that it has everything and gives something else."""

    cost = 0.0
    tells = True
    name = "liar"

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.events: Any = None

    async def run(self, events: Any) -> None:
        self.events = events
        events.up(self.name, 0.0001)
        await asyncio.Event().wait()

    def ask(self, fingerprints: Any, urgent: bool) -> None:
        for fp in fingerprints:
            asyncio.get_running_loop().call_soon(self.events.data, self.name, fp, wire.ZSTD, self.packed, 100)

    def hurry(self, fingerprints: Any) -> None: ...

    def inquire(self, fingerprints: Any) -> None:
        asyncio.get_running_loop().call_soon(self.events.holdings, self.name, fingerprints, [])

    def probe(self) -> None: ...


@pytest.mark.parametrize(
    "packed", [b"nonsense", wire.data(FPS[0], bytes(CHUNK))[34:], wire.data(FPS[0], chunk(99999))[34:]]
)
def test_a_source_that_lies_is_dropped(sites: tuple[Site, Site, Site], tmp_path: Path, packed: bytes) -> None:
    with ChunkStore(tmp_path / "store") as store:
        report = fetch(FPS[1:-1], [Lying(packed), *sources_of(sites[0])], store)
        assert [(s.name, s.dropped) for s in report.sources if s.dropped] == [("liar", True)]
        assert all(store.get(fp) == data for fp, data in zip(FPS[1:-1], CHUNKS[1:-1], strict=True))


def test_a_bomb_is_no_chunk() -> None:
    from haulier.compress import zstd

    with pytest.raises(Corrupt):
        wire.unpack(wire.ZSTD, zstd.compress(bytes(1 << 26), 19), FPS[0])


async def _raw(site: Site, caller: Site | None, *frames: bytes) -> list[Any]:
    """What the service of `site` says to a caller that may be anybody."""
    context = authority.client_context(caller) if caller else authority.joining_context(None)
    async with ClientSession(connector=TCPConnector(ssl=context)) as session:
        name = authority.server_name(site.name)
        async with session.ws_connect(f"https://{site.control}{wire.PATH}", server_hostname=name) as stream:
            for frame in frames:
                await stream.send_bytes(frame)
            answers = [message.data async for message in stream]
    await asyncio.sleep(0.05)  # asyncio closes a TLS connection some turns after it was told to
    return answers


def test_the_service_is_for_sites_of_the_fleet_only(sites: tuple[Site, Site, Site], tmp_path: Path) -> None:
    from aiohttp import ClientError

    with pytest.raises(ClientError):
        asyncio.run(_raw(sites[1], None, wire.ping(wire.PING, 1)))
    stranger = make_site(tmp_path / "stranger", "stranger")
    with pytest.raises(ClientError):
        asyncio.run(_raw(sites[1], stranger, wire.ping(wire.PING, 1)))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff",
        wire.fingerprints(wire.WANT, [])[:3],
        wire.fingerprints(wire.WANT, [bytes(31)]),
        wire.fingerprints(wire.HAVE, []),
        wire.ping(wire.PING, 1) + b"x",
        wire.fingerprints(wire.WANT, [bytes(32)] * (wire.MAX_FINGERPRINTS + 1)),
        bytes([wire.DATA]) * 100,
    ],
)
def test_nonsense_ends_the_connection_and_nothing_else(sites: tuple[Site, Site, Site], frame: bytes) -> None:
    assert asyncio.run(asyncio.wait_for(_raw(sites[1], sites[0], frame), 10)) == []


# -- the object store ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A local S3 server with a bucket "chunks"; its address."""
    from moto.server import ThreadedMotoServer

    wanted = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "eu-north-1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    import urllib.request

    made = urllib.request.Request(
        f"{endpoint}/chunks",
        method="PUT",
        data=b"<CreateBucketConfiguration><LocationConstraint>eu-north-1</LocationConstraint></CreateBucketConfiguration>",
    )
    urllib.request.urlopen(made).close()
    yield endpoint
    server.stop()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


def test_an_object_store_gives_what_no_site_holds(sites: tuple[Site, Site, Site], s3: str, tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "origin") as store:
        for data in CHUNKS:
            store.put(data)
        assert upload(store, FPS, "s3://chunks/fleet", s3)[0] == COUNT
        assert upload(store, FPS, "s3://chunks/fleet", s3)[0] == 0
    source = OriginSource("s3://chunks/fleet", s3)
    with ChunkStore(tmp_path / "alone") as store:
        assert fetch(FPS, [source], store).chunks == COUNT
    with ChunkStore(tmp_path / "both") as store:
        report = fetch(FPS, [OriginSource("s3://chunks/fleet", s3), *sources_of(sites[0])], store)
        by = {found.name: found.chunks for found in report.sources}
        assert by["origin"] >= 1
        assert store.missing(FPS) == []


def test_an_image_is_published(sites: tuple[Site, Site, Site], s3: str, tmp_path: Path) -> None:
    root = tmp_path / "pub"
    site = make_site(root, "pub")
    with running(site) as agent:
        image = Manifest(3 * CHUNK, b"".join(agent.store.put(chunk(1000 + n)) for n in range(3)))
        agent.store.save_manifest("image/debian", image)
        with pytest.raises(UsageError, match="no object store"):
            agents_publish(agent, "debian")
    config = site.root / "site.toml"
    config.write_text(config.read_text() + f'origin = "s3://chunks/published"\norigin_endpoint = "{s3}"\n')
    with running(Site.load(root)) as agent:
        assert agents_publish(agent, "debian")["sent_chunks"] == 3
        assert agents_publish(agent, "debian")["sent_chunks"] == 0
        (origin,) = sources_of(agent.site, only=["origin"])
    with ChunkStore(tmp_path / "there") as store:
        assert fetch(image.unique(), [origin], store).chunks == 3


def agents_publish(agent: Agent, image: str) -> dict[str, Any]:
    job = publish(agent.core, agent.store, image)
    wait_for(lambda: agent.core.jobs.get(job.id).state != "running", 30)
    done = agent.core.jobs.get(job.id)
    assert done.state == "done", done.error
    return dict(done.result)


def test_an_object_with_other_contents_is_not_believed(s3: str, tmp_path: Path) -> None:
    import obstore

    from haulier.fetch.origin import open_store

    bucket, _ = open_store("s3://chunks/bad", s3)
    with ChunkStore(tmp_path / "store") as store:
        obstore.put(bucket, key("bad", FPS[0]), wire.data(FPS[1], CHUNKS[1])[34:])
        with pytest.raises(PeerError, match="other contents"):
            fetch(FPS[:1], [OriginSource("s3://chunks/bad", s3)], store, stall_s=0.5)
        assert store.missing(FPS[:1]) == FPS[:1]


def test_an_object_store_that_is_away_is_waited_for(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        store.put(CHUNKS[0])
        with pytest.raises(PeerError, match="nowhere"):
            fetch(FPS[1:2], [OriginSource("s3://chunks", f"http://127.0.0.1:{agents.free_port()}")], store, stall_s=1)
        with pytest.raises(UnknownThing):
            store.get(FPS[1])


def test_requests_are_served_in_their_order_but_for_the_urgent(sites: tuple[Site, Site, Site]) -> None:
    many = wire.fingerprints(wire.WANT, FPS[:-1])
    now = wire.fingerprints(wire.WANT_NOW, FPS[40:41])

    async def ask() -> list[bytes]:
        context = authority.client_context(sites[0])
        async with ClientSession(connector=TCPConnector(ssl=context)) as session:
            name = authority.server_name("three")
            async with session.ws_connect(f"https://{sites[2].control}{wire.PATH}", server_hostname=name) as stream:
                await stream.send_bytes(many)
                await stream.send_bytes(now)
                order = [wire.read_data((await stream.receive()).data)[0] for _ in range(20)]
        await asyncio.sleep(0.05)
        return order

    order = asyncio.run(ask())
    assert FPS[40] in order
