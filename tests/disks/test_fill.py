"""A disk that is filled while it is read: what is not here comes, also after nobody could be asked for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.disks import fill
from haulier.disks.fill import Filler, Mode
from haulier.disks.heat import Heat
from haulier.errors import Conflict, NoRoom, UsageError
from haulier.fetch import wire
from haulier.fetch.source import Events, Source
from haulier.units import CHUNK

COUNT = 4
CHUNKS = [bytes([number + 1]) * CHUNK for number in range(COUNT)]
MANIFEST = Manifest(COUNT * CHUNK, b"".join(fingerprint(data) for data in CHUNKS))


class Shelf:
    """A source in this process."""

    name = "shelf"
    cost = 0.0
    tells = False

    def __init__(self) -> None:
        self.wanted: asyncio.Queue[bytes] = asyncio.Queue()

    async def run(self, events: Events) -> None:
        events.up(self.name, 0.01)
        while True:
            fp = await self.wanted.get()
            data = next(data for data in CHUNKS if fingerprint(data) == fp)
            events.data(self.name, fp, wire.RAW, data, CHUNK)

    def ask(self, fingerprints: Sequence[bytes], urgent: bool) -> None:
        for fp in fingerprints:
            self.wanted.put_nowait(fp)

    def hurry(self, fingerprints: Sequence[bytes]) -> None: ...
    def inquire(self, fingerprints: Sequence[bytes]) -> None: ...
    def probe(self) -> None: ...


class Searching:
    """Tells the sources, once its site.toml has been mended."""

    def __init__(self) -> None:
        self.mended = False
        self.asked = 0

    def __call__(self) -> list[Source]:
        self.asked += 1
        if not self.mended:
            raise UsageError("site.toml: unknown setting 'colour'")
        return [Shelf()]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def until_whole(filler: Filler) -> None:
    await until(lambda: not filler.facts()["missing"] and filler.fetched >= COUNT)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COMMIT_S", 0.02), ("AGAIN_S", 0.05), ("SOURCES_S", 0.05)):
        monkeypatch.setattr(fill, name, value)


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.BACKGROUND])
def test_that_nobody_could_be_asked_is_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    hurry(monkeypatch)
    searching = Searching()

    async def reads(store: ChunkStore) -> None:
        filler = Filler(store, Heat(COUNT), searching, mode)
        try:
            await filler.follow("guest/web1", MANIFEST)
            with pytest.raises(UsageError, match="colour"):
                await filler.get(MANIFEST[0])
            # The agent lets a guest go on that stopped at a read only where nothing of this is left.
            assert filler.facts()["unserved"] == 1
            searching.mended = True
            if mode is Mode.OFF:
                await until(lambda: not filler.facts()["unserved"])
                assert filler.fetched == 1, "nothing but what was read"
                filler.set_mode(Mode.FULL)
            await until_whole(filler)
            assert filler.facts()["unserved"] == 0
        finally:
            await filler.close()

    with ChunkStore(tmp_path / "store") as store:
        store.save_manifest("guest/web1", MANIFEST, partial=True)
        asyncio.run(reads(store))
        assert [store.get(fp) for fp in MANIFEST.chunks()] == CHUNKS
    assert searching.asked >= 2


def test_a_chunk_of_no_place_is_no_obstacle_to_the_others(tmp_path: Path) -> None:
    """One that was here when the disk was opened, and was found corrupt when it was read."""
    searching = Searching()
    searching.mended = True

    async def reads(store: ChunkStore) -> None:
        filler = Filler(store, Heat(COUNT), searching, Mode.OFF)
        try:
            await filler.follow("guest/web1", MANIFEST)
            del filler._places[MANIFEST[2]]
            filler.set_mode(Mode.FULL)
            await filler.get(MANIFEST[2])
            await until_whole(filler)
        finally:
            await filler.close()

    with ChunkStore(tmp_path / "store") as store:
        store.save_manifest("guest/web1", MANIFEST, partial=True)
        asyncio.run(reads(store))


class Failing(ChunkStore):
    """Has no room for the first so many chunks; commits fail so often, with what was put thrown away or not."""

    puts = 0
    commits = 0
    throws_away = False

    def put(self, data: Any, fp: bytes | None = None, lease: str = "") -> bytes:
        if self.puts:
            self.puts -= 1
            raise NoRoom("no room left")
        return super().put(data, fp, lease)

    def commit(self) -> None:
        if self.commits:
            self.commits -= 1
            if self.throws_away:
                self._forget()
                raise NoRoom("fdatasync failed")
            raise Conflict("the index stayed locked")
        super().commit()


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.BACKGROUND])
def test_a_chunk_that_could_not_be_kept_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    hurry(monkeypatch)
    searching = Searching()
    searching.mended = True

    async def reads(store: Failing) -> None:
        filler = Filler(store, Heat(COUNT), searching, mode)
        try:
            store.puts = COUNT
            await filler.follow("guest/web1", MANIFEST)
            # One that is not read again: its guest has stopped.
            with pytest.raises(NoRoom):
                await filler.get(MANIFEST[0])
            assert filler.facts()["unserved"] == 1
            await until(lambda: not filler.facts()["unserved"])
            filler.set_mode(Mode.FULL)
            await until(lambda: filler._tidying is None)
            assert "error" not in filler.facts()
        finally:
            await filler.close()

    with Failing(tmp_path / "store") as store:
        store.save_manifest("guest/web1", MANIFEST, partial=True)
        asyncio.run(reads(store))
        assert [store.get(fp) for fp in MANIFEST.chunks()] == CHUNKS


@pytest.mark.parametrize("throws_away", [False, True])
def test_what_could_not_be_committed_is_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, throws_away: bool
) -> None:
    hurry(monkeypatch)
    searching = Searching()
    searching.mended = True

    async def fills(store: Failing) -> None:
        filler = Filler(store, Heat(COUNT), searching, Mode.FULL)
        try:
            store.commits, store.throws_away = 2, throws_away
            await filler.follow("guest/web1", MANIFEST)
            await until(lambda: not store.commits and filler._tidying is None)
            with store.sibling() as agent:
                assert agent.missing(MANIFEST.unique()) == []
        finally:
            await filler.close()

    with Failing(tmp_path / "store") as store:
        store.save_manifest("guest/web1", MANIFEST, partial=True)
        asyncio.run(fills(store))


class Away(Shelf):
    """A source that cannot be reached."""

    async def run(self, events: Events) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("how", ["comes with the handoff", "is of the new disk no more"])
def test_who_waits_goes_on_when_a_copy_begins_to_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """QEMU reads the first sector as it starts, and nobody can be asked for it yet."""
    hurry(monkeypatch)

    async def waits(store: ChunkStore) -> None:
        filler = Filler(store, Heat(COUNT), lambda: [Away()], Mode.OFF)
        try:
            filler.arriving("guest/web1", MANIFEST)
            read = asyncio.create_task(filler.get(MANIFEST[0]))
            await until(lambda: filler._fetcher)
            if how == "comes with the handoff":
                turns, look = [], filler._look

                async def counted(asked: set[bytes]) -> None:
                    turns.append(asked)
                    await look(asked)

                monkeypatch.setattr(filler, "_look", counted)
                filler.arriving("incoming/h1", MANIFEST)
                await until(lambda: len(turns) > 3)
                assert not read.done() and filler.facts()["missing"] == 1
                store.put(CHUNKS[0])
            else:
                filler.arriving("incoming/h1", MANIFEST.replace({0: MANIFEST[1]}))
            async with asyncio.timeout(20):
                await read
            await until(lambda: filler._tidying is None)
            assert (filler.facts()["missing"], filler.facts()["unserved"]) == (0, 0)
        finally:
            await filler.close()

    with ChunkStore(tmp_path / "store") as store:
        asyncio.run(waits(store))
