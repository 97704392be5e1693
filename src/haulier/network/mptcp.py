"""MPTCP between two hosts: what has to be set up, taking it down again, and seeing whether it came true.

The connecting host names its other addresses as `subflow` endpoints, and one rule and one table for each of them
lets their packets leave by their own interface. One variant, never `fullmesh` and never `signal` as well: two subflows
in one bottleneck halve each other (20+5 Mbps gave 18 instead of 23.5). Every trap here fails in silence, with a
connection that goes on over one path; hence haulier.session.mptcp.subflows, which counts.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from haulier.errors import HaulierError
from haulier.network import iproute
from haulier.network.addresses import Uplink

FIRST_TABLE: Final = 7440
"""Tables and priorities of rules from here on are ours."""
MOST: Final = 8


@dataclass(frozen=True)
class Step:
    """One line of `ip` that sets something up, and the one that takes it away ("" = stays)."""

    do: str
    undo: str = ""


def plan(first: Uplink, others: Sequence[tuple[Uplink, str]]) -> list[Step]:
    """What the connecting host needs for a connection that begins at `first` and spreads over `others`. Pure.

    `others`: each with the gateway, or the peer's address, by which its packets leave.
    """
    steps = [Step(f"mptcp limits set subflows {MOST} add_addr_accepted {MOST}")]
    for number, (uplink, hop) in enumerate(others[:MOST]):
        table = FIRST_TABLE + number
        address, device = uplink.address, uplink.interface
        length = ipaddress.ip_address(address).max_prefixlen
        direct = ipaddress.ip_address(hop) in ipaddress.ip_network(uplink.network)
        # `onlink`: with a hop outside the interface's subnet the kernel would refuse the route.
        route = f"route replace default via {hop} dev {device} table {table}" + ("" if direct else " onlink")
        family = "-6 " if uplink.version == 6 else ""
        steps += [
            Step(f"{family}{route}", f"{family}route flush table {table}"),
            Step(
                f"{family}rule add from {address}/{length} table {table} priority {table}",
                f"{family}rule del from {address}/{length} table {table} priority {table}",
            ),
            Step(
                f"mptcp endpoint add {address} id {100 + number} dev {device} subflow",
                f"mptcp endpoint delete id {100 + number}",
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
