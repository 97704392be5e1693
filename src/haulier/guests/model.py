"""What a guest is, apart from where it runs.

A `GuestSpec` travels between sites and is checked when it is made, also when it comes out of a message: everything
that later reaches a command line, a path or the guest itself has a narrow alphabet here.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import uuid as uuids
from typing import Final

import msgspec

from haulier.containers.model import ContainerSpec
from haulier.errors import UsageError
from haulier.units import CHUNK, MAX_DISK, MIB

NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
"""Names of guests, images and sites."""
MAX_MEMORY_MIB: Final = 1 << 20
MAX_VCPUS: Final = 64
DEFAULT_MACHINE: Final = "pc-q35-8.2"
"""The oldest pinned q35 of the oldest QEMU that is accepted, so that every accepted QEMU offers it."""
DEFAULT_CPU: Final = "Nehalem-v1"
"""The x86-64-v2 baseline. Every feature of it exists under TCG and under KVM on hosts of the last fifteen years;
`-v2` of the same model already wants spec-ctrl, which TCG does not have."""

_MACHINE = re.compile(r"pc-(q35|i440fx)-(\d{1,2})\.(\d{1,2})(\.\d{1,2})?")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_GOLDEN = re.compile(r"[0-9a-f]{64}")
_FLOATING_CPUS = frozenset({"host", "max", "base"})


def check_name(name: str, what: str = "guest") -> str:
    """`name` itself. Raises `UsageError` unless it is 1 to 41 of a-z, 0-9 and '-', not starting with '-'."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a {what}: use 1 to 41 of a-z, 0-9 and '-', starting with a letter or digit"
        )
    return name


def check_net(net: str) -> str:
    """`net` itself; UsageError if there is no such policy."""
    if net not in ("hook", "keep", "mptcp"):
        raise UsageError(f"there is no way for clients to follow that is called {net[:40]!r}: give hook, keep or mptcp")
    return net


class GuestSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One guest, as both sites need to know it to give it the same machine.

    `disk_size` is in bytes; `golden` is the id of the golden snapshot it was born from, "" if it was booted;
    `address` is an interface address such as "10.77.0.10/24" or "fd77::10/64", "" for a guest without one; `address6`
    is its IPv6 address where it has one beside an IPv4 address. `vmgenid` is the generation id that QEMU shows to the
    guest, the same at both ends of a handoff.

    `free_page_hint` lets the guest's balloon driver name its free pages while it is handed over (a device feature, so
    it is part of the spec). It is off because pages that the driver holds when the guest stops keep their old contents
    at the target: harmless to the guest, but then memory cannot be compared. An image that boots with `init_on_free=1`
    gains the same without it: its free pages are zero.
    """

    name: str
    uuid: str
    image: str
    golden: str = ""
    memory_mib: int
    vcpus: int = 1
    disk_size: int
    mac: str
    address: str = ""
    gateway: str = ""
    address6: str = ""
    gateway6: str = ""
    machine: str = DEFAULT_MACHINE
    cpu: str = DEFAULT_CPU
    vmgenid: str
    free_page_hint: bool = False
    net: str = "hook"
    """What its clients notice of a move (haulier.handoff.clients): "hook", "keep" or "mptcp"."""
    site_address: str = ""
    """With "mptcp": its address of the site's pool, without a length; another one at the next site."""
    container: ContainerSpec | None = None
    """What makes it a container; None for a VM."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_name(self.image, "image")
        for field, value in (("uuid", self.uuid), ("vmgenid", self.vmgenid)):
            _check_guid(field, value)
        if self.golden and not _GOLDEN.fullmatch(self.golden):
            raise UsageError(f"{self.golden!r} is no golden snapshot id: it has 64 hexadecimal digits")
        _check_range("memory_mib", self.memory_mib, 16, MAX_MEMORY_MIB)
        _check_range("vcpus", self.vcpus, 1, MAX_VCPUS)
        _check_range("disk_size", self.disk_size, 512, MAX_DISK)
        if self.disk_size % 512:
            raise UsageError(f"a disk of {self.disk_size} bytes is not whole sectors: make it a multiple of 512")
        if self.container is not None and self.container.lower_chunks * CHUNK >= self.disk_size:
            raise UsageError(f"a container on a disk of {self.disk_size} bytes has no room to write: give it more")
        check_net(self.net)
        if self.net == "mptcp" and (self.container is not None or not self.address):
            raise UsageError(
                "clients can follow by MPTCP to a VM with an address only: CRIU cannot dump MPTCP sockets, so give a "
                "container hook or keep"
            )
        _check_site_address(self.site_address)
        _check_mac(self.mac)
        _check_address(self.address, self.gateway)
        _check_address(self.address6, self.gateway6)
        if self.address6 and (":" in self.address or not self.address or ":" not in self.address6):
            raise UsageError(f"a guest has one address, or one of IPv4 and one of IPv6: not {self.address6!r} as well")
        if not _MACHINE.fullmatch(self.machine):
            raise UsageError(
                f"machine type {self.machine!r} is not pinned: use a versioned one such as {DEFAULT_MACHINE}"
            )
        if not _CPU.fullmatch(self.cpu) or self.cpu in _FLOATING_CPUS:
            raise UsageError(
                f"CPU {self.cpu!r} differs from host to host: use a named model with a version such as {DEFAULT_CPU}"
            )

    @property
    def own_addresses(self) -> tuple[str, ...]:
        """Its own addresses without their lengths, IPv4 first; those of a site's pool are none of them."""
        return tuple(address.partition("/")[0] for address in (self.address, self.address6) if address)

    @property
    def routed_addresses(self) -> tuple[tuple[str, str], ...]:
        """Its own addresses with their lengths, each with its gateway, or ""."""
        pairs = (self.address, self.gateway), (self.address6, self.gateway6)
        return tuple(pair for pair in pairs if pair[0])

    @property
    def kept_addresses(self) -> tuple[str, ...]:
        """The addresses that a tunnel keeps when the guest moves: of the site, where it has one of these."""
        return (self.site_address,) if self.net == "mptcp" and self.site_address else self.own_addresses

    @property
    def kind(self) -> str:
        """ "vm" or "container"."""
        return "vm" if self.container is None else "container"

    @property
    def memory_bytes(self) -> int:
        """Size of the guest's memory in bytes."""
        return self.memory_mib * MIB


