"""Memory through other sites (scatter-gather): handoffs directly, through one site and two, and by way of a neighbour.

A guest with random bytes in its memory goes from one site to another; every site has its image. "Empty" is when the
source has nothing of the guest to do any more: after a handoff its end, where the guest goes to a near site first, and
from there on, the end of the first.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.support.fleet import Fleet, fleet  # noqa: E402

from haulier.guests.qemu import Qemu  # noqa: E402
from haulier.handoff.residence import guest_paths  # noqa: E402
from haulier.lab.scenario import IMAGE, LabSite, template  # noqa: E402

MB = 48
DIRECTLY, ONE, TWO = "directly", "through one other site", "through two other sites"
NEAR = "to a near site first, then on"
WAYS = {DIRECTLY: (), ONE: ("--through", "porto"), TWO: ("--through", "porto,bergen")}
ALIKE = f"{MB} MB of random memory, all links 10 Mbps, 40 ms"
NEIGHBOUR = f"{MB} MB of random memory, a neighbour at 100 Mbps, all other links 10 Mbps, 40 ms"
SETTINGS = {ALIKE: (DIRECTLY, ONE, TWO), NEIGHBOUR: (DIRECTLY, ONE, NEAR)}


@contextmanager
def sites(setting: str) -> Iterator[Fleet]:
    """From oslo to lisbon, with porto and bergen beside."""
    made_of = template(512)
    near = ("100mbit", "2ms") if setting == NEIGHBOUR else ("10mbit", "20ms")
    links = [("oslo", "lisbon", "10mbit", "20ms"), ("oslo", "porto", *near), ("porto", "lisbon", "10mbit", "20ms")]
    links += [("oslo", "bergen", "10mbit", "20ms"), ("bergen", "lisbon", "10mbit", "20ms")]
    names = ["oslo", "lisbon", "porto", "bergen"]
    with fleet(names, links, guests=True, prepare=lambda name, root: made_of.copy_to(root)) as made:
        yield made


def one(made: Fleet, way: str, number: int) -> dict[str, float]:
    """A guest of its own goes; seconds, ms and MB."""
    guest, oslo, lisbon = f"g{number}", made["oslo"], made["lisbon"]
    address = f"10.77.0.{100 + number}/24"
    oslo.facts("guest", "run", guest, "--image", IMAGE, "--memory", "512M", "--address", address, timeout=300)
    sh(oslo, guest, f"head -c {MB}M /dev/urandom > /dev/shm/r; md5sum /dev/shm/r > /dev/shm/sum")
    before, began = total_bytes(made), time.monotonic()
    if way == NEAR:
        first = oslo.facts("handoff", guest, "--to", "porto", timeout=900)["report"]
        empty = time.monotonic() - began
        report = made["porto"].facts("handoff", guest, "--to", "lisbon", timeout=900)["report"]
        downtime = first["downtime_ms"] + report["downtime_ms"]
    else:
        report = oslo.facts("handoff", guest, "--to", "lisbon", *WAYS[way], timeout=900)["report"]
        empty, downtime = time.monotonic() - began, report["downtime_ms"]
        wanted = WAYS[way][1].split(",") if WAYS[way] else []
        assert report.get("waypoints", {}) == dict.fromkeys(wanted, ""), report["waypoints"]
    took = time.monotonic() - began
    assert sh(lisbon, guest, "cd /dev/shm && md5sum -c sum").endswith("OK")
    lisbon.client.delete(f"/v1/guests/{guest}?force=1")
    moved = (total_bytes(made) - before) / 1e6
    return {"total s": took, "source empty s": empty, "downtime ms": downtime, "MB on all links": moved}


def sh(site: LabSite, guest: str, command: str) -> str:
    qemu = Qemu.adopt(guest_paths(site.site, guest))
    try:
        with qemu.guest_agent(60) as agent:
            return agent.check(["/bin/sh", "-c", command], timeout=120).decode().strip()
    finally:
        qemu.close()


def total_bytes(made: Fleet) -> int:
    return sum(sum(made.lab.wire_bytes(link)) for link in made.lab.links)


def run(quick: bool) -> Any:
    from report import Report, Target

    rows: list[dict[str, object]] = []
    targets: list[Target] = []
    for setting, ways in list(SETTINGS.items())[: 1 if quick else None]:
        with sites(setting) as made:
            backend = made.lab.backend
            found = {way: one(made, way, number) for number, way in enumerate(ways)}
        for way, figures in found.items():
            rows.append({"times as fast": found[DIRECTLY]["total s"] / figures["total s"], "way": way, **figures})
            rows[-1]["of"] = setting
        for way, least in ((ONE, 1.6), (TWO, 2.1)) if setting == ALIKE else ():
            targets.append(
                Target.at_least(f"{way}: times as fast", found[DIRECTLY]["total s"] / found[way]["total s"], least)
            )
    return Report(rows=rows, targets=targets, link=f"lab links ({backend})", notes=[f"load {os.getloadavg()}"])
