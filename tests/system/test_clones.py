"""Golden snapshots and their clones, with the real guest image."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from haulier.chunks.images import import_image
from haulier.chunks.store import ChunkStore
from haulier.disks.export import DiskExport
from haulier.errors import Cancelled, Unsupported, UsageError
from haulier.guests import golden as goldens
from haulier.guests.accel import Accelerator, probe
from haulier.guests.golden import Golden, find_golden, make_golden
from haulier.guests.launch import boot_cold, start_from_golden
from haulier.guests.model import GuestSpec, new_spec
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu, create_overlay
from haulier.guests.tap import create_tap, delete_tap, tap_name
from haulier.lab.image import ROOT_OFFSET, cached_image
from haulier.memory.compare import compare_ram
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(900)]
MEMORY_MIB = 256


class Site:
    """A store, a directory of goldens and a bridge in a network namespace; `end` leaves nothing of it."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="guests-s-", dir="/var/tmp"))
        self.ram = Path(tempfile.mkdtemp(prefix="guests-s-", dir="/dev/shm"))
        self.netns = f"guests-s-{os.getpid()}"
        self.store = ChunkStore(self.root / "store")
        self._made: list[GuestPaths] = []
        self._ip("netns", "add", self.netns)
        self._ip("-n", self.netns, "link", "add", "br0", "address", "52:54:00:ff:00:01", "type", "bridge")
        self._ip("-n", self.netns, "address", "add", "10.77.0.1/24", "dev", "br0")
        self._ip("-n", self.netns, "link", "set", "br0", "up")

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def paths(self, name: str) -> GuestPaths:
        self._made.append(GuestPaths(self.root / name, self.ram))
        return self._made[-1]

    def ping(self, address: str) -> bool:
        command = ["nsenter", f"--net=/run/netns/{self.netns}", "ping", "-c1", "-W2", address]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def stop(self, paths: GuestPaths) -> None:
        with contextlib.suppress(LookupError):
            Qemu.adopt(paths).kill()
        with contextlib.suppress(LookupError):
            DiskExport.attach(paths.nbd_ctl).stop()
        delete_tap(tap_name(paths.root.name), netns=self.netns)

    def end(self) -> None:
        for paths in self._made:
            self.stop(paths)
        self.store.close()
        self._ip("netns", "del", self.netns)
        shutil.rmtree(self.root)
        shutil.rmtree(self.ram)

    def clone(self, golden: Golden, name: str, address: str) -> Qemu:
        spec = golden.spec(name, address=f"{address}/24", gateway="10.77.0.1")
        tap = tap_name(name)
        create_tap(tap, netns=self.netns)
        return start_from_golden(golden, spec, self.paths(name), store_dir=self.store.path, tap=tap, netns=self.netns)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    try:
        import_image(made.store, "debian", cached_image())
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def golden(site: Site) -> Golden:
    seen: list[float] = []
    made = make_golden(
        site.store,
        "debian",
        MEMORY_MIB,
        site.root / "w",
        root=site.root / "golden",
        ram_dir=site.ram,
        progress=lambda share, what: seen.append(share),
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    return made


def ask(qemu: Qemu, command: str) -> str:
    with qemu.guest_agent() as agent:
        return agent.check(["/bin/sh", "-c", command]).decode().strip()


def test_a_golden_snapshot_is_whole_and_leaves_nothing_else(site: Site, golden: Golden) -> None:
    assert Golden.load(golden.path) == golden
    assert find_golden(site.root / "golden", "debian", MEMORY_MIB, accel=probe().kind) == golden
    assert find_golden(site.root / "golden", "debian", MEMORY_MIB * 2) is None
    assert not list((site.root / "w").iterdir())
    assert [path.name for path in (site.root / "golden").iterdir()] == [golden.id]
    assert not list(site.ram.iterdir())
    assert not site.store.leases()
    manifest = site.store.load_manifest(golden.manifest_name)
    changed = manifest.changed(site.store.load_manifest("image/debian"))
    assert 0 < len(changed) < 2000


def test_cancelled_or_impossible_leaves_nothing(site: Site, golden: Golden) -> None:
    beats = 0

    def soon() -> bool:
        nonlocal beats
        beats += 1
        return beats > 5

    with pytest.raises(Cancelled, match="warming image debian was cancelled"):
        make_golden(
            site.store, "debian", 128, site.root / "w", root=site.root / "golden", ram_dir=site.ram, cancelled=soon
        )
    assert [path.name for path in (site.root / "golden").iterdir()] == [golden.id]
    assert not list((site.root / "w").iterdir())
    assert not list(site.ram.iterdir())
    goldens.clear_unfinished(site.store, site.root / "w", site.root / "golden", site.ram)
    assert Golden.load(golden.path) == golden
    spec = golden.spec("wrong")
    paths = site.paths("wrong")
    other = Accelerator("kvm" if golden.meta.accel == "tcg" else "tcg", "test")
    with pytest.raises(Unsupported, match="was taken under"):
        start_from_golden(golden, spec, paths, store_dir=site.store.path, tap=None, accel=other)
    bigger = msgspec.structs.replace(spec, memory_mib=512)
    with pytest.raises(UsageError, match="wants memory_mib=512"):
        start_from_golden(golden, bigger, paths, store_dir=site.store.path, tap=None)
    assert not paths.root.exists()


LOOK = {
    "host name": "cat /proc/sys/kernel/hostname",
    "machine id": "cat /etc/machine-id",
    "host key": "cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub",
    "uuid": "cat /proc/sys/kernel/random/uuid",
    "random": "head -c 32 /dev/urandom | od -An -tx1",
    "mac": "cat /sys/class/net/eth0/address",
    "address": "ip -4 -brief address show dev eth0 | awk '{print $3}'",
}


def test_two_clones_are_two_machines(site: Site, golden: Golden) -> None:
    one, two = site.clone(golden, "web1", "10.77.0.11"), site.clone(golden, "web2", "10.77.0.12")
    seen = [{what: ask(qemu, command) for what, command in LOOK.items()} for qemu in (one, two)]
    for what in LOOK:
        assert seen[0][what], what
        assert seen[0][what] != seen[1][what], what
    for qemu, found in zip((one, two), seen, strict=True):
        assert found["host name"] == qemu.spec.name
        assert found["mac"] == qemu.spec.mac
        assert found["address"] == qemu.spec.address
        assert ask(qemu, "ls /etc/ssh/ssh_host_*_key") == "/etc/ssh/ssh_host_ed25519_key"
        assert ask(qemu, "stat -c %a /etc/ssh/ssh_host_ed25519_key") == "600"
        assert ask(qemu, "ip route show default").startswith("default via 10.77.0.1 dev eth0")
        before = time.time()
        told = float(ask(qemu, "date +%s.%N"))
        assert before - 5 < told < time.time() + 5, "its clock is right, however long it takes to ask"
        wait_for(lambda q=qemu: site.ping(q.spec.address.split("/")[0]), what="an answer to ping")
    # sshd speaks with the key that was injected.
    scan = ["nsenter", f"--net=/run/netns/{site.netns}", "ssh-keyscan", "-t", "ed25519", "10.77.0.11"]
    if shutil.which("ssh-keyscan"):
        wait_for(
            lambda: seen[0]["host key"] in subprocess.run(scan, capture_output=True, text=True, check=False).stdout,
            what="the new host key",
        )
    for qemu in (one, two):
        assert qemu.shutdown(60), f"{qemu.spec.name} did not power off by itself"
        assert not qemu.paths.ram.exists()
        check_disk(qemu.paths)
        site.stop(qemu.paths)


def check_disk(paths: GuestPaths) -> None:
    """e2fsck of what a stopped guest left."""
    whole = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(paths.overlay)},
        "backing": {
            "driver": "nbd",
            "server": {"type": "unix", "path": str(paths.nbd_sock)},
            "export": "disk0",
        },
    }
    raw = paths.root / "check.raw"
    source = "json:" + msgspec.json.encode(whole).decode()
    subprocess.run(["qemu-img", "convert", "-O", "raw", source, raw], check=True)
    done = subprocess.run(["e2fsck", "-fn", f"{raw}?offset={ROOT_OFFSET}"], capture_output=True, text=True, check=False)
    raw.unlink()
    assert done.returncode == 0, done.stdout + done.stderr


