"""The published way of handing a service over, to be measured beside haulier: rsync the application layer while it
runs, stop and dump it, rsync what it wrote and the dump, restore.

After Machen, Wang, Leung, Ko, Salonidis: Live service migration in mobile edge clouds (2018), with their LXC replaced
by runc and with rsync's own compression on. `move` moves a container that haulier runs, and leaves haulier's records
alone; `move_vm` a virtual machine, whose state is saved to a file as `virsh save` does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from haulier.agent.client import Client
from haulier.chunks.store import ChunkStore
from haulier.containers import container as containers
from haulier.containers.bundle import criu_options
from haulier.containers.container import Container
from haulier.containers.layers import layer_id, regions
from haulier.errors import GuestError, Unsupported
from haulier.guests.command import NBD_EXPORT
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu
from haulier.handoff.residence import container_paths
from haulier.images.snapshots import write_disk
from haulier.lab.scenario import LabSite, Scenario

PORT: Final = 7990
_RSYNC_S: Final = 1200
_STATE_S: Final = 120
"""For saving and for loading the state of a virtual machine."""


@dataclass(frozen=True)
class SeedResult:
    """Seconds, bytes of IP packets on the link, milliseconds."""

    total_s: float
    wire_bytes: int
    downtime_ms: float


@contextlib.contextmanager
def _daemon(target: LabSite, address: str) -> Iterator[None]:
    if shutil.which("rsync") is None:
        raise Unsupported("the published method needs rsync: install it")
    config = target.root / "rsyncd.conf"
    config.write_text("use chroot = no\nuid = root\ngid = root\n[root]\npath = /\nread only = no\n")
    words = ["rsync", "--daemon", "--no-detach", f"--config={config}", f"--address={address}", f"--port={PORT}"]
    process = target.lab.popen(target.name, words, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError):
                target.lab.call(target.name, lambda: socket.create_connection((address, PORT), timeout=1)).close()
                break
            if time.monotonic() > deadline:
                raise GuestError("the rsync daemon did not start")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)


def move(scenario: Scenario, guest: str, source: LabSite, target: LabSite, address: str) -> SeedResult:
    """Moves the container; it runs at `target` afterwards, and the client `address`'s route leads there."""
    lab = scenario.lab
    ours, theirs = container_paths(source.site, guest), container_paths(target.site, guest)
    row_spec = Client.local(source.site).guest(guest)["spec"]
    with ChunkStore(source.site.store) as store:
        manifest = store.load_manifest(f"guest/{guest}")
    container = Container.adopt(ours)
    spec = container.spec
    assert spec.container is not None and row_spec["name"] == guest
    names = [layer_id(region) for region in regions(spec.container, manifest)]
    images = {site.name: site.site.ram_dir / "seed-images" for site in (source, target)}
    for folder in images.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for folder in (target.site.layers, theirs.root, theirs.upper):
        folder.mkdir(parents=True, exist_ok=True)
    wan = lab.address(target.name, lab.links_between("oslo", "lisbon")[0])

    def rsync(folder: Path, there: Path) -> None:
        _rsync(source, wan, "--delete", f"{folder}/", f"{there}/")

    with _daemon(target, wan):
        before, began = scenario.wan_bytes(), time.monotonic()
        for name in names[1:]:
            rsync(source.site.layers / name, target.site.layers / name)
        stop = time.monotonic()
        lab.call(source.name, container.unplug)
        container.dump(images[source.name])
        for pid in container.pids():
            os.kill(pid, 9)
        rsync(ours.upper, theirs.upper)
        rsync(images[source.name], images[target.name])
        lower = [target.site.layers / name for name in names]
        lab.call(target.name, lambda: _restore(spec, theirs, lower, images[target.name]))
        lab.route_guest("client", address, target.name)
        done_at = time.monotonic()
        sent = scenario.wan_bytes() - before
    lab.call(source.name, lambda: containers.clear_runtime(ours))
    for folder in images.values():
        shutil.rmtree(folder, ignore_errors=True)
    return SeedResult(done_at - began, sent, (done_at - stop) * 1000)


