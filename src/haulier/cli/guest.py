"""`haulier guest`: run, start, stop, remove, list, show."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from haulier.agent.client import path_segment
from haulier.cli.common import (
    GuestName,
    Json,
    Root,
    client,
    parse_memory,
    print_json,
    print_table,
    tell,
    words_of,
)
from haulier.cli.progress import wait
from haulier.errors import UsageError
from haulier.units import MIB

guest_app = App(name="guest", help="Guests of this site.")


@guest_app.command
def run(
    name: GuestName,
    /,
    *,
    image: Annotated[str, Parameter(help="Image to run.")],
    memory: Annotated[str, Parameter(help="For example 512M or 2G.")] = "512M",
    vcpus: int = 1,
    address: Annotated[
        list[str] | None,
        Parameter(
            help="Its address, for example 10.77.0.10/24 or fd77::10/64, or auto; may be given again, one of IPv4 and "
            "one of IPv6. Without one it has no NIC."
        ),
    ] = None,
    gateway: Annotated[
        list[str] | None, Parameter(help="Of each family [default: the first address of its network].")
    ] = None,
    mac: Annotated[str, Parameter(help="[default: a random one]")] = "",
    cold: Annotated[bool, Parameter(negative="", help="Boot it even where there is a golden snapshot.")] = False,
    agent: Annotated[
        bool, Parameter(name="--agent", help="Wait for the agent inside and give the guest its identity.")
    ] = True,
    kind: Annotated[str, Parameter(help="vm or container [default: what the image is of].")] = "",
    command: Annotated[str, Parameter(help="What a container runs, as one text [default: the image's].")] = "",
    env: Annotated[list[str] | None, Parameter(help="NAME=VALUE for a container; may be given again.")] = None,
    user: Annotated[str, Parameter(help="UID:GID of a container's command [default: the image's].")] = "",
    net: Annotated[
        str,
        Parameter(help="When it moves: hook (moved_hook leads clients), keep (a tunnel from the old site) or mptcp."),
    ] = "hook",
    disk: Annotated[str, Parameter(help="Room for what a container writes, for example 2G.")] = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Run a new guest: a container, or a VM (from a golden snapshot where there is one, else by booting)."""
    caller = client(root)
    body = {
        "name": name,
        "image": image,
        "memory_mib": parse_memory(memory),
        "vcpus": vcpus,
        **by_family(address or [], gateway or []),
        "mac": mac,
        "cold": cold,
        "agent": agent,
        "kind": kind,
        "command": words_of(command),
        "env": env or [],
        "user": user,
        "net": net,
        "disk_bytes": parse_memory(disk) * MIB if disk else 0,
    }
    result = wait(caller, caller.post("/v1/guests", body), json)
    how = "a container" if result.get("kind") == "container" else "booted"
    how = "from a golden snapshot" if result.get("golden") else how
    tell(result, json, f"guest {name} runs ({how}, {result['accel']}, pid {result['pid']})")


def by_family(addresses: list[str], gateways: list[str]) -> dict[str, str]:
    """A guest's addresses and gateways as the agent takes them: IPv4, then IPv6, or IPv6 alone. UsageError."""
    only6 = bool(addresses) and all(":" in address for address in addresses)
    found: dict[str, str] = {}
    for what, given in (("address", addresses), ("gateway", gateways)):
        first = [text for text in given if only6 or ":" not in text]
        second = [text for text in given if not only6 and ":" in text]
        if len(first) > 1 or len(second) > 1:
            raise UsageError(f"--{what} {' '.join(given)[:80]}: give one, or one of IPv4 and one of IPv6")
        found |= {what: "".join(first), f"{what}6": "".join(second)}
    return found


@guest_app.command
def net(name: str, policy: str, /, *, root: Root = None, json: Json = False) -> None:
    """Say how a guest's clients follow it: hook (moved_hook leads them), keep (a tunnel) or mptcp (by themselves).

    Parameters
    ----------
    name
        Name of the guest.
    policy
        hook, keep or mptcp.
    """
    result = client(root).post(f"/v1/guests/{path_segment(name)}/net", {"net": policy})
    lines = [f"guest {name}: {result['net']}"]
    if result.get("address"):
        lines.append(f"its address of this site is {result['address']}")
    tell(result, json, "\n".join([*lines, *result.get("remarks", ())]))