WANTED = {"events": True, "return_path": True, "pause_before_switchover": True}
CHURN = """
import os, time
keep = bytearray(os.urandom(1 << 20) * 20)
while True:
    freed = bytearray(40 << 20)
    for at in range(0, len(freed), 4096):
        freed[at : at + 8] = os.urandom(8)
    del freed
    keep[int.from_bytes(os.urandom(4), "little") % len(keep)] ^= 1
    time.sleep(0.05)
"""


class Relay:
    """Bytes both ways between a source's socket pair and a target's socket; `sent` counts those to the target."""

    def __init__(self, target: Path) -> None:
        self.far = socket.socket(socket.AF_UNIX)
        self.far.connect(str(target))
        self.end, self.near = socket.socketpair()
        self.sent = 0
        self._threads = [
            threading.Thread(target=self._pump, args=(self.near, self.far, True)),
            threading.Thread(target=self._pump, args=(self.far, self.near, False)),
        ]
        for thread in self._threads:
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 20):
                sink.sendall(data)
                self.sent += len(data) if counted else 0
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self.end.close()
        for one in (self.near, self.far):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self.near.close()
        self.far.close()


def test_a_stock_migration_of_a_clone_moves_every_page(site: Site, golden: Golden) -> None:
    """The NIC was hot-plugged at the source and is cold-plugged at the target, while the guest frees and fills memory:
    nothing of that may make a page differ. (With free page hinting about every second run had pages that do.)"""
    source = site.clone(golden, "mover", "10.77.0.13")
    with source.guest_agent() as agent:
        start = f"exec python3 -c '{CHURN}' </dev/null >/dev/null 2>&1"
        agent.execute("guest-exec", {"path": "/bin/sh", "arg": ["-c", start]})
    tap = "hv-mover-b"
    create_tap(tap, netns=site.netns)
    target = prepare_target(site, golden, source.spec, tap)
    relay = Relay(target.paths.mig_sock)
    try:
        source.set_capabilities(**WANTED)
        # Slow enough for several rounds, with a threshold of five pages (below one QEMU ends without an exact count);
        # the last one is let through.
        source.set_parameters(max_bandwidth=12 << 20, downtime_limit=20, avail_switchover_bandwidth=1 << 20)
        marks = source.qmp.mark(), target.qmp.mark()
        source.migrate_fd(relay.end.fileno())
        wait_for(lambda: rounds(source) >= 4, 120, "four rounds")
        source.set_parameters(avail_switchover_bandwidth=1 << 30, max_bandwidth=1 << 30, downtime_limit=2000)
        source.wait_migration({"pre-switchover"}, 60, marks[0])
        source.migrate_continue()
        target.wait_migration({"completed"}, 60, marks[1])
        source.wait_migration({"completed"}, 60, marks[0])
        source.postmigrate()
    finally:
        relay.close()
    assert relay.sent > 64 << 20
    assert target.status() == "paused"
    report = compare_ram(source.paths.ram, target.paths.ram)
    assert report.pages == MEMORY_MIB * 256
    assert report.differing == []
    # And it lives.
    source.quit()
    target.cont()
    assert ask(target, "cat /proc/sys/kernel/hostname") == "mover"
    delete_tap(tap_name("mover"), netns=site.netns)
    wait_for(lambda: site.ping("10.77.0.13"), what="an answer to ping")
    target.kill()
    delete_tap(tap, netns=site.netns)


