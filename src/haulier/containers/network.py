"""A container's network namespace and its cable to the site's bridge.

A namespace serves one attempt only: what a handoff that failed leaves in one can never meet a later one. The cable is
plugged into the bridge last, when the container runs: until then its interface is up and nothing comes in, so nobody
is told that a connection does not exist before it has been restored.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from haulier import tools
from haulier.errors import GuestError, HaulierError, UnknownThing
from haulier.guests.tap import BRIDGE, exists

log = logging.getLogger(__name__)

RUN: Final = Path("/run/netns")
IMPATIENT_MS: Final = 20
IMPATIENT_S: Final = 10
MTU: Final = 1500
"""Of a container's interface."""
NOWHERE: Final = "02:00:00:00:00:00"
_NEIGHBOURS: Final = "ntable change name {table} dev eth0 retrans {retrans} mcast_probes {probes}"
"""What restored connections have to say waits until the gateway is found, which can only be when the cable is plugged
in. The kernel's own pace, one question a second, would add a second to what the client waits."""
_TABLES: Final = {False: "arp_cache", True: "ndisc_cache"}
"""The kernel's tables of neighbours, of IPv4 and (True) of IPv6."""


def namespace_name(root: Path, attempt: str) -> str:
    """The namespace of one attempt: of the guest's directory, and of a handoff or run."""
    return "hc-" + hashlib.blake2b(f"{root.absolute()}\0{attempt}".encode(), digest_size=8).hexdigest()


def create(name: str, cable: str, *, mac: str, addresses: Sequence[tuple[str, str]]) -> None:
    """Makes the namespace; with an address also the interface eth0 in it and `cable`, its end out here, unplugged.

    `addresses`: each with its length, and its gateway or "".

    What is left of an earlier one of these names is replaced. GuestError when the host refuses.
    """
    delete(name, cable)
    if addresses and not exists(BRIDGE):
        raise UnknownThing(f"no bridge {BRIDGE} here: make it, or start the agent in its site's network namespace")
    _run(["ip", "netns", "add", name])
    try:
        lines = ["link set lo up"]
        if addresses:
            # Its own name first: eth0 may be taken out here.
            inner = "hi-" + name[3:15]
            out_here = [
                f"link add {cable} type veth peer name {inner}",
                f"link set dev {cable} addrgenmode none",
                f"link set dev {inner} addrgenmode none",
                f"link set dev {inner} address {mac}",
                f"link set dev {inner} netns {name}",
                f"link set dev {cable} up",
            ]
            _run(["ip", "-batch", "-"], "\n".join(out_here))
            # Unplugged it is nobody's neighbour, not this host's either, which would pass its packets on.
            _set(Path(f"/proc/sys/net/ipv4/conf/{cable}/arp_ignore"), "8")
            lines.append(f"link set dev {inner} name eth0")
            # Not looked for on a cable that is not plugged in yet, in vain.
            lines += [f"addr add {own} dev eth0" + (" nodad" if ":" in own else "") for own, _ in addresses]
            lines.append("link set dev eth0 up")
            for table in _tables(addresses):
                probes = IMPATIENT_S * 1000 // IMPATIENT_MS
                lines.append(_NEIGHBOURS.format(table=table, retrans=IMPATIENT_MS, probes=probes))
            lines += [f"route add default via {gateway} dev eth0" for _, gateway in addresses if gateway]
        _run(inside(name, ["ip", "-batch", "-"]), "\n".join(lines))
    except BaseException:
        delete(name, cable)
        raise


def forget(name: str) -> None:
    """What waits for a neighbour that has not been found is dropped, and neighbours are looked for anew.

    A restored connection asks its peer at once how far it is. Were that heard before the peer's network knows where the
    container is now, the answer would go astray, and a peer answers only twice a second (tcp_invalid_ratelimit).
    """
    _quietly(inside(name, ["ip", "neigh", "flush", "dev", "eth0"]))


def hush(name: str, gateways: Sequence[str]) -> bool:
    """Until `speak`, what is said inside by way of a gateway is refused by the interface; False if that cannot be.

    For connections that are being restored: what is refused TCP takes for not sent, and says when it may, while what
    waits for a neighbour it takes for sent. And they see another MTU than afterwards: only a change of it has them
    use segments as large as the path takes, instead of 536 bytes for ever.
    """
    lines = [f"link set dev eth0 mtu {MTU - 1}"]
    lines += [f"neigh replace {gateway} lladdr {NOWHERE} dev eth0 nud permanent" for gateway in gateways]
    try:
        _run(inside(name, ["tc", "qdisc", "replace", "dev", "eth0", "root", "pfifo", "limit", "0"]))
        _run(inside(name, ["ip", "-batch", "-"]), "\n".join(lines))
    except HaulierError as error:
        log.info("connections may take a second longer after this restore: %s", error)
        speak(name, gateways)
        return False
    return True


def widen(name: str, gateways: Sequence[str], segments: int) -> None:
    """Connections that are restored in it begin with a congestion window of so many, until `speak`."""
    lines = [f"route change default via {gateway} dev eth0 initcwnd {segments}" for gateway in gateways]
    _quietly(inside(name, ["ip", "-batch", "-"]), "\n".join(lines))


def speak(name: str, gateways: Sequence[str]) -> None:
    """Takes back `hush` and `widen`."""
    lines = [f"neigh del {gateway} dev eth0" for gateway in gateways]
    lines += [f"route change default via {gateway} dev eth0" for gateway in gateways]
    lines += [f"link set dev eth0 mtu {MTU}", "neigh flush dev eth0"]
    _quietly(inside(name, ["ip", "-force", "-batch", "-"]), "\n".join(lines))
    _quietly(inside(name, ["tc", "qdisc", "del", "dev", "eth0", "root"]))


def calm(name: str) -> None:
    """Neighbours are looked for as patiently as the kernel does by itself."""
    for table in _TABLES.values():
        _quietly(inside(name, ["ip", *_NEIGHBOURS.format(table=table, retrans=1000, probes=3).split()]))


def _tables(addresses: Sequence[tuple[str, str]]) -> list[str]:
    return sorted({_TABLES[":" in own] for own, _ in addresses})


def plug(cable: str) -> None:
    """From now on packets come and go."""
    _run(["ip", "link", "set", "dev", cable, "master", BRIDGE])


def unplug(cable: str) -> None:
    """From now on none do; the container's interface stays up."""
    _run(["ip", "link", "set", "dev", cable, "nomaster"])


def delete(name: str, cable: str) -> None:
    """Removes both; no error if they are not there. The namespace lives on while processes are in it.

    GuestError if `ip` does not end.
    """
    if cable and exists(cable):
        tools.run(["ip", "link", "del", "dev", cable])
    if name and (RUN / name).exists():
        tools.run(["ip", "netns", "delete", name])


def inside(name: str, command: list[str]) -> list[str]:
    # Not `ip netns exec`: it makes a mount namespace too, which fails where / is no mount point (a chroot).
    return ["nsenter", f"--net={RUN / name}", "--", *command]


def _run(command: list[str], given: str | None = None) -> None:
    done = tools.run(command, given)
    if done.returncode:
        raise GuestError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


def _quietly(command: list[str], given: str = "") -> None:
    try:
        tools.run(command, given)
    except HaulierError as error:
        log.info("%s", error)


def _set(setting: Path, value: str) -> None:
    try:
        setting.write_text(value)
    except OSError as error:
        raise GuestError(f"{setting} cannot be set to {value}: {error}") from error
