"""`haulier lab`: sites and shaped links on this machine. See docs/lab.md."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from haulier.errors import HaulierError, UnknownThing, UsageError
from haulier.lab import topology as topologies
from haulier.lab.lab import Lab, take_down
from haulier.lab.shaper import Shape

lab_app = App(name="lab", help="Sites as network namespaces with shaped links between them, on this machine (root).")

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print facts as JSON.")]
WhichLab = Annotated[
    str | None, Parameter(name="--lab", help="The lab [default: $HAULIER_LAB, or the only one that is up].")
]


@lab_app.command
def up(
    topology: Path,
    /,
    *,
    force: Annotated[bool, Parameter(negative="")] = False,
    backend: str | None = None,
    json: Json = False,
) -> None:
    """Bring up the lab that a TOML file describes.

    Parameters
    ----------
    topology
        The description: sites and links.
    force
        Take the lab down first if it is up, and take over namespaces of its names.
    backend
        How links are shaped: netem (the kernel's) or tun (haulier's own relay). Default: netem where the kernel has it.
    """
    made = Lab.up(topology, force=force, backend=backend)
    _tell(made.status(), json)


@lab_app.command
def down(name: str | None = None, /, *, json: Json = False) -> None:
    """Take a lab down: end what runs in its sites, remove namespaces, links and files. Fine when there is nothing.

    Parameters
    ----------
    name
        The lab, or its TOML file; may be left out while only one lab is up.
    """
    if name is None:
        there = Lab.names()
        if len(there) > 1:
            raise UsageError(f"several labs are up ({', '.join(there)}): say which")
        name = there[0] if there else None
    elif name.endswith(".toml"):
        name = topologies.load(Path(name)).name
    if name is not None:
        topologies.check_name(name, "the lab to take down")
        take_down(name)
    if json:
        _print_json({"down": name})
    else:
        print(f"lab {name} is down" if name else "no lab is up")


@lab_app.command(name="exec")
def exec_(
    site: str,
    /,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    lab: WhichLab = None,
) -> None:
    """Run a command inside a site; its exit code is the command's. Put -- before a command that has options.

    Parameters
    ----------
    site
        The site.
    command
        The command and its arguments; a shell when there is none.
    """
    argv = _which(lab).command(site, command or (os.environ.get("SHELL", "/bin/sh"),))
    sys.stdout.flush()
    os.execvp(argv[0], argv)


@lab_app.command(name="set")
def set_(
    link: str,
    /,
    *,
    rate: str | None = None,
    delay: str | None = None,
    jitter: str | None = None,
    loss: str | None = None,
    queue: str | None = None,
    up: Annotated[bool | None, Parameter(name="--up", negative="--down")] = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    lab: WhichLab = None,
    json: Json = False,
) -> None:
    """Change a link while it is used.

    Parameters
    ----------
    link
        The link, like oslo-lisbon.
    rate
        Like 10mbit; 0 = not limited.
    delay
        One way, like 25ms.
    jitter
        Like 2ms: each packet's delay is uniform in delay ± jitter.
    loss
        Like 1% or 0.01.
    queue
        Like 64kB; 0 = one bandwidth-delay product.
    up
        --down loses everything, including what is on its way; --up carries again.
    source
        Only for packets that this site sends; both directions when left out.
    """
    found = _which(lab)
    ab, ba = found.link(link).set(
        source=source,
        rate_bps=None if rate is None else topologies.parse_rate(rate),
        delay_s=None if delay is None else topologies.parse_time(delay),
        jitter_s=None if jitter is None else topologies.parse_time(jitter, "jitter"),
        loss=None if loss is None else topologies.parse_loss(loss),
        queue_bytes=None if queue is None else topologies.parse_size(queue),
        up=up,
    )
    a, b = found.link(link).ends
    if json:
        _print_json({"link": link, "a": a, "b": b, "a_to_b": _shape_facts(ab), "b_to_a": _shape_facts(ba)})
    else:
        print(f"{link}  {a} -> {b}: {describe(ab)}\n{link}  {b} -> {a}: {describe(ba)}")


@lab_app.command
def status(name: str | None = None, /, *, json: Json = False) -> None:
    """Show a lab (or all that are up): sites, addresses, links as they are now, bytes that crossed them.

    Parameters
    ----------
    name
        The lab.
    """
    if name is not None:
        _tell(Lab.load(name).status(), json)
        return
    labs: list[dict[str, Any]] = []
    for there in Lab.names():
        try:
            labs.append(Lab.load(there).status())
        except HaulierError as error:
            # Left half way, or taken down meanwhile: the others are still worth telling.
            labs.append({"lab": there, "error": str(error)})
    if json:
        _print_json({"labs": labs})
    elif not labs:
        print("no lab is up")
    else:
        for facts in labs:
            if "error" in facts:
                print(f"lab {facts['lab']}: {facts['error']}")
            else:
                _tell(facts, json)


@lab_app.command
def route(*words: str, json: Json = False) -> None:
    """Make CLIENT reach GUEST_IP through SITE: haulier lab route [LAB] CLIENT GUEST_IP SITE.

    Parameters
    ----------
    words
        [LAB] CLIENT GUEST_IP SITE; the lab may be left out while only one is up.
    """
    if len(words) not in (3, 4):
        raise UsageError("haulier lab route [LAB] CLIENT GUEST_IP SITE: give three or four words")
    client, guest_ip, site = words[-3:]
    found = _which(words[0] if len(words) == 4 else None)
    found.route_guest(client, guest_ip, site)
    if json:
        _print_json({"lab": found.name, "client": client, "guest": guest_ip, "via": site})
    else:
        print(f"{client} reaches {guest_ip} through {site}")


def describe(shape: Shape) -> str:
    """A shape in a few words."""
    if not shape.up:
        return "down"
    words = [f"{shape.rate_bps / 1e6:g} Mbit/s" if shape.rate_bps else "unlimited", f"{shape.delay_s * 1e3:g} ms"]
    if shape.jitter_s:
        words[-1] += f" ± {shape.jitter_s * 1e3:g} ms"
    if shape.loss:
        words.append(f"loss {shape.loss * 100:g} %")
    if shape.rate_bps:
        words.append(f"queue {shape.limit_bytes / 1e3:g} kB")
    return ", ".join(words)


def _which(lab: str | None) -> Lab:
    lab = lab or os.environ.get("HAULIER_LAB") or None
    if lab is not None:
        return Lab.load(lab)
    there = Lab.names()
    if not there:
        raise UnknownThing("no lab is up: bring one up with `haulier lab up TOPOLOGY.toml`")
    if len(there) > 1:
        raise UsageError(f"several labs are up ({', '.join(there)}): say which")
    return Lab.load(there[0])


def _shape_facts(shape: Shape) -> dict[str, Any]:
    return {
        "rate_bps": shape.rate_bps,
        "delay_s": shape.delay_s,
        "jitter_s": shape.jitter_s,
        "loss": shape.loss,
        "queue_bytes": shape.limit_bytes,
        "up": shape.up,
    }


def _print_json(facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _tell(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(facts)
        return
    print(f"lab {facts['lab']}, links by {facts['backend']}")
    for name, site in facts["sites"].items():
        guests = f", guests behind {site['guest_gateway']}" if site["guest_gateway"] else ""
        print(f"  site {name}: {site['address']}, namespace {site['namespace']}{guests}")
    for name, link in facts["links"].items():
        dead = "" if link["alive"] else "  (its relay is gone: `haulier lab up --force` brings it back)"
        print(f"  link {name}{dead}")
        for way, source, target in (("a_to_b", "a", "b"), ("b_to_a", "b", "a")):
            crossed = link["wire_bytes"][way == "b_to_a"] if link["wire_bytes"] else 0
            words = describe(Shape(**link[way]))
            print(f"    {link[source]} -> {link[target]}: {words}; {crossed} bytes crossed")
