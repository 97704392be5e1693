"""One container of this host: started, found again, frozen, dumped, restored, ended.

A `Container` is a handle, as `Qemu` is one: dropping it changes nothing for the guest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from haulier import tools
from haulier.containers import bundle, connections, dumping, network, restoring, sockets
from haulier.containers.criu import last_error
from haulier.containers.dumping import Dumping, DumpRequest
from haulier.containers.freezer import freezer_of
from haulier.containers.restoring import Restoring
from haulier.containers.runc import Runc, words_of
from haulier.durable import write_atomically
from haulier.errors import UNDECODABLE, Conflict, GuestError, HaulierError, UnknownThing, Unsupported
from haulier.guests.model import GuestSpec
from haulier.guests.tap import tap_name
from haulier.process import ProcessId

_POLL_S: Final = 0.01


@dataclass(frozen=True)
class ContainerPaths:
    """The directory of a guest that is a container, and the site's directory of runc states."""

    root: Path
    states: Path

    @property
    def record(self) -> Path:
        """What `Container.adopt` needs (JSON)."""
        return self.root / "container.json"

    @property
    def spec_file(self) -> Path:
        return self.root / "spec.json"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def rootfs(self) -> Path:
        """Where the overlay is mounted."""
        return self.bundle / "rootfs"

    @property
    def upper(self) -> Path:
        """What the container wrote."""
        return self.root / "upper"

    @property
    def overlay_work(self) -> Path:
        return self.root / "work"

    @property
    def signatures(self) -> Path:
        """What the files of `upper` were like when it was last equal to its manifest."""
        return self.root / "upper.signatures"

    @property
    def criu_options(self) -> Path:
        return self.root / "criu.conf"

    @property
    def pid_file(self) -> Path:
        return self.root / "pid"

    @property
    def log_dir(self) -> Path:
        """Logs of the last dump and restore."""
        return self.root / "criu"

    @property
    def id(self) -> str:
        """The container's name for runc and its control group: no other site of this host has it."""
        digest = hashlib.blake2b(str(self.root.absolute()).encode(), digest_size=5).hexdigest()
        return f"haulier-{self.root.name}-{digest}"


