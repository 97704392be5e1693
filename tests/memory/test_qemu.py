"""Real streams of real QEMUs: captured, rebuilt byte for byte, and migrated through both proxies, memory compared."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from haulier.memory import MemoryBase, SourceProxy, StreamParser, TargetProxy, compare_ram
from haulier.memory.proxy import Broken
from haulier.memory.returnpath import Message, Received, Request, ResumeAck, ReturnPathParser, Shut
from haulier.memory.stream import Mark, Pages, rebuild_all
from tests.support.qemustream import PAGE
from tests.support.tinyguest import QEMU, TinyGuest, tiny_guest
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")]

MACHINES = ["pc", "q35"]
NIC = ("-device", "virtio-net-pci,id=nic0")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a unix socket's name."""
    # Post-copy wants the guest's memory on a tmpfs.
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="haulier-memory-", dir=shared if os.access(shared, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


def run(guest: TinyGuest, beyond: int = 3) -> None:
    """Let the guest work until its count has gone `beyond` what it was."""
    before = guest.counted()
    guest.execute("cont")
    wait_for(lambda: guest.counted() > before + beyond, what="the guest's count")


def migrate_live(guest: TinyGuest, folder: Path, take: Callable[[bytes], None]) -> None:
    """Migrate the running guest to `take`, in several rounds."""
    guest.execute("migrate-set-parameters", max_bandwidth=20 << 20, downtime_limit=20)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "mig"))
        listener.listen()
        guest.execute("migrate", uri=f"unix:{folder / 'mig'}")
        connection, _ = listener.accept()
        connection.settimeout(60)
        # Beside, and read on: a QEMU that is about to end holds what its monitor needs until all is read.
        with connection, ThreadPoolExecutor(1) as beside:
            rounds, asked = 0, []
            while data := connection.recv(200_000):
                take(data)
                rounds += 1
                if rounds == 100:
                    # The guest dirties faster than this link: let it end, as an operator would.
                    words = partial(guest.execute, max_bandwidth=1 << 30, downtime_limit=2000)
                    asked.append(beside.submit(words, "migrate-set-parameters"))
        for each in asked:
            each.result()
    (folder / "mig").unlink()


def capture(guest: TinyGuest, folder: Path) -> bytes:
    pieces: list[bytes] = []
    migrate_live(guest, folder, pieces.append)
    guest.wait_migrated()
    return b"".join(pieces)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_live_capture_is_rebuilt_byte_for_byte(folder: Path, machine: str) -> None:
    with tiny_guest(folder / "a", machine, *NIC) as guest:
        run(guest)
        data = capture(guest, folder)
        memory = guest.ram.read_bytes()
    for step in (len(data), 65536, 4999):
        parser, tokens = StreamParser(), []
        for at in range(0, len(data), step):
            tokens += parser.feed(data[at : at + step])
        assert rebuild_all(tokens) == data
    assert parser.pending == b"" and parser.device_state and parser.machine is not None
    assert parser.blocks["ram0"] == 32 << 20 and len(parser.blocks) > 3
    marks = [token.kind for token in tokens if isinstance(token, Mark)]
    assert marks[0] == "setup" and marks[-2:] == ["end", "device"]
    got = bytearray(32 << 20)
    for token in tokens:
        if isinstance(token, Pages) and token.block == "ram0":
            for address, page in zip(token.addresses.tolist(), token.pages, strict=True):
                got[address : address + PAGE] = page.tobytes()
        elif hasattr(token, "addresses") and token.block == "ram0":
            for address in token.addresses.tolist():
                got[address : address + PAGE] = bytes(PAGE)
    assert got == memory, "the stream's last word on each page is the stopped guest's memory"