def new_spec(
    name: str,
    image: str,
    *,
    memory_mib: int,
    disk_size: int,
    vcpus: int = 1,
    golden: str = "",
    address: str = "",
    gateway: str = "",
    address6: str = "",
    gateway6: str = "",
    mac: str = "",
    machine: str = DEFAULT_MACHINE,
    cpu: str = DEFAULT_CPU,
    free_page_hint: bool = False,
    container: ContainerSpec | None = None,
) -> GuestSpec:
    """A guest that never was before: fresh uuid, vmgenid and (unless given) MAC."""
    return GuestSpec(
        name=name,
        uuid=str(uuids.uuid4()),
        image=image,
        golden=golden,
        memory_mib=memory_mib,
        vcpus=vcpus,
        disk_size=disk_size,
        mac=mac or new_mac(),
        address=address,
        gateway=gateway,
        address6=address6,
        gateway6=gateway6,
        machine=machine,
        cpu=cpu,
        vmgenid=str(uuids.uuid4()),
        free_page_hint=free_page_hint,
        container=container,
    )


def new_mac() -> str:
    """A random MAC under the prefix that QEMU's guests use (locally administered, not multicast)."""
    return "52:54:00:" + ":".join(f"{b:02x}" for b in secrets.token_bytes(3))


def _check_guid(field: str, value: str) -> None:
    try:
        ok = str(uuids.UUID(value)) == value
    except ValueError:
        ok = False
    if not ok:
        raise UsageError(f"{field} {value!r} is no UUID in its usual lower-case form")


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{field} {value} is out of bounds: {low} to {high}")


def _check_mac(mac: str) -> None:
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
        raise UsageError(f"{mac!r} is no unicast MAC address in the form 52:54:00:12:34:56")


def _check_site_address(address: str) -> None:
    if address:
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise UsageError(f"{address[:60]!r} is no address of a site's pool") from None


def _check_address(address: str, gateway: str) -> None:
    if not address:
        if gateway:
            raise UsageError(f"gateway {gateway!r} without an address: give the guest an address such as 10.77.0.10/24")
        return
    try:
        interface = ipaddress.ip_interface(address)
        router = ipaddress.ip_address(gateway) if gateway else None
    except ValueError as err:
        raise UsageError(f"guest address {address!r} via {gateway!r}: {err}") from err
    if "/" not in address:
        raise UsageError(f"guest address {address!r} has no prefix length: write it as {address}/24")
    if "%" in address or interface.ip.is_link_local or interface.ip.is_multicast or interface.ip.is_unspecified:
        raise UsageError(f"guest address {address!r} is of one link, a group or nobody's: give one that routers know")
    if router is not None and (router not in interface.network or router == interface.ip):
        raise UsageError(f"gateway {gateway} is not another address of the guest's network {interface.network}")