def rounds(qemu: Qemu) -> int:
    return int(qemu.query_migrate().get("ram", {}).get("dirty-sync-count", 0))


def prepare_target(site: Site, golden: Golden, spec: GuestSpec, tap: str) -> Qemu:
    paths = site.paths("mover-b")
    paths.prepare()
    DiskExport.start(site.store.path, golden.manifest_name, paths.nbd_sock, paths.nbd_ctl, paths.nbd_log)
    create_overlay(paths.overlay, spec.disk_size)
    target = Qemu.start(spec, paths, incoming=True, nic=tap, netns=site.netns, worker=True)
    target.set_capabilities(late_block_activate=True, **WANTED)
    target.prepare_incoming(f"unix:{paths.mig_sock}")
    return target


def test_a_cold_boot_and_a_second_one_on_its_own_writes(site: Site, golden: Golden) -> None:
    disk = site.store.load_manifest("image/debian").size
    spec = new_spec(
        "cold", "debian", memory_mib=MEMORY_MIB, disk_size=disk, address="10.77.0.14/24", gateway="10.77.0.1"
    )
    tap = tap_name("cold")
    create_tap(tap, netns=site.netns)
    paths = site.paths("cold")
    qemu = boot_cold(spec, paths, store_dir=site.store.path, tap=tap, netns=site.netns)
    key = ask(qemu, LOOK["host key"])
    assert ask(qemu, LOOK["host name"]) == "cold"
    wait_for(lambda: site.ping("10.77.0.14"), what="an answer to ping")
    assert qemu.shutdown(60)
    DiskExport.attach(paths.nbd_ctl).stop()
    again = boot_cold(
        spec, paths, store_dir=site.store.path, tap=tap, netns=site.netns, identity=False, fresh_overlay=False
    )
    again.wait_agent(120)
    assert ask(again, LOOK["host key"]) == key
    assert ask(again, LOOK["host name"]) == "cold"
    wait_for(lambda: site.ping("10.77.0.14"), 60, "an answer to ping after a reboot")
    again.kill()
