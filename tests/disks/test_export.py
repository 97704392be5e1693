"""The export process: it outlives who started it, is found again, and QEMU survives its death."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.disks.export import DiskExport, ExportState, waiting_export
from haulier.disks.nbd import NbdReader
from haulier.errors import Conflict, Corrupt, HaulierError, UnknownThing, UsageError
from haulier.units import CHUNK
from tests.disks.qemus import qemu_with_disk
from tests.support.processes import set_clock
from tests.support.waiting import wait_for

SIZE = 64 * CHUNK


def fill(store: ChunkStore, name: str, chunks: dict[int, bytes], size: int = SIZE) -> Manifest:
    table = [ZERO] * (size // CHUNK)
    for index, data in chunks.items():
        table[index] = store.put(data)
    manifest = Manifest(size, b"".join(table))
    store.save_manifest(name, manifest)
    return manifest


class Site:
    """A store and the paths of one export."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ChunkStore(root / "store")
        self.socket, self.control, self.log = root / "nbd", root / "ctl", root / "log"
        self.exports: list[DiskExport] = []

    def start(self, name: str, patience_s: float = 60.0) -> DiskExport:
        found = DiskExport.start(self.root / "store", name, self.socket, self.control, self.log, patience_s)
        self.exports.append(found)
        return found

    def read(self, offset: int = 0, length: int = CHUNK) -> bytes:
        with NbdReader(self.socket, "disk0") as reader:
            return reader.read(offset, length)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for export in made.exports:
        export.stop()
    made.store.close()


def test_serves_swaps_counts_and_stops(site: Site) -> None:
    one = fill(site.store, "one", {3: b"1" * CHUNK})
    two = fill(site.store, "two", {3: b"2" * CHUNK})
    fill(site.store, "small", {}, SIZE // 2)
    export = site.start("one")
    with NbdReader(site.socket, "disk0") as reader:
        assert reader.read(3 * CHUNK, CHUNK) == b"1" * CHUNK
        assert export.stats()["digest"] == one.digest.hex()
        export.swap("two")
        assert reader.read(3 * CHUNK, CHUNK) == b"2" * CHUNK
        stats = export.stats()
        assert (stats["digest"], stats["manifest"], stats["size"]) == (two.digest.hex(), "two", SIZE)
        assert (stats["reads"], stats["swaps"], stats["connections"]) == (2, 1, 1)
        with pytest.raises(Conflict, match="size"):
            export.swap("small")
        with pytest.raises(UnknownThing):
            export.swap("three")
        assert reader.read(3 * CHUNK, CHUNK) == b"2" * CHUNK
    assert site.socket.stat().st_mode & 0o777 == 0o600
    assert site.control.stat().st_mode & 0o777 == 0o600
    export.stop()
    assert not export.alive()
    assert {path.name for path in site.root.iterdir()} == {"store", "log"}
    export.stop()
    assert "Traceback" not in site.log.read_text()


def test_chunks_put_after_the_start_are_served(site: Site) -> None:
    fill(site.store, "one", {})
    export = site.start("one")
    fill(site.store, "guest", {0: b"new" + bytes(CHUNK - 3)})
    export.swap("guest")
    assert site.read(0, 3) == b"new"


def test_outlives_its_starter_and_is_found_again(site: Site) -> None:
    fill(site.store, "one", {0: b"x" * CHUNK})
    program = (
        "import sys; from pathlib import Path; from haulier.disks.export import DiskExport\n"
        "r = Path(sys.argv[1]); print(DiskExport.start(r/'store', 'one', r/'nbd', r/'ctl', r/'log').pid)"
    )
    said = subprocess.run([sys.executable, "-c", program, site.root], capture_output=True, check=True, text=True)
    export = DiskExport.attach(site.control)
    site.exports.append(export)
    assert export.pid == int(said.stdout)
    assert export.alive()
    assert os.getsid(export.pid) == export.pid != os.getsid(0)
    assert site.read() == b"x" * CHUNK


def test_two_never_serve_the_same_guest(site: Site) -> None:
    fill(site.store, "one", {0: b"x" * CHUNK})
    export = site.start("one")
    with pytest.raises(Conflict, match="already"):
        site.start("one")
    with pytest.raises(Conflict, match="listens"):
        DiskExport.start(site.root / "store", "one", site.socket, site.root / "other", site.log)
    assert export.alive() and site.read() == b"x" * CHUNK


def test_other_things_on_the_path_are_left_alone(site: Site) -> None:
    fill(site.store, "one", {})
    site.socket.write_text("precious")
    with pytest.raises(Conflict, match="not a socket"):
        site.start("one")
    assert site.socket.read_text() == "precious"
    site.socket.unlink()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(site.socket))
        foreign.listen()
        with pytest.raises(Conflict, match="listens"):
            site.start("one")
    # Nobody listens there any more: a leftover, which is replaced.
    site.start("one")
    assert site.read(0, 10) == bytes(10)


def test_a_process_that_waits_becomes_the_export(site: Site) -> None:
    fill(site.store, "one", {0: b"1" * CHUNK})
    waiting = waiting_export()
    export = DiskExport.start(site.root / "store", "one", site.socket, site.control, site.log, waiting=waiting)
    site.exports.append(export)
    assert site.read() == b"1" * CHUNK
    assert waiting.returncode == 0 and export.pid != waiting.pid
    parent = psutil.Process(export.pid).parent()
    assert parent is None or parent.pid != os.getpid()


def test_a_process_that_waited_and_died_is_done_without(site: Site) -> None:
    fill(site.store, "one", {0: b"1" * CHUNK})
    waiting = waiting_export()
    waiting.kill()
    waiting.communicate()
    site.exports.append(
        DiskExport.start(site.root / "store", "one", site.socket, site.control, site.log, waiting=waiting)
    )
    assert site.read() == b"1" * CHUNK


