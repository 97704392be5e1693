"""What a guest's clients notice of its move, by the policy in its spec: `hook`, `keep` or `mptcp`.

    hook   the operator's program leads the address to the new site (`moved_hook` in site.toml)
    keep   the address stays where it is routed: a tunnel leads from there to the guest (haulier.network.tunnel)
    mptcp  the same for a moment, until connections go by an address of the new site (haulier.handoff.readdressing)

With `keep` the tunnel is made before the guest stops, and frames take it from the moment the token is given. A hook, if
there is one, runs all the same; when it worked, the tunnel goes as soon as it is quiet. A guest that comes home needs
no tunnel. Workers do this, recovery repeats it, and the agent looks after what is left (haulier.agent.tunnels).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Literal, NamedTuple

from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.errors import HandoffFailed, HaulierError
from haulier.guests.model import GuestSpec
from haulier.guests.tap import BRIDGE
from haulier.handoff.journal import Journal
from haulier.handoff.messages import Stretch
from haulier.network import announce, mtu, tunnel
from haulier.network.pool import Leases
from haulier.network.rules import AUTO
from haulier.network.tunnel import Records, Tunnel

log = logging.getLogger(__name__)

HOOK_S: Final = 10.0


class Hooked(NamedTuple):
    """How long the operator's hook took, and whether it did what it should; (0, False) without one."""

    seconds: float
    worked: bool


def call_moved_hook(site: Site, spec: GuestSpec, source: str) -> Hooked:
    """Tells the operator's hook that the guest runs here now. Its failure does not undo a move."""
    if not site.moved_hook:
        return Hooked(0.0, False)
    began = time.monotonic()
    address = "".join(spec.own_addresses[:1])
    command = [site.moved_hook, spec.name, address, source, site.name]
    facts = {"GUEST": spec.name, "ADDRESS": address, "MAC": spec.mac, "OLD_SITE": source, "NEW_SITE": site.name}
    facts["ADDRESS6"] = "".join(own for own in spec.own_addresses if ":" in own)
    facts["SITE_ADDRESS"] = leases(site).of(spec.name)
    with contextlib.suppress(HaulierError):
        facts["NEW_SITE_ADDRESSES"] = " ".join(site.reachable())
    environment = {**os.environ, **{f"HAULIER_{name}": value for name, value in facts.items()}}
    worked = False
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, check=False, timeout=HOOK_S, stdin=subprocess.DEVNULL, env=environment)
        worked = done.returncode == 0
    if not worked:
        log.warning("the hook %s failed for guest %s", site.moved_hook, spec.name)
    return Hooked(time.monotonic() - began, worked)


def records(site: Site) -> Records:
    """The tunnels of a site."""
    return Records(site.root / "tunnels")


def end_of(
    site: Site,
    guest: str,
    role: Literal["home", "away"],
    peer: str,
    mac: str,
    addresses: Sequence[str],
    news: Stretch,
) -> Tunnel:
    """This site's end of the tunnel that `news` is about; `addresses`: one of the guest's, or one of each family."""
    address, *also = addresses
    home = role == "home"
    return Tunnel(
        guest=guest,
        role=role,
        peer=peer,
        owner=str(site.root),
        vni=news.vni,
        local=news.home if home else news.away,
        remote=news.away if home else news.home,
        mac=mac,
        address=address,
        also="".join(also),
        gateway_mac="" if home else news.gateway_mac,
        bridge=BRIDGE,
        ahead=news.ahead,
    )


def leases(site: Site) -> Leases:
    """The addresses that a site has for guests, with the policy `mptcp`."""
    return Leases(site.root / "addresses", site.pool, BRIDGE)


def carried(bulk: Iterable[str]) -> list[tuple[str, mtu.Carries, str]]:
    """Of each of a site's addresses: what goes there whole, and what a tunnel's full packets would meet ("" = nothing).

    HaulierError without a bridge.
    """
    guest = mtu.of_bridge(BRIDGE)
    addresses = []
    for host in bulk:
        with contextlib.suppress(OSError):
            addresses.append(ends(host)[1])
    with ThreadPoolExecutor(max(1, len(addresses))) as pool:
        found = list(pool.map(lambda address: mtu.carries(address, mtu.needed(address, guest)), addresses))
    return [(address, each, mtu.advice(address, guest, each)) for address, each in zip(addresses, found, strict=True)]


