"""One QEMU process: started detached, found again after the agent's restart, told what to do.

A `Qemu` object is a handle. Dropping it changes nothing for the guest; any number of processes may hold one, as
long as each uses its own QMP socket (the agent `qmp.sock`, the worker of a handoff `handoff.sock`).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.durable import write_atomically
from haulier.errors import UNDECODABLE, Conflict, GuestError, NoRoom, UnknownThing, Unsupported
from haulier.guests.accel import Accelerator, QemuInfo, check_version, probe, qemu_binary, qemu_version
from haulier.guests.agent import GuestAgent, wait_for_agent
from haulier.guests.command import NIC_ID, command_line, netdev, nic_device
from haulier.guests.migration import Migration
from haulier.guests.model import GuestSpec
from haulier.guests.paths import GuestPaths
from haulier.guests.qmp import CONNECT_S, Qmp
from haulier.guests.tap import exists
from haulier.process import ProcessId
from haulier.units import MIB

START_S: Final = 60.0
"""Opening the disk waits up to 20 s for its export, and a slow host needs a while for the rest."""
_POLL_S: Final = 0.005
_OVERHEAD: Final = 128 * MIB
"""What a QEMU process needs beside the guest's memory: translated code, buffers."""

__all__ = ["GuestPaths", "Qemu", "create_overlay", "memory_reasons", "refuse_reasons"]