class Layer:
    """The application's layer of a virtual machine's disk: a qcow2 file of what the disk has more than the base image.

    The base image is at lisbon, also as the file that rsync finds where the layer will be: disks that were built one
    after the other have most blocks in common, but few of them at the same place.
    """

    def __init__(self, scenario: Scenario, base: str, whole: str) -> None:
        """`base`: a manifest of lisbon's store; `whole`: one of oslo's. Takes a quarter of a minute."""
        self._lab = scenario.lab
        self._server: subprocess.Popen[bytes] | None = None
        here, there = (site.root / "layer" for site in (scenario.oslo, scenario.lisbon))
        self.here, self.there, self._whole = here / "layer.qcow2", there / "layer.qcow2", here / "whole.raw"
        disks = {self._whole: (scenario.oslo.site, whole), there / "base.raw": (scenario.lisbon.site, base)}
        for file, (site, name) in disks.items():
            file.parent.mkdir()
            with ChunkStore(site.store, create=False) as store:
                manifest = store.load_manifest(name)
                write_disk(store, manifest, manifest.size, file)
        make_layer(self._whole, there / "base.raw", self.here)
        _qemu_img("convert", "-f", "raw", "-O", "qcow2", str(there / "base.raw"), str(self.there))

    def serve(self, socket_path: Path) -> None:
        """Serves the layer that has arrived, on top of the base, to the QEMU that will be started at lisbon."""
        words = ["qemu-nbd", "--read-only", "--persistent", "--shared=4", "--format=qcow2"]
        words += [f"--export-name={NBD_EXPORT}", f"--socket={socket_path}", str(self.there)]
        self._server = self._lab.popen("lisbon", words, stdin=subprocess.DEVNULL)

    def check(self) -> None:
        """Raises GuestError if layer and base at lisbon are not the disk that is at oslo."""
        same_disk(self._whole, self.there)

    def close(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait(10)
        for folder in (self.here.parent, self.there.parent):
            shutil.rmtree(folder, ignore_errors=True)


def make_layer(whole: Path, base: Path, layer: Path) -> None:
    """Writes what the raw disk `whole` has other than the raw disk `base` to a qcow2 file on top of `base`."""
    _qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", str(whole), str(layer))
    # From one base to another: what differs is written.
    _qemu_img("rebase", "-f", "qcow2", "-F", "raw", "-b", str(base), str(layer))


def same_disk(raw: Path, layer: Path) -> None:
    """Raises GuestError if a layer, on top of its base, is not the disk `raw`."""
    _qemu_img("compare", "-f", "raw", "-F", "qcow2", str(raw), str(layer))


def _qemu_img(command: str, *words: str) -> None:
    command_line = ["qemu-img", command, "-q", *words]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=_STATE_S, check=False)
    if done.returncode:
        raise GuestError(f"qemu-img {command} of {words[-1]} failed: {(done.stderr or done.stdout).strip()[-300:]}")


def move_vm(
    scenario: Scenario,
    qemu: Qemu,
    there: GuestPaths,
    receive: Callable[[], Qemu],
    address: str,
    layer: Layer | None = None,
) -> tuple[SeedResult, Qemu]:
    """Moves a virtual machine from oslo to lisbon, where it runs afterwards, and the client's route leads there.

    `there`: its files at lisbon, where `receive` expects what it wrote to its disk when it starts the QEMU that takes
    it. The base image is at lisbon, and the application, unless it is in `layer`.
    """
    overlay = there.overlay
    lab, source, target = scenario.lab, scenario.oslo, scenario.lisbon
    wan = lab.address(target.name, lab.links_between("oslo", "lisbon")[0])
    saved, arrived_state = qemu.paths.ram_dir / "seed.state", qemu.paths.ram_dir / "seed.state-there"
    overlay.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _daemon(target, wan):
            before, began = scenario.wan_bytes(), time.monotonic()
            if layer is not None:
                _rsync(source, wan, str(layer.here), str(layer.there))
                layer.serve(there.nbd_sock)
            _rsync(source, wan, str(qemu.paths.overlay), str(overlay))
            stop = time.monotonic()
            qemu.stop()
            qemu.set_capabilities(events=True)
            mark = qemu.qmp.mark()
            qemu.migrate_uri(f"file:{saved}")
            qemu.wait_migration({"completed"}, _STATE_S, since=mark)
            qemu.quit()
            _rsync(source, wan, str(qemu.paths.overlay), str(overlay))
            _rsync(source, wan, str(saved), str(arrived_state))
            arrived = receive()
            arrived.set_capabilities(events=True, late_block_activate=True)
            mark = arrived.qmp.mark()
            arrived.prepare_incoming(f"file:{arrived_state}")
            arrived.wait_migration({"completed"}, _STATE_S, since=mark)
            arrived.wait_status({"paused"}, _STATE_S)
            arrived.cont()
            lab.route_guest("client", address, target.name)
            done_at = time.monotonic()
            sent = scenario.wan_bytes() - before
    finally:
        for state in (saved, arrived_state):
            state.unlink(missing_ok=True)
    return SeedResult(done_at - began, sent, (done_at - stop) * 1000), arrived


def _rsync(source: LabSite, wan: str, *words: str) -> None:
    """`words`: options, what is sent, and where to on the other host."""
    *options, here, there = words
    command = ["rsync", "-azX", *options, here, f"rsync://{wan}:{PORT}/root{there}"]
    done = subprocess.run(
        source.lab.command(source.name, command), capture_output=True, text=True, timeout=_RSYNC_S, check=False
    )
    if done.returncode:
        raise GuestError(f"rsync failed: {done.stderr[-500:]}")


def _restore(spec: object, paths: containers.ContainerPaths, lower: list[Path], images: Path) -> None:
    from haulier.guests.model import GuestSpec

    assert isinstance(spec, GuestSpec)
    made = Container.prepare(spec, paths, lower, "seed")
    # Running as soon as it is restored, as the published method has it; but plugged in after, or clients are reset.
    begun = made.begin_restore(images)
    paths.criu_options.write_text(criu_options(restoring=False))
    made.finish_restore(begun)
    made.plug()


def end(target: LabSite, guest: str) -> None:
    """Ends a container that `move` brought, and removes its files."""
    target.lab.call(target.name, lambda: containers.clear(container_paths(target.site, guest)))
