"""Network taps of guests, joined to the site's bridge.

Plain `ip` calls in the network namespace of the caller (an agent runs in its site's), or in `netns`.

Rules about MAC addresses, which a handoff depends on:

- The guest's MAC is its own and goes with it; `hotplug_nic` and the command line take it from the spec.
- The bridge is the guest's gateway, and has the SAME address and MAC at every site: otherwise the guest's ARP cache
  points nowhere after a handoff. `check_bridge` sees to it that the MAC is pinned: a bridge without one of its own
  takes the lowest of its ports', so it would change with each guest that comes or goes.
- The tap's MAC is the host's side of the cable and means nothing, as long as it is not the guest's.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Final

from haulier import tools
from haulier.errors import GuestError, UnknownThing, UsageError
from haulier.guests.model import check_name

BRIDGE: Final = "br0"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,14}")
"""Interface names have at most 15 bytes."""


def tap_name(guest: str, owner: str = "") -> str:
    """The tap of a guest: short enough for any guest name. `owner` tells two sites in one namespace apart."""
    digest = hashlib.blake2b(f"{owner}/{check_name(guest)}".encode(), digest_size=5).hexdigest()
    return f"hv-{digest}"


def create_tap(name: str, bridge: str = BRIDGE, *, netns: str | None = None) -> None:
    """Make the tap `name` and join it to `bridge`. One that is left over from before is replaced.

    Raises `UnknownThing` without such a bridge, `GuestError` when the host refuses.
    """
    _check(name, bridge)
    if not exists(bridge, netns=netns):
        raise UnknownThing(f"no bridge {bridge} here: make it, or start the agent in its site's network namespace")
    delete_tap(name, netns=netns)
    _ip(netns, "tuntap", "add", "dev", name, "mode", "tap")
    try:
        # The host itself has no address on a guest's cable; without this it would speak IPv6 there.
        _ip(netns, "link", "set", "dev", name, "addrgenmode", "none")
        _ip(netns, "link", "set", "dev", name, "master", bridge)
        _ip(netns, "link", "set", "dev", name, "up")
    except GuestError:
        delete_tap(name, netns=netns)
        raise


def delete_tap(name: str, *, netns: str | None = None) -> None:
    """Remove the tap; no error if there is none."""
    _check(name)
    if exists(name, netns=netns):
        _ip(netns, "link", "del", "dev", name)


def exists(name: str, *, netns: str | None = None) -> bool:
    """Whether an interface of this name is there."""
    _check(name)
    return _run(netns, "link", "show", "dev", name).returncode == 0


def check_bridge(bridge: str = BRIDGE) -> list[str]:
    """What is wrong with the bridge as a gateway of moving guests (in the caller's namespace); empty if nothing."""
    _check(bridge)
    if not exists(bridge):
        return [f"there is no bridge {bridge}"]
    # sysfs shows the namespace that it was mounted in, which need not be ours: then there is no telling.
    place = Path("/sys/class/net") / bridge
    if not place.exists():
        return []
    if (place / "addr_assign_type").read_text().strip() != "3":
        mac = (place / "address").read_text().strip()
        return [
            f"the MAC of {bridge} ({mac}) is not pinned: set it, the same at every site (ip link set {bridge} address)"
        ]
    return []


def _check(*names: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot name a network interface: use 1 to 15 of a-z, 0-9 and '-'")


def _ip(netns: str | None, *words: str) -> None:
    done = _run(netns, *words)
    if done.returncode:
        raise GuestError(f"ip {' '.join(words)} failed: {done.stderr.strip()[-200:]}")


def _run(netns: str | None, *words: str) -> subprocess.CompletedProcess[str]:
    # Not `ip -n`: it makes a mount namespace too, which fails where / is no mount point (a chroot).
    where = [] if netns is None else ["nsenter", f"--net=/run/netns/{netns}", "--"]
    return tools.run([*where, "ip", *words])