def test_a_process_that_waits_ends_when_nobody_needs_it() -> None:
    waiting = waiting_export()
    _, said = waiting.communicate(timeout=30)
    assert waiting.returncode == 0 and not said


def test_what_cannot_start_says_why(site: Site) -> None:
    fill(site.store, "one", {})
    with pytest.raises(UnknownThing, match="no manifest two"):
        site.start("two")
    with pytest.raises(UnknownThing, match="no chunk store"):
        DiskExport.start(site.root / "nowhere", "one", site.socket, site.control, site.log)
    assert not (site.root / "nowhere").exists()
    with pytest.raises(UsageError, match="longer"):
        DiskExport.start(site.root / "store", "one", site.root / ("s" * 120), site.control, site.log)
    with pytest.raises(UnknownThing):
        DiskExport.attach(site.control)
    state = site.control.with_name("ctl.json")
    state.write_text("{")
    with pytest.raises(Corrupt):
        DiskExport.attach(site.control)


def test_it_is_known_when_the_clock_was_set(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site.store, "one", {3: b"1" * CHUNK})
    export = site.start("one")
    set_clock(monkeypatch, 30.0)
    assert export.alive() and DiskExport.attach(site.control).stats()["manifest"] == "one"


def test_one_that_an_older_haulier_started_is_known(site: Site) -> None:
    """It was written down with the time of day at which it began."""
    fill(site.store, "one", {3: b"1" * CHUNK})
    export = site.start("one")
    path = site.control.with_name(site.control.name + ".json")
    new = json.loads(path.read_text())
    old = {name: value for name, value in new.items() if name not in ("ticks", "boot")}
    path.write_text(json.dumps(old | {"started": psutil.Process(export.pid).create_time()}))
    assert DiskExport.attach(site.control).stats()["manifest"] == "one"
    path.write_text(json.dumps(old | {"started": psutil.Process(export.pid).create_time() - 60}))
    with pytest.raises(UnknownThing, match="does not run"):
        DiskExport.attach(site.control)
    path.write_text(json.dumps(new))


def test_a_reused_pid_is_not_taken_for_the_export(site: Site) -> None:
    fill(site.store, "one", {})
    export = site.start("one")
    state = json.loads(site.control.with_name("ctl.json").read_text())
    export.stop()
    state["pid"] = os.getpid()
    site.control.with_name("ctl.json").write_text(json.dumps(state))
    with pytest.raises(UnknownThing, match="does not run"):
        DiskExport.attach(site.control)
    DiskExport(ExportState(**state)).stop()  # signals nobody


def test_nonsense_on_the_control_socket_is_answered(site: Site) -> None:
    fill(site.store, "one", {})
    export = site.start("one")
    for line in (b"{}\n", b"[]\n", b"\xff\n", b'{"command":"dance"}\n', b'{"command":"swap"}\n'):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(10)
            raw.connect(str(site.control))
            raw.sendall(line)
            assert json.loads(raw.recv(1000))["code"] == UsageError.exit_code
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(site.control))
        try:
            raw.sendall(b"x" * 1_000_000)
            assert raw.recv(1000) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert export.stats()["pid"] == export.pid


def test_a_corrupt_chunk_is_served_once_it_is_healed(site: Site) -> None:
    manifest = fill(site.store, "one", {5: b"good" * (CHUNK // 4)})
    site.store.commit()
    (pack,) = (site.root / "store" / "packs").glob("*.pack")
    raw = pack.read_bytes()
    with pack.open("r+b") as file:
        file.seek(raw.index(b"goodgoodgood") + 1000)
        file.write(b"evil")
    export = site.start("one")
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(site.read(5 * CHUNK)))
    thread.start()
    wait_for(lambda: export.stats()["retries"] > 0)
    healer = ChunkStore(site.root / "store")
    assert healer.missing([manifest[5]]) == [manifest[5]]
    healer.put(b"good" * (CHUNK // 4))
    healer.commit()
    thread.join(30)
    healer.close()
    assert got == [b"good" * (CHUNK // 4)]


@pytest.mark.qemu
def test_qemu_goes_on_after_a_restart(site: Site, tmp_path: Path) -> None:
    fill(site.store, "one", {n: bytes([n + 1]) * CHUNK for n in range(64)})
    export = site.start("one")
    server = {"type": "unix", "path": str(site.socket)}
    base = {"driver": "nbd", "server": server, "export": "disk0", "reconnect-delay": 30, "open-timeout": 20}
    with qemu_with_disk(tmp_path, base, SIZE) as disk:
        disk.io("read -P 1 0 64k")
        process = psutil.Process(export.pid)
        os.kill(export.pid, signal.SIGKILL)
        process.wait(10)
        assert not export.alive()
        thread = threading.Thread(target=lambda: disk.io("read -P 8 448k 64k"))
        thread.start()
        again = DiskExport.restart(site.control)
        site.exports.append(again)
        assert again.pid != export.pid
        thread.join(30)
        assert not thread.is_alive()
        disk.io("write -P 99 0 4k")
        disk.io("read -P 99 0 4k")
        disk.io("read -P 1 4k 60k")
        assert again.stats()["reads"] > 0


def test_stop_of_a_hung_export_kills_that_process_only(site: Site) -> None:
    fill(site.store, "one", {})
    export = site.start("one")
    os.kill(export.pid, signal.SIGSTOP)
    try:
        with pytest.raises(HaulierError):
            export._ask({"command": "stats"}, timeout_s=0.2)
    finally:
        os.kill(export.pid, signal.SIGCONT)
    export.stop()
    assert not export.alive()