def outlook(spec: GuestSpec, bulk: Sequence[str]) -> list[str]:
    """What a plan has to say of the tunnel that a guest's clients would use, by the first of the target's addresses."""
    if spec.net not in ("keep", "mptcp") or not spec.address:
        return []
    with contextlib.suppress(HaulierError):
        return [said for _, _, said in carried([host for host in bulk if host != AUTO][:1]) if said]
    return []


# -- at the source --------------------------------------------------------------------------------------------------


def stretch(site: Site, spec: GuestSpec, handoff: str, target: str, there: str) -> Stretch | None:
    """Makes this site's end of a tunnel to `target`, whose host answers at `there`; what to tell it.

    None if none is needed. HandoffFailed if the host refuses.
    """
    if spec.net not in ("keep", "mptcp") or not spec.address:
        return None
    mine = records(site)
    away = mine.find(spec.name, "away")
    if away is not None and away.peer == target and away.addresses == spec.kept_addresses:
        return None  # the other end of this tunnel is where the guest goes
    try:
        local, remote = ends(there)
        news = Stretch(vni=tunnel.vni_of(handoff), home=local, away=remote, gateway_mac=tunnel.mac_of(BRIDGE))
        mine.open(end_of(site, spec.name, "home", target, spec.mac, spec.kept_addresses, news))
        return news
    except (HaulierError, OSError, IndexError, KeyError) as error:
        mine.close(spec.name, "home")
        raise HandoffFailed(
            f"the address of guest {spec.name!r} cannot be kept: no tunnel to site {target!r} can be made ({error}); "
            f"see 'haulier doctor --network', or let a hook lead the way ('haulier guest net {spec.name} hook')"
        ) from error


def ends(there: str) -> tuple[str, str]:
    """The address by which this host would reach `there`, and that of `there`."""
    family, _, _, _, where = socket.getaddrinfo(there, tunnel.PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(where)
        return str(sock.getsockname()[0]), str(where[0])


def left(site: Site, guest: str) -> None:
    """The token is given: what comes for the guest follows it. Never fails: the agent tries again."""
    try:
        records(site).lead_away(guest)
    except HaulierError as error:
        log.error("packets for guest %s do not follow it yet: %s", guest, error)


def stayed(site: Site, guest: str) -> None:
    """The handoff failed: the guest is here, and so is all that comes for it."""
    mine = records(site)
    with contextlib.suppress(HaulierError):
        mine.come_home(guest)
    mine.close(guest, "home")


def gone(site: Site, guest: str) -> None:
    """The guest runs elsewhere for good: the far end of its earlier tunnel goes, unless its way leads on from here."""
    mine = records(site)
    away = mine.find(guest, "away")
    if away is not None and (away.ahead or mine.find(guest, "home") is None):
        mine.close(guest, "away")


# -- at the target --------------------------------------------------------------------------------------------------


def receive(site: Site, spec: GuestSpec, source: str, news: Stretch) -> str:
    """Makes this site's end of the tunnel; "" or why it cannot be made."""
    try:
        records(site).open(end_of(site, spec.name, "away", source, spec.mac, spec.kept_addresses, news))
    except (HaulierError, OSError) as error:
        return str(error)
    return ""


def coming(site: Site, guest: str) -> None:
    """The guest is about to run here: what comes for it must not leave any more."""
    try:
        records(site).come_home(guest)
    except HaulierError as error:
        log.error("packets for guest %s still leave this site: %s", guest, error)


def arrived(site: Site, journal: Journal, spec: GuestSpec, source: str) -> None:
    """The guest runs here: announces it, closes the tunnel that led away from here, calls the hook."""
    for address in spec.own_addresses:
        announce.announce(spec.mac, address, BRIDGE)
    mine = records(site)
    mine.close(spec.name, "home")
    hooked = call_moved_hook(site, spec, source)
    # With mptcp the tunnel keeps another address than the hook has led here.
    if not hooked.worked or spec.net == "mptcp" or mine.find(spec.name, "away") is None:
        return
    mine.routed(spec.name)
    with contextlib.suppress(HaulierError):
        Client.peer(site, journal.site(source)).post("/v1/peer/routed", {"guest": spec.name})
