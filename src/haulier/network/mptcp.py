"""MPTCP between two hosts: what has to be set up, taking it down again, and seeing whether it came true.

The connecting host names its other addresses as `subflow` endpoints, and one rule and one table for each of them
lets their packets leave by their own interface. One variant, never `fullmesh` and never `signal` as well: two subflows
in one bottleneck halve each other (20+5 Mbps gave 18 instead of 23.5). Every trap here fails in silence, with a
connection that goes on over one path; hence haulier.session.mptcp.subflows, which counts.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from haulier.errors import HaulierError
from haulier.network import iproute
from haulier.network.addresses import Uplink

FIRST_TABLE: Final = 7440
"""Tables and priorities of rules from here on are ours, ..."""
FIRST_ID: Final = 100
"""... and endpoints from here on."""
MOST: Final = 8


@dataclass(frozen=True)
class Step:
    """One line of `ip` that sets something up, and the one that takes it away ("" = stays)."""

    do: str
    undo: str = ""


def numbered(addresses: Sequence[str], taken: Mapping[str, int]) -> dict[str, int]:
    """The number of each address's table and endpoint: the one in `taken`, else the lowest that is free. Pure."""
    found: dict[str, int] = {}
    for address in addresses:
        used = {*taken.values(), *found.values()}
        found[address] = taken[address] if address in taken else next(n for n in itertools.count() if n not in used)
    return found


def plan(there: str, others: Sequence[tuple[Uplink, str]], taken: Mapping[str, int] | None = None) -> list[Step]:
    """What the connecting host needs for a connection to the address `there` that spreads over `others`. Pure.

    `others`: uplinks beside the first, each with the gateway, or the peer's address, by which its packets leave. Every
    subflow goes to `there`, whatever it leaves by, and only that is led: what else that address of ours says goes as
    ever. `taken`: numbers that addresses here have already, by what was planned for other connections.
    """
    steps = [Step(f"mptcp limits set subflows {MOST} add_addr_accepted {MOST}")]
    others = others[:MOST]
    numbers = numbered([uplink.address for uplink, _ in others], taken or {})
    for uplink, hop in others:
        address, device, number = uplink.address, uplink.interface, numbers[uplink.address]
        table = FIRST_TABLE + number
        length = ipaddress.ip_address(address).max_prefixlen
        direct = ipaddress.ip_address(hop) in ipaddress.ip_network(uplink.network)
        route = f"{there}/{length} via {hop} dev {device} table {table}"
        rule = f"from {address}/{length} table {table} priority {table}"
        family = "-6 " if uplink.version == 6 else ""
        steps += [
            # `onlink`: with a hop outside the interface's subnet the kernel would refuse the route.
            Step(f"{family}route replace {route}" + ("" if direct else " onlink"), f"{family}route del {route}"),
            Step(f"{family}rule add {rule}", f"{family}rule del {rule}"),
            Step(
                f"mptcp endpoint add {address} id {FIRST_ID + number} dev {device} subflow",
                f"mptcp endpoint delete id {FIRST_ID + number}",
            ),
        ]
    return steps


def script(steps: Sequence[Step]) -> str:
    """The same for an operator's shell."""
    return "".join(f"ip {step.do}\n" for step in steps)


def apply(steps: Sequence[Step]) -> None:
    """Sets it up; what was left of an earlier time is replaced. HaulierError if the host refuses: nothing stays."""
    undo(steps)
    done: list[Step] = []
    try:
        for step in steps:
            iproute.run(["ip", *step.do.split()])
            done.append(step)
    except HaulierError:
        undo(done)
        raise


def undo(steps: Sequence[Step]) -> None:
    """Takes away what is there of it; no error for what is not."""
    for step in reversed(steps):
        if step.undo:
            try:
                iproute.run(["ip", *step.undo.split()])
            except HaulierError:
                continue


def gateways() -> dict[str, str]:
    """Interface -> the gateway of its default route, where it has one."""
    found: dict[str, str] = {}
    for entry in iproute.facts("route", "show", "default", "table", "all"):
        if entry.get("gateway") and entry.get("dev"):
            found.setdefault(str(entry["dev"]), str(entry["gateway"]))
    return found