@guest_app.command
def adopt(
    name: GuestName,
    /,
    *,
    lxc: Annotated[str, Parameter(help="LXC's name of the container [default: the guest's].")] = "",
    lxc_path: Annotated[str, Parameter(help="Where LXC has it [default: /var/lib/lxc].")] = "",
    memory: Annotated[str, Parameter(help="What its processes may take, for example 512M or 2G.")] = "512M",
    address: Annotated[str, Parameter(help="The address that it has, for example 10.77.0.10/24.")] = "",
    gateway: Annotated[str, Parameter(help="[default: the first address of its network]")] = "",
    disk: Annotated[str, Parameter(help="Room for all of its files, for example 2G.")] = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Take over a container that LXC runs here; it goes on running, and can be handed over from then on."""
    body = {
        "name": name,
        "container": lxc,
        "folder": lxc_path,
        "memory_mib": parse_memory(memory),
        "address": address,
        "gateway": gateway,
        "disk_bytes": parse_memory(disk) * MIB if disk else 0,
    }
    result = client(root).post("/v1/lxc", body)
    tell(result, json, f"guest {name} is LXC's container, pid {result['pid']}, and runs on")


@guest_app.command
def start(name: GuestName, /, *, root: Root = None, json: Json = False) -> None:
    """Boot a stopped guest again; one that stopped at an I/O error goes on where it was."""
    agent = client(root)
    result = wait(agent, agent.post(f"/v1/guests/{path_segment(name)}/start"), json)
    tell(result, json, f"guest {name} runs (pid {result['pid']})")


@guest_app.command
def stop(
    name: GuestName,
    /,
    *,
    deadline: Annotated[float, Parameter(help="Seconds before it is stopped by force.")] = 60.0,
    force: Annotated[bool, Parameter(negative="", help="At once, as if the power failed.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Shut a guest down. Its disk stays; 'haulier guest start' boots it again."""
    agent = client(root)
    body = {"deadline_s": deadline, "force": force}
    result = wait(agent, agent.post(f"/v1/guests/{path_segment(name)}/stop", body), json)
    tell(result, json, f"guest {name} stopped" + ("" if result["clean"] else " by force"))


@guest_app.command
def reclaim(name: GuestName, /, *, root: Root = None, json: Json = False) -> None:
    """Take back a guest that was being given to a site which is gone for good, and out of the fleet.

    What that site wrote, if it ever ran the guest, is lost. Should it turn up again, keep it off the network.
    """
    facts = client(root).post(f"/v1/guests/{path_segment(name)}/reclaim", timeout=60)
    more = f"; {facts['status']}" if facts["status"] else ""
    tell(facts, json, f"guest {name} is this site's again (epoch {facts['epoch']}){more}")


@guest_app.command
def remove(
    name: GuestName,
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="Also if it runs; where it is away, its epochs too.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Remove a stopped guest and its disk; or, where it has moved away, what it left behind here."""
    result = client(root).delete(f"/v1/guests/{path_segment(name)}{'?force=1' if force else ''}")
    tell(result, json, f"removed: {result['removed']} ({name})")


@guest_app.command(name="list")
def listing(*, root: Root = None, json: Json = False) -> None:
    """List the guests of this site, those that moved away too."""
    guests = client(root).guests()
    if json:
        print_json({"guests": guests})
        return
    print_table(
        ("GUEST", "STATE", "STATUS", "EPOCH", "IMAGE", "MEMORY", "ADDRESS", "HANDOFF"),
        [
            (
                g["name"],
                g["state"],
                g["status"],
                g["epoch"],
                g["image"],
                f"{g['memory_mib']} MiB",
                " ".join(filter(None, (g["address"], g["address6"]))) or "-",
                g["handoff"],
            )
            for g in guests
        ],
    )


@guest_app.command
def show(name: GuestName, /, *, root: Root = None, json: Json = False) -> None:
    """Show all about a guest."""
    facts = client(root).guest(name)
    if json:
        print_json(facts)
        return
    flat = {**{k: v for k, v in facts.items() if not isinstance(v, dict)}, **facts["spec"]}
    print_table(("", ""), list(flat.items()))
