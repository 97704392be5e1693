"""The QEMU command line of a guest, as a pure function of its spec.

Both ends of a handoff must offer the same devices at the same addresses and the same RAM blocks in the stream, so
nothing here depends on the host. Where something looks odd, this is why:

- The memory backend's id is the name of the RAM block in the migration stream: always `ram0`.
- A NIC's option ROM would be a RAM block of its own, and would be absent from a golden snapshot, which is taken
  without a NIC. `romfile=` (empty) leaves it out, at every start and at hot plug alike.
- The NIC always sits at `rp1`: hot-plugged there in a clone, cold-plugged there at a target. For the stream it is
  the same device.
- `rerror`/`werror=stop`: a disk export that is away for a while stops the guest instead of ruining its file system.
- `share=on`: memory can be compared from outside, page by page.
"""

from __future__ import annotations

import json
from typing import Any, Final

from haulier.guests.accel import Accelerator
from haulier.guests.model import GuestSpec
from haulier.guests.paths import GuestPaths

DISK_NODE: Final = "disk0"
BASE_NODE: Final = "base0"
RAM_ID: Final = "ram0"
NIC_ID: Final = "nic0"
NETDEV_ID: Final = "n0"
NIC_PORT: Final = "rp1"
AGENT_PORT: Final = "org.qemu.guest_agent.0"

NBD_EXPORT: Final = "disk0"
_RECONNECT_S = 10
_OPEN_S = 20


def block_devices(paths: GuestPaths) -> list[dict[str, Any]]:
    """The two nodes of the guest's disk: a read-only export of the manifest, and the overlay with all writes."""
    return [
        {
            "driver": "nbd",
            "node-name": BASE_NODE,
            "server": {"type": "unix", "path": str(paths.nbd_sock)},
            "export": NBD_EXPORT,
            "read-only": True,
            "reconnect-delay": _RECONNECT_S,
            "open-timeout": _OPEN_S,
        },
        {
            "driver": "qcow2",
            "node-name": DISK_NODE,
            "file": {
                "driver": "file",
                "filename": str(paths.overlay),
                "node-name": f"{DISK_NODE}-file",
                "discard": "unmap",
            },
            "backing": BASE_NODE,
            "discard": "unmap",
            "detect-zeroes": "unmap",
        },
    ]


def netdev(tap: str) -> dict[str, Any]:
    """Arguments of `netdev_add`, and of -netdev."""
    return {"type": "tap", "id": NETDEV_ID, "ifname": tap, "script": "no", "downscript": "no"}


def nic_device(spec: GuestSpec) -> dict[str, Any]:
    """Arguments of `device_add`, and of -device."""
    return {
        "driver": "virtio-net-pci",
        "id": NIC_ID,
        "netdev": NETDEV_ID,
        "mac": spec.mac,
        "bus": NIC_PORT,
        "addr": "0x0",
        "romfile": "",
    }


def command_line(
    binary: str,
    spec: GuestSpec,
    paths: GuestPaths,
    accel: Accelerator,
    *,
    incoming: bool = False,
    nic: str | None = None,
    disk: bool = True,
    rescue: bool = False,
) -> list[str]:
    """Arguments that start `spec`. `nic` is the name of a tap to plug in from the start; `disk=False` leaves it out.

    `rescue` adds a monitor for `haulier.guests.rescue`.
    """
    out = [binary, "-name", f"guest={spec.name},debug-threads=on", "-nodefaults", "-no-user-config"]
    out += ["-display", "none", "-uuid", spec.uuid, "-msg", "timestamp=on"]
    out += ["-machine", f"{spec.machine},memory-backend={RAM_ID},usb=off"]
    out += ["-object", _memory(spec, paths), "-m", f"size={spec.memory_mib}M"]
    out += ["-accel", accel.option, "-cpu", f"{spec.cpu},enforce"]
    out += ["-smp", f"{spec.vcpus},sockets=1,cores={spec.vcpus},threads=1"]
    out += ["-rtc", "base=utc", "-boot", "strict=on"]
    out += _sockets(paths, rescue) + _devices(spec)
    if disk:
        for node in block_devices(paths):
            out += ["-blockdev", json.dumps(node)]
        out += ["-device", json.dumps(_disk_device())]
    if nic is not None:
        out += ["-netdev", json.dumps(netdev(nic)), "-device", json.dumps(nic_device(spec))]
    if incoming:
        out += ["-incoming", "defer", "-S"]
    # QEMU's own detaching: its parent returns when all sockets are open, or says on stderr why it could not start.
    # Afterwards stderr follows the log file, but only if some log item is on; `strace` never prints in system mode.
    return [*out, "-daemonize", "-pidfile", str(paths.pid_file), "-D", str(paths.qemu_log), "-d", "strace"]


def _memory(spec: GuestSpec, paths: GuestPaths) -> str:
    return f"memory-backend-file,id={RAM_ID},size={spec.memory_mib}M,mem-path={_escape(paths.ram)},share=on"


def _escape(path: object) -> str:
    """In QEMU's option strings a comma is written twice."""
    return str(path).replace(",", ",,")


def _sockets(paths: GuestPaths, rescue: bool) -> list[str]:
    out: list[str] = []
    monitors = [("agent", paths.qmp_sock), ("worker", paths.handoff_sock)]
    for name, path in [*monitors, ("rescue", paths.rescue_sock)] if rescue else monitors:
        out += ["-chardev", f"socket,id={name},path={_escape(path)},server=on,wait=off"]
        out += ["-mon", f"chardev={name},mode=control"]
    out += ["-chardev", f"file,id=serial,path={_escape(paths.serial_log)},append=on"]
    out += ["-serial", "chardev:serial"]
    out += ["-chardev", f"socket,id=qga,path={_escape(paths.qga_sock)},server=on,wait=off"]
    return out


def _devices(spec: GuestSpec) -> list[str]:
    balloon: dict[str, Any] = {"driver": "virtio-balloon-pci", "id": "balloon0", "bus": "pcie.0", "addr": "0x3"}
    out: list[str] = []
    if spec.free_page_hint:
        out += ["-object", "iothread,id=io-balloon"]
        balloon |= {"free-page-hint": True, "iothread": "io-balloon"}
    out += ["-object", "rng-random,id=rng0,filename=/dev/urandom"]
    devices: list[dict[str, Any]] = [
        balloon,
        {"driver": "virtio-rng-pci", "id": "vrng0", "rng": "rng0", "bus": "pcie.0", "addr": "0x4"},
        {"driver": "virtio-serial-pci", "id": "vser0", "bus": "pcie.0", "addr": "0x5"},
        {"driver": "virtserialport", "id": "qga0", "bus": "vser0.0", "nr": 1, "chardev": "qga", "name": AGENT_PORT},
        {"driver": "pcie-root-port", "id": "rp1", "bus": "pcie.0", "addr": "0x8", "chassis": 1, "slot": 1},
        {"driver": "pcie-root-port", "id": "rp2", "bus": "pcie.0", "addr": "0x9", "chassis": 2, "slot": 2},
        {"driver": "vmgenid", "id": "vmgenid0", "guid": spec.vmgenid},
    ]
    for device in devices:
        out += ["-device", json.dumps(device)]
    return out


def _disk_device() -> dict[str, Any]:
    return {
        "driver": "virtio-blk-pci",
        "id": "vda",
        "drive": DISK_NODE,
        "bus": "pcie.0",
        "addr": "0x2",
        "discard": True,
        "write-zeroes": True,
        "rerror": "stop",
        "werror": "stop",
        "bootindex": 0,
    }