class Container:
    """Made by `prepare`, `run` or `adopt`."""

    runner = "runc"
    """Whose tools run it."""

    def __init__(self, spec: GuestSpec, paths: ContainerPaths, record: dict[str, Any]) -> None:
        self.spec = spec
        self.paths = paths
        self.record = record
        self.runc = Runc(paths.states)

    # -- made ------------------------------------------------------------------------------------------------------

    @classmethod
    def prepare(cls, spec: GuestSpec, paths: ContainerPaths, lower: list[Path] | None, attempt: str) -> Container:
        """Makes everything but its processes: namespace, mounted root, config. `lower` are its layers, lowest first.

        None leaves the mounting for later. What it wrote is in `paths.upper`, or nothing. Conflict if it runs already.
        """
        if running(paths) is not None:
            raise Conflict(f"container {spec.name} runs already in {paths.root}: stop it first")
        assert spec.container is not None
        clear_runtime(paths)
        for path in (paths.rootfs, paths.upper, paths.overlay_work, paths.log_dir):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        paths.states.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = network.namespace_name(paths.root, attempt)
        cable = tap_name(spec.name) if spec.address else ""
        record = {"netns": name, "cable": cable, "pid": 0, "ticks": 0, "boot": ""}
        container = cls(spec, paths, record)
        # Before there is anything to be found again.
        write_record(paths, spec, record)
        network.create(name, cable, mac=spec.mac, addresses=spec.routed_addresses)
        if lower is not None:
            mount(paths, lower)
        shell = any(os.path.lexists(paths.rootfs / place) for place in ("bin/sh", "usr/bin/sh"))
        made = bundle.config(
            spec.container,
            hostname=spec.name,
            memory_mib=spec.memory_mib,
            vcpus=spec.vcpus,
            netns=str(network.RUN / name),
            cgroup="/" + paths.id,
            criu=str(paths.criu_options),
            shell=shell,
        )
        (paths.bundle / "config.json").write_text(json.dumps(made, indent=1))
        paths.criu_options.write_text(bundle.criu_options(restoring=False))
        return container

    def run(self) -> None:
        """Starts its command; it is on the network when this returns."""
        self._started(self.runc.run(self.paths.id, self.paths.bundle, self.paths.pid_file))
        self.plug()
        self.settle()

    def begin_restore(self, images: Path) -> Restoring:
        """Gets a restore from `images` ready, whose dump need not be there yet; its layers have to be mounted."""
        paths = self.paths
        paths.criu_options.write_text(bundle.criu_options(restoring=True))
        paths.pid_file.unlink(missing_ok=True)
        restoring.prepare(images)
        command, environment = self.runc.restore_command(paths.id, paths.bundle, images, paths.log_dir, paths.pid_file)
        begun = Restoring(command, environment, images, paths.log_dir / "restore.said")
        self.note_helper(begun)
        return begun

    def note_helper(self, begun: Restoring) -> None:
        """So that a restore is ended with the rest, whoever clears away."""
        if begun.process is not None:
            self.record["helper"] = asdict(begun.process) | {"pipe": str(begun.pipe)}
            self._save()

    def finish_restore(self, begun: Restoring) -> None:
        """Restores its processes; they stay stopped, and unplugged. GuestError says what CRIU said."""
        # The processes themselves are restored with the priorities that they had.
        begun.hurry()
        said = begun.finish()
        if said:
            criu = last_error(self.paths.log_dir / "restore.log", 3)
            raise GuestError(f"the restore failed: {words_of(said)}{f' (CRIU: {criu})' if criu else ''}")
        self.paths.criu_options.write_text(bundle.criu_options(restoring=False))
        self.record.pop("helper", None)
        self._started(int(self.paths.pid_file.read_text()))

    def hush(self) -> None:
        """Before a restore: connections that are restored say nothing until `quieten`."""
        if self.cable:
            self.record["hushed"] = network.hush(self.netns, self._gateways)

    def widen(self, images: Path) -> None:
        """When the dump is here: its connections may say something new at once when they run again. Corrupt."""
        if self.record.get("hushed") and (segments := connections.window(images)):
            network.widen(self.netns, self._gateways, segments)

    def quieten(self) -> None:
        """What restored connections said into the unplugged cable is forgotten, and they may speak: before it runs."""
        if self.record.pop("hushed", False):
            network.speak(self.netns, self._gateways)
            self._save()
        elif self.cable:
            network.forget(self.netns)

    @property
    def _gateways(self) -> list[str]:
        return [gateway for _, gateway in self.spec.routed_addresses if gateway]

    def restore(self, images: Path) -> None:
        """Both at once."""
        self.finish_restore(self.begin_restore(images))

    @classmethod
    def adopt(cls, paths: ContainerPaths) -> Container:
        """A handle on one that an earlier process made. UnknownThing if it does not run (any more)."""
        record = running(paths)
        if record is None:
            raise UnknownThing(f"no container runs in {paths.root}: its guest was stopped, or the host restarted")
        try:
            spec = msgspec.json.decode(paths.spec_file.read_bytes(), type=GuestSpec)
        except (OSError, *UNDECODABLE) as error:
            raise UnknownThing(f"{paths.spec_file} does not describe a guest: {error}") from error
        return driver_of(spec)(spec, paths, record)

    @staticmethod
    def runs(paths: ContainerPaths) -> bool:
        """Whether one runs there."""
        return running(paths) is not None

    def _started(self, pid: int) -> None:
        process = ProcessId.of(pid)
        if process is None:
            raise GuestError(f"the container of {self.spec.name} ended at once: see {bundle.LOG} in it")
        self.record |= {"pid": process.pid, "ticks": process.ticks, "boot": process.boot}
        self._save()

    def _save(self) -> None:
        write_atomically(self.paths.record, json.dumps(self.record).encode())

    # -- seen ------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return int(self.record["pid"])

    @property
    def netns(self) -> str:
        return str(self.record["netns"])

    @property
    def cable(self) -> str:
        return str(self.record["cable"])

    def alive(self) -> bool:
        return ProcessId.from_dict(self.record).alive()

    def status(self) -> str:
        """ "running" or "paused"; "stopped" when its first process has ended."""
        if not self.alive():
            return "stopped"
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "Tt":
                return "paused"
        with contextlib.suppress(GuestError):
            return "paused" if freezer_of(self.pid).asked() else "running"
        return "stopped"

    def pids(self) -> list[int]:
        """All its processes, the first one first."""
        try:
            first = psutil.Process(self.pid)
            return [self.pid, *(process.pid for process in first.children(recursive=True))]
        except psutil.Error:
            return []

    # -- told ------------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Stops all its processes between two instructions; repeated, it changes nothing."""
        freezer_of(self.pid).freeze()

    def thaw(self) -> None:
        """Lets them run on, and plugs it in again. Only the guest's owner may do this."""
        freezer_of(self.pid).thaw()
        if self.status() == "paused":
            self._signal(signal.SIGCONT)
        self.plug()

    def cont(self) -> float:
        """Sets restored processes going, and plugs the cable in; when (Unix seconds). May be repeated.

        Only for the guest's owner.
        """
        if self.record.get("hushed"):
            # Whoever restored it got no further.
            self.quieten()
        freezer = freezer_of(self.pid)
        # LXC restores as was dumped, and whoever was to nudge it may have died meanwhile.
        if freezer.asked():
            freezer.thaw()
        self._signal(signal.SIGCONT)
        at = time.time()
        self.plug()
        return at

    def plug(self) -> None:
        if self.cable:
            network.plug(self.cable)

    def settle(self) -> None:
        """It runs and is on the network: what was only for that moment is put right."""
        if self.cable:
            network.calm(self.netns)

    def nudge(self) -> None:
        """Has its connections speak to their peers once, who may have missed what was said in the last moments.

        For that its processes stand still for about a millisecond.
        """
        freezer = freezer_of(self.pid)
        pids = self.pids()
        if not sockets.talking(pids):
            return
        freezer.freeze()
        try:
            sockets.probe(pids)
        finally:
            freezer.thaw()

    def unplug(self) -> None:
        if self.cable:
            network.unplug(self.cable)

    def begin_dump(self, images: Path) -> Dumping:
        """Gets a dump of its state to `images` ready; it goes on running. GuestError when that cannot be."""
        images.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.paths.log_dir.mkdir(parents=True, exist_ok=True)
        request = DumpRequest(
            self.pid,
            self.paths.rootfs,
            self.paths.criu_options,
            freezer_of(self.pid).folder,
            external=(f"net[{os.stat(network.RUN / self.netns).st_ino}]:{bundle.NETWORK_KEY}",),
            masked=tuple(path for path in bundle.MASKED if _is_file(Path(f"/proc/{self.pid}/root{path}"))),
        )
        return Dumping(request, images, self.paths.log_dir)

    def dump(self, images: Path) -> None:
        """Writes its state to `images`; it goes on running, or stays frozen. GuestError says why it cannot be."""
        try:
            self.begin_dump(images).finish()
        except GuestError as error:
            raise GuestError(f"container {self.paths.id} cannot be dumped: {error}") from None

    def shutdown(self, timeout: float) -> bool:
        """Asks its first process to end, and waits; False if it had to be killed."""
        self._signal(signal.SIGTERM, first_only=True)
        # The first process of a namespace does not hear what it has no handler for.
        deadline = time.monotonic() + (timeout if _catches(self.pid, signal.SIGTERM) else 0.0)
        while self.alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        clean = not self.alive()
        self.kill()
        return clean

    def kill(self) -> None:
        """Ends it at once, without a word to its clients, and removes all but its files."""
        clear_runtime(self.paths)

    def _signal(self, number: signal.Signals, first_only: bool = False) -> None:
        for pid in self.pids()[: 1 if first_only else None]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _is_file(path: Path) -> bool:
    try:
        return not path.is_dir() and path.exists()
    except OSError:
        return False


