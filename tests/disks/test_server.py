"""The export's server, asked by our own client and by QEMU's."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.store import ChunkStore
from haulier.disks import nbdproto as p
from haulier.disks.nbd import Extent, NbdReader
from haulier.errors import Conflict, GuestError, UnknownThing
from haulier.units import CHUNK
from tests.disks.serving import DictStore, serving
from tests.support.waiting import wait_for

SIZE = 40 * CHUNK + 512


def noise(seed: int) -> bytes:
    return bytes([seed % 251]) * 100 + os.urandom(CHUNK - 100)


def test_contents_come_as_in_the_manifest(tmp_path: Path) -> None:
    store = DictStore()
    chunks = {n: noise(n) for n in (0, 1, 2, 7, 39)} | {40: b"tail" * 128}
    want = b"".join(chunks.get(n, bytes(CHUNK)) for n in range(40)) + chunks[40]
    with serving(store, store.disk(chunks, SIZE), tmp_path / "s"):
        with NbdReader(tmp_path / "s", "disk0", [p.ALLOCATION]) as reader:
            assert reader.size == SIZE
            assert b"".join(bytes(d) for _, d in reader.read_many(range(0, SIZE, CHUNK), CHUNK)) == want
            assert reader.read(CHUNK - 10, 5 * CHUNK) == want[CHUNK - 10 : 6 * CHUNK - 10]
            assert reader.read(SIZE - 4, 4096) == want[-4:]
            holes = [e for e in reader.extents(p.ALLOCATION) if e.flags == p.STATE_HOLE | p.STATE_ZERO]
            assert holes == [Extent(3 * CHUNK, 4 * CHUNK, 3), Extent(8 * CHUNK, 31 * CHUNK, 3)]


def test_qemu_reads_the_same(tmp_path: Path) -> None:
    store = DictStore()
    chunks = {n: noise(n) for n in range(0, 40, 3)}
    raw = tmp_path / "raw"
    raw.write_bytes(b"".join(chunks.get(n, bytes(CHUNK)) for n in range(40)) + bytes(512))
    with serving(store, store.disk(chunks, SIZE), tmp_path / "s"):
        uri = f"nbd+unix:///disk0?socket={tmp_path}/s"
        done = subprocess.run(
            ["qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri], capture_output=True, check=False
        )
        assert done.returncode == 0, done
        mapped = subprocess.run(["qemu-img", "map", "--output=json", uri], capture_output=True, check=True).stdout
        assert mapped.count(b'"zero": true') == 14


def test_a_swap_is_seen_by_the_next_request(tmp_path: Path) -> None:
    store = DictStore()
    old, new = store.disk({5: noise(1)}, SIZE), store.disk({5: noise(2)}, SIZE)
    with serving(store, old, tmp_path / "s") as running, NbdReader(tmp_path / "s", "disk0") as reader:
        assert reader.read(5 * CHUNK, CHUNK) == store[old[5]]
        running.call(running.server.swap, new)
        assert reader.read(5 * CHUNK, CHUNK) == store[new[5]]
        with pytest.raises(Conflict, match="size"):
            running.call(running.server.swap, store.disk({}, SIZE + 512))


def test_a_request_never_mixes_two_manifests(tmp_path: Path) -> None:
    store = DictStore()
    old, new = store.disk({0: noise(1), 1: noise(2)}, SIZE), store.disk({0: noise(3), 1: noise(4)}, SIZE)
    late = store.pop(old[1])
    with serving(store, old, tmp_path / "s") as running, NbdReader(tmp_path / "s", "disk0") as reader:
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(reader.read(0, 2 * CHUNK)))
        thread.start()
        wait_for(lambda: running.server.counters.waiting)
        running.call(running.server.swap, new)
        thread.join(20)
        assert got == [store[new[0]] + store[new[1]]]
        assert late not in got[0]


def test_one_slow_chunk_holds_up_nobody_else(tmp_path: Path) -> None:
    store = DictStore()
    disk = store.disk({n: noise(n) for n in range(8)}, SIZE)
    opened = threading.Event()
    slow = disk[0]
    store.gate = lambda fp: opened.wait(20) and None if fp == slow else None  # type: ignore[method-assign]
    with serving(store, disk, tmp_path / "s"), NbdReader(tmp_path / "s", "disk0") as reader:
        waiting = reader._request(p.CMD_READ, 0, CHUNK)
        quick = reader._request(p.CMD_READ, CHUNK, CHUNK)
        kind, done, handle, length = reader._head()
        assert (handle, kind, done) == (quick, p.CHUNK_OFFSET_DATA, True)
        reader._receive(length)
        opened.set()
        assert reader._head()[2] == waiting


def test_a_missing_chunk_is_waited_for(tmp_path: Path) -> None:
    store = DictStore()
    disk = store.disk({3: noise(3)}, SIZE)
    lost = store.pop(disk[3])
    with serving(store, disk, tmp_path / "s") as running, NbdReader(tmp_path / "s", "disk0") as reader:
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(reader.read(3 * CHUNK, CHUNK)))
        thread.start()
        wait_for(lambda: running.server.counters.retries >= 2)
        store[fingerprint(lost)] = lost
        thread.join(20)
        assert got == [lost]
        assert running.server.counters.errors == 0


def test_a_chunk_that_never_comes_is_an_error_in_the_end(tmp_path: Path) -> None:
    store = DictStore()
    disk = store.disk({3: noise(3), 4: noise(4)}, SIZE)
    del store[disk[3]]
    with serving(store, disk, tmp_path / "s", patience_s=0.3) as running:
        with NbdReader(tmp_path / "s", "disk0") as reader, pytest.raises(GuestError, match="error 5"):
            reader.read(3 * CHUNK, CHUNK)
        with NbdReader(tmp_path / "s", "disk0") as reader:
            assert reader.read(4 * CHUNK, CHUNK) == store[disk[4]]
        assert running.server.counters.errors == 1


class Closing:
    """Is closed while somebody waits for a chunk, which has come all the same."""

    def __init__(self, arrive: Callable[[], None]) -> None:
        self.arrive = arrive

    async def get(self, fp: bytes) -> None:
        self.arrive()
        raise asyncio.CancelledError

    def touched(self, first: int, last: int) -> None: ...


def test_a_read_is_answered_when_the_fetching_of_its_chunk_is_ended(tmp_path: Path) -> None:
    store = DictStore()
    disk = store.disk({3: noise(3)}, SIZE)
    lost = store.pop(disk[3])
    with serving(store, disk, tmp_path / "s") as running:
        running.server.elsewhere = Closing(lambda: store.update({disk[3]: lost}))
        with NbdReader(tmp_path / "s", "disk0", timeout_s=20) as reader:
            assert reader.read(3 * CHUNK, CHUNK) == lost
        assert running.server.counters.errors == 0


def test_unknown_exports_and_contexts(tmp_path: Path) -> None:
    store = DictStore()
    with serving(store, store.disk({}, SIZE), tmp_path / "s"):
        with pytest.raises(UnknownThing):
            NbdReader(tmp_path / "s", "disk1")
        with pytest.raises(UnknownThing, match="no meta context"):
            NbdReader(tmp_path / "s", "disk0", ["qemu:dirty-bitmap:x"])
    with pytest.raises(GuestError, match="cannot be reached"):
        NbdReader(tmp_path / "s", "disk0")


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (p.CMD_READ, SIZE, 512, p.EINVAL),
        (p.CMD_READ, SIZE - 512, 1024, p.EINVAL),
        (p.CMD_READ, (1 << 64) - 512, 1024, p.EINVAL),
        (p.CMD_READ, 0, 0, p.EINVAL),
        (p.CMD_READ, 0, p.MAX_REQUEST + 1, p.EOVERFLOW),
        (p.CMD_CACHE, 0, p.MAX_REQUEST + 1, p.EOVERFLOW),
        (p.CMD_BLOCK_STATUS, 0, 512, p.EINVAL),
        (4, 0, 512, p.EINVAL),
        (99, 0, 512, p.EINVAL),
    ],
)
def test_bad_requests_are_refused_and_the_connection_lives(
    tmp_path: Path, command: int, offset: int, length: int, error: int
) -> None:
    store = DictStore()
    with serving(store, store.disk({}, SIZE), tmp_path / "s"), NbdReader(tmp_path / "s", "disk0") as reader:
        reader._request(command, offset, length)
        (magic,) = struct.unpack(">I", reader._receive(4))
        if magic == p.SIMPLE_REPLY:
            assert struct.unpack(">IQ", reader._receive(12))[0] == error
        else:
            assert struct.unpack(">HHQIIH", reader._receive(22))[4] == error
        assert reader.read(0, 512) == bytes(512)


def test_chunks_in_memory_take_no_thread(tmp_path: Path) -> None:
    store = DictStore()
    disk = store.disk({n: noise(n) for n in range(8)}, SIZE)
    store.read_now = lambda fp, offset, length: store[fp][offset : offset + length]  # type: ignore[method-assign]
    with serving(store, disk, tmp_path / "s") as running, NbdReader(tmp_path / "s", "disk0") as reader:
        assert (
            reader.read(CHUNK // 2, 3 * CHUNK) == b"".join(store[disk[n]] for n in range(4))[CHUNK // 2 :][: 3 * CHUNK]
        )
        assert running.server.counters.loads == 0


def test_cache_requests_bring_chunks_into_memory(tmp_path: Path) -> None:
    store = DictStore()
    disk = store.disk({n: noise(n) for n in range(8)}, SIZE)
    with serving(store, disk, tmp_path / "s") as running, NbdReader(tmp_path / "s", "disk0") as reader:
        reader._request(p.CMD_CACHE, 0, 4 * CHUNK)
        assert struct.unpack(">IIQ", reader._receive(16))[:2] == (p.SIMPLE_REPLY, 0)
        assert running.server.counters.loads == 4
        assert reader.read(0, 4 * CHUNK) == b"".join(store[disk[n]] for n in range(4))
        assert running.server.counters.loads == 4


def test_writes_are_swallowed_and_refused(tmp_path: Path) -> None:
    store = DictStore()
    with serving(store, store.disk({}, SIZE), tmp_path / "s"), NbdReader(tmp_path / "s", "disk0") as reader:
        reader._request(p.CMD_WRITE, 0, 100_000)
        reader._send(bytes(100_000))
        assert struct.unpack(">IIQ", reader._receive(16))[:2] == (p.SIMPLE_REPLY, p.EPERM)
        assert reader.read(0, 512) == bytes(512)


def test_garbage_ends_the_connection_only(tmp_path: Path) -> None:
    store = DictStore()
    disk = store.disk({1: noise(1)}, SIZE)
    with serving(store, disk, tmp_path / "s"):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(10)
            raw.connect(str(tmp_path / "s"))
            raw.sendall(bytes(4) + b"GET / HTTP/1.1\r\n\r\n")
            while raw.recv(100):
                pass
        with NbdReader(tmp_path / "s", "disk0") as reader:
            assert reader.read(CHUNK, CHUNK) == store[disk[1]]


def test_a_store_gives_at_once_only_what_was_checked_and_is_in_place(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        data = noise(5)
        fp = store.put(data)
        assert store.read_now(fp, 0, 10) is None  # not checked by its fingerprint yet
        store.get(fp)
        # None where the file system cannot tell what is in memory.
        assert store.read_now(fp, 100, 4096) in (data[100:4196], None)
        assert store.read_now(ZERO, 0, 10) == bytes(10)
        store.places.advance()  # a collection went by: the place may hold something else
        assert store.read_now(fp, 100, 4096) is None
        assert store.read(fp, 100, 4096) == data[100:4196]