@pytest.mark.parametrize("machine", MACHINES)
def test_a_handoff_through_both_proxies_with_a_golden_base(folder: Path, machine: str) -> None:
    """Snapshot of a stopped guest (mapped-ram), which then runs on and is handed over; its NIC came after."""
    golden = folder / "golden"
    with tiny_guest(folder / "a", machine) as guest:
        run(guest)
        guest.execute("stop")
        guest.capability("mapped-ram")
        guest.execute("migrate", uri=f"file:{golden}")
        guest.wait_migrated()
        (folder / "golden.ram").write_bytes(guest.ram.read_bytes())
    base = MemoryBase.from_mapped_ram(golden)
    assert base.view("ram0").tobytes() == (folder / "golden.ram").read_bytes()
    with (
        tiny_guest(folder / "b", machine, *NIC) as source,
        tiny_guest(folder / "c", machine, *NIC, incoming=True) as target,
    ):
        run(source)
        out = SourceProxy(folder / "source.mirror", base)
        into = TargetProxy(folder / "target.mirror", MemoryBase.from_mapped_ram(golden))
        target.execute("migrate-incoming", uri=f"unix:{folder / 'in'}")
        with socket.socket(socket.AF_UNIX) as wire:
            wire.connect(str(folder / "in"))

            def through(data: bytes) -> None:
                for batch in [*out.feed(data), *out.flush()]:
                    for piece in into.feed(batch.data):
                        wire.sendall(piece)

            migrate_live(source, folder, through)
            assert out.finish() == into.digest()
        source.wait_migrated()
        target.wait_migrated()
        assert not out.warnings and out.device_state
        assert any(name not in base.blocks for name in out.parser.blocks), "the NIC brought a block of its own"
        report = compare_ram(source.ram, target.ram)
        assert report.pages == 8192 and report.differing == []
        assert out.counters.pages["same"] > 500 and out.counters.pages["xor"] > 100
        assert out.counters.wire_bytes < out.counters.raw_bytes / 3
        out.keep()
        out.close()
        into.keep()
        into.close()
        here, there = (MemoryBase.from_mirror(folder / f"{side}.mirror") for side in ("source", "target"))
        assert here.digest == there.digest
        assert here.view("ram0").tobytes() == source.ram.read_bytes()
        run(target)
    base.close()
    here.close()
    there.close()


def test_post_copy_through_both_proxies(folder: Path) -> None:
    """Needs userfaultfd; the device state travels as a package, pages go on after it."""
    with tiny_guest(folder / "b", "q35") as source, tiny_guest(folder / "c", "q35", incoming=True) as target:
        run(source)
        for guest in (source, target):
            try:
                guest.capability("postcopy-ram")
            except AssertionError as error:
                pytest.skip(f"no post-copy here: {error}")
        pieces: list[bytes] = []
        out, into = SourceProxy(folder / "source.mirror"), TargetProxy(folder / "target.mirror")
        target.execute("migrate-incoming", uri=f"unix:{folder / 'in'}")
        source.execute("migrate-set-parameters", max_bandwidth=10 << 20, max_postcopy_bandwidth=20 << 20)
        with socket.socket(socket.AF_UNIX) as wire, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "mig"))
            listener.listen()
            wire.connect(str(folder / "in"))
            source.execute("migrate", uri=f"unix:{folder / 'mig'}")
            connection, _ = listener.accept()
            started = False
            with connection, relay(wire, connection):
                while data := connection.recv(100_000):
                    pieces.append(data)
                    for batch in [*out.feed(data), *out.flush()]:
                        for piece in into.feed(batch.data):
                            wire.sendall(piece)
                    if not started and out.counters.raw_bytes > 3 << 20:
                        source.execute("migrate-start-postcopy")
                        started = True
        source.wait_migrated()
        target.wait_migrated()
        stream = b"".join(pieces)
        assert out.finish() == into.digest()
        assert out.parser.postcopy and not out.warnings
        tokens = StreamParser().feed(stream)
        assert rebuild_all(tokens) == stream
        kinds = [token.kind for token in tokens if isinstance(token, Mark)]
        assert "package" in kinds and "part" in kinds[kinds.index("package") :]
        wait_for(lambda: target.execute("query-status")["status"] in ("running", "paused"), what="the target")
        run(target)


