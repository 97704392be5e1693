"""QEMU processes, with a guest that is nothing but firmware."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from haulier.errors import Conflict, GuestError, UnknownThing
from haulier.guests.accel import Accelerator
from haulier.guests.model import new_spec
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu, create_overlay
from haulier.memory.compare import compare_ram
from tests.support.waiting import wait_for

pytestmark = pytest.mark.qemu
SPEC = new_spec("tiny", "none", memory_mib=32, disk_size=1 << 20)
TCG = Accelerator("tcg", "test")


class Place:
    """Short directories (sockets have short names), and an end for every QEMU that was started in them."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="guests-q-", dir="/tmp"))
        self.ram = Path(tempfile.mkdtemp(prefix="guests-q-", dir="/dev/shm"))
        self._numbers = itertools.count()
        self._made: list[GuestPaths] = []

    def paths(self) -> GuestPaths:
        self._made.append(GuestPaths(self.root / str(next(self._numbers)), self.ram))
        return self._made[-1]

    def start(self, paths: GuestPaths | None = None, **more: Any) -> Qemu:
        return Qemu.start(SPEC, paths or self.paths(), accel=TCG, disk=False, **more)

    def end(self) -> None:
        for paths in self._made:
            try:
                Qemu.adopt(paths).kill()
            except UnknownThing:
                pass
        shutil.rmtree(self.root)
        shutil.rmtree(self.ram)


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.end()


def test_start_adopt_and_quit(place: Place) -> None:
    qemu = place.start()
    assert qemu.status() == "running"
    assert qemu.alive()
    assert qemu.accel == "tcg"
    mark = qemu.qmp.mark()
    qemu.stop()
    assert qemu.qmp.wait_event("STOP", since=mark).at > 0
    again = Qemu.adopt(qemu.paths, worker=True)
    assert (again.pid, again.spec, again.status()) == (qemu.pid, SPEC, "paused")
    again.cont()
    assert qemu.wait_status({"running"}) == "running"
    assert qemu.paths.ram.stat().st_size == 32 << 20
    with pytest.raises(Conflict, match="tiny runs already"):
        place.start(qemu.paths)
    with pytest.raises(Conflict, match="still runs"):
        Qemu.clear(qemu.paths)
    again.close()
    qemu.quit()
    assert not qemu.alive()
    left = {path.name for path in qemu.paths.root.iterdir()}
    assert left == {"spec.json", "qemu.log", "serial.log"}
    assert not list(place.ram.iterdir())
    qemu.quit()
    with pytest.raises(UnknownThing, match="no QEMU runs"):
        Qemu.adopt(qemu.paths)
    place.start(qemu.paths).kill()