def _catches(pid: int, number: signal.Signals) -> bool:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in text.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def driver_of(spec: GuestSpec) -> type[Container]:
    """The class of a container that is described so."""
    from haulier.containers.lxc import LxcContainer

    return LxcContainer if spec.container is not None and spec.container.lxc else Container


def write_record(paths: ContainerPaths, spec: GuestSpec, record: dict[str, Any]) -> None:
    """Notes what a container is and where, so that it is found again."""
    write_atomically(paths.spec_file, msgspec.json.encode(spec))
    write_atomically(paths.record, json.dumps(record).encode())


def running(paths: ContainerPaths) -> dict[str, Any] | None:
    """The record of the container that runs there; None if none does."""
    try:
        record = json.loads(paths.record.read_bytes())
        process = ProcessId.from_dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if process.pid and process.alive() else None


def is_container(paths: ContainerPaths) -> bool:
    """There is, or was, a container of that guest here."""
    return paths.bundle.exists()


def clear_runtime(paths: ContainerPaths) -> None:
    """Ends its processes and removes namespace, cable, mounts and control group; what it wrote stays.

    The cable goes first, so that no client hears of the end of processes that live on at another site. What fails keeps
    nothing else from going: the first such error is raised at the end. May be repeated.
    """
    try:
        record = json.loads(paths.record.read_bytes())
    except (OSError, ValueError):
        record = {}
    name, cable = str(record.get("netns", "")), str(record.get("cable", ""))
    failed: list[Exception] = []

    @contextlib.contextmanager
    def step() -> Iterator[None]:
        try:
            yield
        except (HaulierError, OSError) as error:
            failed.append(error)

    with step():
        network.delete("", cable)
    with step(), contextlib.suppress(KeyError, TypeError, ValueError):
        restoring.end_helper(ProcessId.from_dict(record["helper"]), Path(record["helper"]["pipe"]))
    found = running(paths)
    if found is not None:
        with step():
            _end_processes(int(found["pid"]))
    with step():
        dumping.end_left(paths.log_dir)
    if record:
        from haulier.containers import lxc

        with contextlib.suppress(GuestError, Unsupported):
            Runc(paths.states).delete(paths.id)
        with step():
            lxc.end(paths, record)
    if found is not None and running(paths) is not None:
        failed.append(
            GuestError(f"process {found['pid']} of {paths.root.name} does not end: see whether the host hangs")
        )
    with step():
        unmount(paths)
    with step():
        network.delete(name, cable)
    if failed:
        raise failed[0]
    paths.record.unlink(missing_ok=True)
    paths.pid_file.unlink(missing_ok=True)


