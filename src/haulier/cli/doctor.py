"""`haulier doctor`: what this host can do, and what is wrong."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from haulier.cli.common import Json, Root, client, print_json, print_table, size
from haulier.cli.progress import wait


def doctor(
    *,
    repair: Annotated[
        bool,
        Parameter(negative="", help="Read all of the store, put right what can be, fetch what is lost from others."),
    ] = False,
    network: Annotated[
        bool, Parameter(negative="", help="Uplinks, tunnels, and what MPTCP would need, as commands.")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> int:
    """Examine this site's host, its store and the other sites. The exit code is 1 if something is wrong."""
    if repair:
        return _repair(root, json)
    if network:
        return _network(root, json)
    found = client(root).get("/v1/doctor", timeout=120)
    if json:
        print_json(found)
    else:
        print_table(
            ("", "", "FOUND", "ADVICE"),
            [("ok" if c["ok"] else "WRONG", c["name"], c["found"], c["advice"]) for c in found["checks"]],
        )
    return 0 if found["ok"] else 1


def _network(root: Root, json: bool) -> int:
    found = client(root).get("/v1/doctor/network")
    if json:
        print_json(found)
        return 0
    print_table(
        ("UPLINK", "ADDRESS", "CAP", "COST"),
        [
            (u["interface"], u["address"], f"{u['cap_mbps']:g} Mbit/s" if u["cap_mbps"] else "", u["cost"] or "")
            for u in found["uplinks"]
        ],
    )
    if found["tunnels"]:
        print()
        print_table(
            ("GUEST", "TUNNEL", "", "PACKETS"),
            [
                (t["guest"], f"{'to' if t['role'] == 'home' else 'from'} {t['peer']}", t["interface"], t["packets"])
                for t in found["tunnels"]
            ],
        )
    if found["addresses"]:
        print()
        print_table(("GUEST", "ADDRESS HERE"), [(lease["guest"], lease["address"]) for lease in found["addresses"]])
    if found["waypoints"]:
        print()
        print_table(
            ("WAYPOINT OF", "FROM", "CARRIED"),
            [(each["handoff"], each["source"], size(each["carried"])) for each in found["waypoints"]],
        )
    print()
    print(f"DHCP for guests: {found['dhcp']}")
    print("MPTCP: " + ("this kernel has it" if found["mptcp"]["available"] else "this kernel has none, or it is off"))
    for site, ways in found["tunnel_mtu"].items():
        for way in ways:
            print(f"to {site}: {way['advice'] or 'a tunnel carries full packets of guests whole'}")
    for site, each in found["mptcp"]["to"].items():
        if each["commands"]:
            print(f"for MPTCP to {site}, a handoff sets up (and takes down):", *each["commands"], sep="\n")
        else:
            print(f"no MPTCP to {site}: {each['why_not']}")
    return 0


def _repair(root: Root, json: bool) -> int:
    agent = client(root)
    done = wait(agent, agent.post("/v1/doctor/repair"), json)
    if json:
        print_json(done)
        return 0 if done["ok"] else 1
    found = done["found"]
    print_table(
        ("", ""),
        [
            ("chunks read", found["chunks"]),
            ("damaged", len(found["corrupt"])),
            ("missing", len(found["missing"])),
            ("reference counts put right", found["wrong_references"]),
            ("damaged manifests", " ".join(found["damaged_manifests"]) or 0),
            ("lost: no other site has them", len(done["lost"])),
            ("the store is", "whole" if done["ok"] else "NOT WHOLE"),
        ],
    )
    return 0 if done["ok"] else 1