def test_it_outlives_whoever_started_it(place: Place) -> None:
    """Starter killed with its whole process group and session, as a service manager or a terminal would."""
    paths = place.paths()
    code = f"""
import os, signal
from pathlib import Path
from tests.guests.test_qemu import SPEC, TCG
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu
import msgspec
Qemu.start(SPEC, GuestPaths(Path({str(paths.root)!r}), Path({str(paths.ram_dir)!r})), accel=TCG, disk=False)
os.killpg(0, signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], start_new_session=True, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    qemu = Qemu.adopt(paths)
    assert qemu.status() == "running"
    held = [str(Path(f"/proc/{qemu.pid}/fd/{fd}").readlink()) for fd in (0, 1, 2)]
    assert held == ["/dev/null", "/dev/null", str(paths.qemu_log)]
    assert os.getsid(qemu.pid) != os.getsid(0)


def test_a_dead_one_is_noticed_and_cleared(place: Place) -> None:
    qemu = place.start()
    qemu.process.kill()
    assert not qemu.alive()
    with pytest.raises(GuestError):
        qemu.status()
    with pytest.raises(UnknownThing):
        Qemu.adopt(qemu.paths)
    qemu.quit(keep_ram=True)
    assert qemu.paths.ram.exists()
    Qemu.clear(qemu.paths)
    assert not qemu.paths.ram.exists()


def test_a_stranger_with_its_pid_is_not_adopted(place: Place) -> None:
    qemu = place.start()
    text = qemu.paths.record.read_text()
    qemu.paths.record.write_text(text.replace(f'"pid": {qemu.pid}', f'"pid": {os.getpid()}'))
    with pytest.raises(UnknownThing):
        Qemu.adopt(qemu.paths)
    qemu.paths.record.write_text("{}")
    with pytest.raises(UnknownThing):
        Qemu.adopt(qemu.paths)
    qemu.paths.record.write_text(text)


def test_why_it_did_not_start_is_said(place: Place) -> None:
    paths = place.paths()
    strange = msgspec.structs.replace(SPEC, cpu="Unheard-v9")
    with pytest.raises(GuestError, match=r"tiny did not start: .*unable to find CPU model 'Unheard-v9'"):
        Qemu.start(strange, paths, accel=TCG, disk=False)
    assert not paths.record.exists()


def test_a_missing_tap_is_not_made_up(place: Place) -> None:
    """QEMU would make it, connected to nothing."""
    with pytest.raises(UnknownThing, match="no tap hv-missing"):
        place.start(nic="hv-missing")
    qemu = place.start()
    with pytest.raises(UnknownThing, match="no tap hv-missing"):
        qemu.hotplug_nic("hv-missing", up=False)


def test_overlays(tmp_path: Path) -> None:
    create_overlay(tmp_path / "o.qcow2", 1 << 20)
    create_overlay(tmp_path / "o.qcow2", 2 << 20)
    shown = subprocess.run(["qemu-img", "info", "--output=json", tmp_path / "o.qcow2"], capture_output=True, check=True)
    assert b'"virtual-size": 2097152' in shown.stdout
    with pytest.raises(GuestError, match="could not create"):
        create_overlay(tmp_path / "none" / "o.qcow2", 1 << 20)


class Pair:
    """A source and a target, connected and told to wait in pre-switchover."""

    def __init__(self, place: Place) -> None:
        self.source = place.start(worker=True)
        self.target = place.start(incoming=True, worker=True)
        assert self.target.status() == "inmigrate"
        self.target.set_capabilities(
            events=True, return_path=True, pause_before_switchover=True, late_block_activate=True
        )
        self.target.prepare_incoming(f"unix:{self.target.paths.mig_sock}")
        self.source.set_capabilities(events=True, return_path=True, pause_before_switchover=True)
        self.source.set_parameters(downtime_limit=300, avail_switchover_bandwidth=10**9)
        self.send()

    def send(self) -> None:
        self.marks = self.source.qmp.mark(), self.target.qmp.mark()
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(str(self.target.paths.mig_sock))
            self.source.migrate_fd(stream.fileno())
        self.source.wait_migration({"pre-switchover"}, 30, self.marks[0])

    def finish(self) -> None:
        self.source.migrate_continue()
        self.target.wait_migration({"completed"}, 30, self.marks[1])
        self.source.wait_migration({"completed"}, 30, self.marks[0])
        self.source.postmigrate()


def test_a_migration_through_a_file_descriptor_moves_every_page(place: Place) -> None:
    pair = Pair(place)
    assert pair.source.status() == "finish-migrate"
    pair.finish()
    assert (pair.source.status(), pair.target.status()) == ("postmigrate", "paused")
    report = compare_ram(pair.source.paths.ram, pair.target.paths.ram)
    assert report.pages == 8192
    assert report.equal
    assert pair.source.query_migrate()["status"] == "completed"
    # Until the token moves the source may go on.
    pair.target.kill()
    pair.source.resume_source()
    assert pair.source.status() == "running"
    pair.source.resume_source()


def test_resuming_out_of_pre_switchover(place: Place) -> None:
    pair = Pair(place)
    pair.source.resume_source()
    assert pair.source.status() == "running"
    assert pair.source.query_migrate()["status"] == "cancelled"
    pair.source.migrate_cancel()


def test_a_lost_target_is_an_error_with_a_reason(place: Place) -> None:
    pair = Pair(place)
    mark = pair.source.qmp.mark()
    pair.target.kill()
    pair.source.migrate_continue()
    with pytest.raises(GuestError, match="migration of guest tiny failed: "):
        pair.source.wait_migration({"completed"}, 30, mark)
    pair.source.resume_source()
    assert pair.source.status() == "running"


def test_shutdown_of_a_guest_that_does_not_listen(place: Place) -> None:
    qemu = place.start()
    assert qemu.shutdown(0.5) is False
    assert not qemu.alive()
    assert not qemu.paths.record.exists()


def test_shutdown_does_not_run_a_copy_of_another_sites_guest(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(place)
    pair.finish()
    ran: list[str] = []
    monkeypatch.setattr(Qemu, "cont", lambda self: ran.append(self.spec.name))
    for qemu in (pair.source, pair.target):
        mark = qemu.qmp.mark()
        connection = qemu.qmp
        assert qemu.shutdown(5) is False
        assert not [e for e in connection.events(mark) if e.name == "RESUME"]
    assert ran == []


def test_a_guest_that_powers_off_by_itself_was_clean(place: Place) -> None:
    qemu = place.start()
    qemu.qmp.execute("quit")
    wait_for(lambda: not qemu.alive(), what="the end")
    assert qemu.shutdown(5) is True