class Qemu(Migration):
    """A running QEMU. Made by `start` or `adopt`."""

    def __init__(
        self, spec: GuestSpec, paths: GuestPaths, process: ProcessId, record: dict[str, Any], worker: bool
    ) -> None:
        self.spec = spec
        self.paths = paths
        self.process = process
        self.record = record
        self._worker = worker
        self.patience_s = CONNECT_S
        """How long this QEMU may take to answer a new connection: one that waits for a page of its memory does not."""
        self._qmp: Qmp | None = None

    # -- made ----------------------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        spec: GuestSpec,
        paths: GuestPaths,
        *,
        incoming: bool = False,
        nic: str | None = None,
        accel: Accelerator | None = None,
        netns: str | None = None,
        disk: bool = True,
        worker: bool = False,
        rescue: bool = False,
    ) -> Qemu:
        """Start a QEMU that outlives this process; it is connected when this returns.

        `incoming` makes a target: it waits for `migrate-incoming` and stays stopped (-S) after it. `nic` is the
        name of an existing tap. The disk export must answer at `paths.nbd_sock` within 20 s, and `paths.overlay`
        must exist (`create_overlay`). `worker` chooses the QMP socket that this handle uses.
        `rescue`: it may come to run before its memory is whole (`haulier.guests.rescue`).

        Raises `Conflict` if this guest's QEMU runs already, `NoRoom` if its memory does not fit into the tmpfs,
        `GuestError` with QEMU's own words if it does not start.
        """
        accel = accel or probe()
        qemu_version()
        paths.prepare()
        if cls._running(paths) is not None:
            raise Conflict(f"guest {spec.name} runs already in {paths.root}: stop it first")
        _check_tap(nic, netns)
        paths.clear_sockets()
        paths.ram.unlink(missing_ok=True)
        _check_room(spec, paths)
        command = command_line(qemu_binary(), spec, paths, accel, incoming=incoming, nic=nic, disk=disk, rescue=rescue)
        if netns is not None:
            command = ["nsenter", f"--net=/run/netns/{netns}", "--", *command]
        _launch(spec, paths, command)
        process = _read_pid(spec, paths)
        record = {"pid": process.pid, "ticks": process.ticks, "boot": process.boot, "accel": accel.kind}
        record |= {"nic": nic, "netns": netns, "incoming": incoming}
        write_atomically(paths.spec_file, msgspec.json.encode(spec))
        write_atomically(paths.record, json.dumps(record).encode())
        qemu = cls(spec, paths, process, record, worker)
        try:
            qemu.qmp.execute("query-status")
        except GuestError:
            qemu.kill()
            raise
        return qemu

    @classmethod
    def adopt(cls, paths: GuestPaths, *, worker: bool = False) -> Qemu:
        """A handle on a QEMU that an earlier process started. Raises `UnknownThing` if it does not run any more."""
        found = cls._running(paths)
        if found is None:
            raise UnknownThing(f"no QEMU runs for {paths.root}: its guest was stopped, or the host restarted")
        process, record = found
        try:
            spec = msgspec.json.decode(paths.spec_file.read_bytes(), type=GuestSpec)
        except (OSError, *UNDECODABLE) as err:
            raise UnknownThing(f"{paths.spec_file} does not describe a guest: {err}") from err
        return cls(spec, paths, process, record, worker)

    @staticmethod
    def _running(paths: GuestPaths) -> tuple[ProcessId, dict[str, Any]] | None:
        try:
            record = json.loads(paths.record.read_bytes())
            process = ProcessId.from_dict(record)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (process, record) if process.alive() else None

    # -- seen ----------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def accel(self) -> str:
        """ "kvm" or "tcg"."""
        return str(self.record.get("accel", ""))

    @property
    def qmp(self) -> Qmp:
        """The connection of this handle, made when first used and made again if it was lost."""
        if self._qmp is None or self._qmp.gone:
            if self._qmp is not None:
                self._qmp.close()
            path = self.paths.handoff_sock if self._worker else self.paths.qmp_sock
            self._qmp = Qmp(path, timeout=self.patience_s)
        return self._qmp

    def alive(self) -> bool:
        """Whether the process runs (the guest may be paused)."""
        return self.process.alive()

    def status(self) -> str:
        """QEMU's run state: "running", "paused", "inmigrate", "finish-migrate", "postmigrate", "io-error", ..."""
        return str(self.qmp.execute("query-status")["status"])

    def wait_status(self, states: set[str] | frozenset[str], timeout: float = 30) -> str:
        """Poll until the run state is one of `states` (events come earlier than the state they tell)."""
        deadline = time.monotonic() + timeout
        while (now := self.status()) not in states:
            if time.monotonic() > deadline:
                wanted = ", ".join(sorted(states))
                raise GuestError(f"guest {self.spec.name} is {now} after {timeout:g} s, waited for {wanted}")
            time.sleep(_POLL_S)
        return now

    def guest_agent(self, timeout: float = 10) -> GuestAgent:
        """A client of the agent inside the guest; close it after use (one at a time can be served)."""
        return GuestAgent(self.paths.qga_sock, name=self.spec.name, timeout=timeout)

    def wait_agent(self, timeout: float = 120) -> None:
        """Wait until the agent inside the guest answers. Raises `GuestError` if it does not, or QEMU ends."""
        wait_for_agent(self.paths.qga_sock, name=self.spec.name, timeout=timeout, alive=self.alive).close()

    # -- told ----------------------------------------------------------------------------------------------------

    def cont(self) -> None:
        """Run the guest. Only its owner may do this."""
        self.qmp.execute("cont")

    def stop(self) -> None:
        """Pause the guest; its disks are drained and flushed."""
        self.qmp.execute("stop", timeout=60)

    def recover_io(self, timeout: float = 30) -> None:
        """Run a guest on that stopped at an I/O error, again and again: QEMU's NBD client backs off before it
        reconnects, so a single `cont` may meet the same error. Raises `GuestError` if it does not hold."""
        deadline = time.monotonic() + timeout
        wait = 0.25
        while True:
            if self.status() == "io-error":
                self.cont()
            time.sleep(wait)
            if self.status() != "io-error":
                return
            if time.monotonic() > deadline:
                raise GuestError(
                    f"guest {self.spec.name} stops at I/O errors again: make room where its overlay is, look at nbd.log"
                )
            wait = min(2.0, wait * 2)

    def hotplug_nic(self, tap: str, *, up: bool) -> None:
        """Plug the guest's NIC in, on `tap`, with the link up or down from the guest's first look on."""
        _check_tap(tap, self.record.get("netns"))
        self.qmp.execute("netdev_add", netdev(tap))
        self.qmp.execute("device_add", nic_device(self.spec))
        self.set_link(up)
        self.record["nic"] = tap
        write_atomically(self.paths.record, json.dumps(self.record).encode())

    def set_link(self, up: bool) -> None:
        """Plug the network cable in or out, as the guest sees it."""
        self.qmp.execute("set_link", {"name": NIC_ID, "up": up})

    def shutdown(self, deadline_s: float = 60) -> bool:
        """Ask the guest to power off, through its agent or by ACPI; quit QEMU if it has not within `deadline_s`.

        True if the guest shut itself down. Its files are cleared either way, like `quit`. A guest that does not run is
        not made to run for this: it may be a copy whose owner is another site.
        """
        deadline = time.monotonic() + deadline_s
        try:
            clean = self.status() == "running" and self._power_off(deadline)
        except GuestError:
            clean = not self.alive()
        self.quit()
        return clean

    def _power_off(self, deadline: float) -> bool:
        try:
            # The channel stays open until the guest is gone, or for half of the time; then the power button.
            with self.guest_agent(min(5.0, deadline - time.monotonic())) as agent:
                agent.shutdown()
                if self.process.wait_gone((deadline - time.monotonic()) / 2):
                    return True
        except GuestError:
            pass
        self.qmp.execute("system_powerdown")
        return self.process.wait_gone(max(0.0, deadline - time.monotonic()))

    def quit(self, *, keep_ram: bool = False, timeout: float = 20) -> None:
        """End QEMU at once, as if the power failed, with its disk images closed properly. No error if it is gone."""
        if self.alive():
            try:
                self.qmp.execute("quit", timeout=timeout)
            except GuestError:
                pass
            if not self.process.wait_gone(timeout):
                self.process.kill()
        self._clear(keep_ram)

    def kill(self, *, keep_ram: bool = False) -> None:
        """SIGKILL. No error if it is gone."""
        if not self.process.kill():
            raise GuestError(f"QEMU of guest {self.spec.name} (pid {self.pid}) does not end: look at it in the host")
        self._clear(keep_ram)

    def close(self) -> None:
        """Let go of the connection; QEMU and the guest go on."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def _clear(self, keep_ram: bool) -> None:
        self.close()
        self.clear(self.paths, keep_ram=keep_ram)

    @classmethod
    def clear(cls, paths: GuestPaths, *, keep_ram: bool = False) -> None:
        """Remove what an ended QEMU leaves: sockets, record, memory file. The overlay, spec and logs stay.

        Raises `Conflict` while it still runs.
        """
        if cls._running(paths) is not None:
            raise Conflict(f"the QEMU of {paths.root} still runs: stop its guest first")
        paths.clear_sockets()
        paths.record.unlink(missing_ok=True)
        if not keep_ram:
            paths.ram.unlink(missing_ok=True)


def create_overlay(path: Path, size: int) -> None:
    """A fresh, empty qcow2 file of `size` bytes. Its backing is given by the command line, not by its header."""
    path.unlink(missing_ok=True)
    # Subclusters of 2 KiB: a write smaller than a cluster does not wait for the rest of it, which may be far away.
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", str(path), str(size)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise GuestError(f"qemu-img could not create {path}: {done.stderr.strip()}")


def refuse_reasons(
    spec: GuestSpec, info: QemuInfo, *, ram_dir: Path | None = None, source_accel: str | None = None
) -> list[str]:
    """Why the site that `info` describes cannot run `spec`; empty if it can.

    `ram_dir` (only for this host's own tmpfs) adds a look at the room for its memory; `source_accel` is what the
    guest runs under now: device state does not travel between KVM and TCG.
    """
    reasons: list[str] = []
    try:
        check_version(info.version)
    except Unsupported as err:
        reasons.append(str(err))
    if spec.machine not in info.machines:
        reasons.append(f"QEMU {'.'.join(map(str, info.version))} there has no machine type {spec.machine}")
    lacks = info.cpus.get(spec.cpu)
    if lacks is None:
        reasons.append(f"QEMU there has no CPU model {spec.cpu}")
    elif lacks:
        reasons.append(f"CPU model {spec.cpu} lacks {', '.join(lacks)} there (under {info.accel})")
    if source_accel and source_accel != info.accel:
        reasons.append(f"the guest runs under {source_accel} and that site has {info.accel}: its CPU state cannot move")
    if ram_dir is not None:
        reasons += memory_reasons(spec, ram_dir)
    return reasons


def memory_reasons(spec: GuestSpec, ram_dir: Path) -> list[str]:
    """Why the memory of `spec` does not fit into this host's tmpfs `ram_dir` or its free memory; empty if it does."""
    reasons: list[str] = []
    need = spec.memory_bytes
    there = ram_dir
    while not there.exists():
        there = there.parent
    stat = os.statvfs(there)
    if stat.f_bavail * stat.f_frsize < need:
        free = stat.f_bavail * stat.f_frsize // MIB
        reasons.append(f"{ram_dir} has {free} MiB free, guest {spec.name} needs {spec.memory_mib} MiB")
    free = _available_memory()
    if free < need + _OVERHEAD:
        want = (need + _OVERHEAD) // MIB
        reasons.append(f"the host has {free // MIB} MiB of memory left, guest {spec.name} needs {want} MiB")
    return reasons


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _check_room(spec: GuestSpec, paths: GuestPaths) -> None:
    # A tmpfs that runs full later kills the guest with a bus error: better to refuse now.
    reasons = memory_reasons(spec, paths.ram_dir)
    if reasons:
        raise NoRoom(f"{'; '.join(reasons)}: stop another guest or give this one less memory")


def _check_tap(tap: str | None, netns: str | None) -> None:
    # QEMU as root would make one that is missing, on no bridge, and say nothing.
    if tap is not None and not exists(tap, netns=netns):
        raise UnknownThing(f"there is no tap {tap} here: make it with create_tap first")


def _launch(spec: GuestSpec, paths: GuestPaths, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_S,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise GuestError(
            f"QEMU of guest {spec.name} did not start within {START_S:g} s: does its disk export answer?"
        ) from None
    except OSError as err:
        raise GuestError(f"QEMU of guest {spec.name} could not be started: {err}") from err
    if done.returncode:
        # Early errors go to stderr, later ones to the log file.
        said = done.stderr.strip() or _tail(paths.qemu_log) or f"exit code {done.returncode}"
        raise GuestError(f"QEMU of guest {spec.name} did not start: {said[-500:]}")


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[-500:]
    except OSError:
        return ""


def _read_pid(spec: GuestSpec, paths: GuestPaths) -> ProcessId:
    try:
        process = ProcessId.of(int(paths.pid_file.read_text()))
    except (OSError, ValueError):
        process = None
    if process is None:
        raise GuestError(f"QEMU of guest {spec.name} ended at once: see {paths.qemu_log}")
    return process