def _end_processes(pid: int) -> None:
    """Ends all processes of a container, of which `pid` is the first, frozen or not."""
    process, keeper = ProcessId.of(pid), None
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        # LXC has one beside each container, which clears away when that has ended.
        parent = first.parent()
        if parent is not None and parent.cmdline()[:2] == ["[lxc", "monitor]"]:
            keeper = ProcessId.of(parent.pid)
        for each in [*first.children(recursive=True), first]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    # Frozen ones die when they are thawed, before they do anything else.
    with contextlib.suppress(GuestError):
        freezer_of(pid).thaw()
    for one in (process, keeper):
        if one is not None:
            one.wait_gone(10)


def mount(paths: ContainerPaths, lower: list[Path]) -> None:
    """Mounts the layers and what is written on top; GuestError when the host refuses."""
    unmount(paths)
    options = f"lowerdir={':'.join(str(path) for path in reversed(lower))}"
    options += f",upperdir={paths.upper},workdir={paths.overlay_work}"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(paths.rootfs)]
    done = tools.run(command)
    if done.returncode:
        raise GuestError(f"the files of container {paths.root.name} cannot be mounted: {done.stderr.strip()[-300:]}")


def unmount(paths: ContainerPaths) -> None:
    """Takes the overlay away; no error if it is not there."""
    while os.path.ismount(paths.rootfs):
        if tools.run(["umount", "--lazy", str(paths.rootfs)]).returncode:
            return


def clear(paths: ContainerPaths) -> None:
    """Ends it and removes all of its files."""
    clear_runtime(paths)
    shutil.rmtree(paths.root, ignore_errors=True)