def test_post_copy_goes_on_through_new_proxies(folder: Path) -> None:
    """Both proxies are gone in the middle: QEMU pauses, and sends through new ones what had not arrived."""
    with tiny_guest(folder / "b", "q35") as source, tiny_guest(folder / "c", "q35", incoming=True) as target:
        run(source)
        for guest in (source, target):
            guest.capability("return-path")
            try:
                guest.capability("postcopy-ram")
            except AssertionError as error:
                pytest.skip(f"no post-copy here: {error}")
        target.execute("migrate-incoming", uri=f"unix:{folder / 'in'}")
        source.execute("migrate-set-parameters", max_bandwidth=10 << 20, max_postcopy_bandwidth=256 << 10)
        out, into = SourceProxy(folder / "source.mirror"), TargetProxy(folder / "target.mirror")
        with through(folder, source, "in", out, into) as first:
            wait_for(lambda: out.counters.raw_bytes > 3 << 20, what="a part of memory")
            source.execute("migrate-start-postcopy")
            wait_for(lambda: target.migration() == "postcopy-active", what="post-copy")
            target.execute("cont")
            before = out.counters.raw_bytes
            wait_for(lambda: out.counters.raw_bytes > before + (128 << 10), what="some more pages")
        assert any(isinstance(message, Request) for message in first)
        for guest in (source, target):
            wait_for(lambda guest=guest: guest.migration() == "postcopy-paused", what="the pause")
        broken = Broken(out.parser.blocks, tuple(out.parser.ids))
        target.execute_oob("migrate-recover", uri=f"unix:{folder / 'again'}")
        source.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
        out, into = SourceProxy(folder / "source.2", broken=broken), TargetProxy(folder / "target.2")
        with through(folder, source, "again", out, into, resume=True) as second:
            source.wait_migrated()
            target.wait_migrated()
        assert not out.warnings and out.parser.ready and out.counters.pages["literal"] > 100
        assert {type(message) for message in second} >= {Received, ResumeAck, Shut}
        wait_for(lambda: target.execute("query-status")["status"] in ("running", "paused"), what="the target")
        run(target)


@contextlib.contextmanager
def through(
    folder: Path, source: TinyGuest, incoming: str, out: SourceProxy, into: TargetProxy, *, resume: bool = False
) -> Iterator[list[Message]]:
    """A migration through both proxies while the block lasts; gives what the return path says."""
    said: list[Message] = []
    ours, qemus = socket.socketpair()
    wire = socket.socket(socket.AF_UNIX)
    wire.connect(str(folder / incoming))
    source.pass_fd("migration", qemus)
    qemus.close()
    source.execute("migrate", uri="fd:migration", **({"resume": True} if resume else {}))

    def forth() -> None:
        with contextlib.suppress(OSError):
            while data := ours.recv(100_000):
                for batch in [*out.feed(data), *out.flush()]:
                    for piece in into.feed(batch.data):
                        wire.sendall(piece)

    def back() -> None:
        parser = ReturnPathParser(out.parser.blocks) if resume else None
        with contextlib.suppress(OSError):
            while data := wire.recv(4096):
                # The blocks are named by the stream, which comes before any request.
                parser = parser or (ReturnPathParser(out.parser.blocks) if out.parser.ready else None)
                said.extend(parser.feed(data) if parser is not None else [])
                ours.sendall(data)

    threads = [threading.Thread(target=forth), threading.Thread(target=back)]
    for thread in threads:
        thread.start()
    try:
        yield said
    finally:
        for end in (ours, wire):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        ours.close()
        wire.close()


class relay:
    """The return path, which haulier carries untouched."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source = source

        def work() -> None:
            try:
                while data := source.recv(4096):
                    target.sendall(data)
            except OSError:
                pass

        self._thread = threading.Thread(target=work)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._source.shutdown(socket.SHUT_WR)
        self._thread.join(30)
        assert not self._thread.is_alive()
