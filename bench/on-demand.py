"""Leaving data behind against full copying: the three scenarios of the shared-folder paper.

A guest with user data of which a tenth is in use (and in its page cache) goes to another site. Then, at the target:
nothing more is asked for; a twentieth of the data is read; all of it is read, piece by piece. With `--disk full` all
of it travels before the guest runs there; with `--disk on-demand` what is read is fetched, with the background off, so
that the bytes are those of what was asked for.

Time to first answer: from the beginning of the handoff until a program in the guest at the target has answered.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.support.fleet import Fleet, fleet  # noqa: E402

from haulier.guests.qemu import Qemu  # noqa: E402
from haulier.handoff.residence import guest_paths  # noqa: E402
from haulier.lab.scenario import IMAGE, LabSite, template  # noqa: E402

PIECE_MB = 10
"""Size of one file of user data."""


def sh(site: LabSite, guest: str, command: str, timeout: float = 600) -> str:
    qemu = Qemu.adopt(guest_paths(site.site, guest))
    try:
        with qemu.guest_agent(60) as agent:
            return agent.check(["/bin/sh", "-c", command], timeout=timeout).decode().strip()
    finally:
        qemu.close()


def crossed(made: Fleet) -> int:
    return sum(made.lab.wire_bytes("oslo-lisbon"))


def prepare_guest(made: Fleet, guest: str, address: str, files: int, used: int) -> str:
    """A guest at oslo with `files` files of random data; the sums of them; the first `used` are in its page cache."""
    oslo = made["oslo"]
    oslo.facts("guest", "run", guest, "--image", IMAGE, "--memory", "512M", "--address", address, timeout=300)
    sh(
        oslo,
        guest,
        f"mkdir -p /var/tmp/d; cd /var/tmp/d; "
        f"for i in $(seq 1 {files}); do head -c {PIECE_MB}M /dev/urandom > $i; done; sync; "
        f"echo 3 > /proc/sys/vm/drop_caches; for i in $(seq 1 {used}); do cat $i > /dev/null; done",
    )
    return guest


def read(site: LabSite, guest: str, first: int, last: int, pause_s: float) -> None:
    """Reads files `first` to `last` past the page cache of what was read before."""
    for number in range(first, last + 1):
        sh(site, guest, f"cat /var/tmp/d/{number} > /dev/null")
        time.sleep(pause_s)


def one(made: Fleet, guest: str, disk: str, first: int, last: int, pause_s: float) -> dict[str, Any]:
    """A handoff and the reads after it."""
    oslo, lisbon = made["oslo"], made["lisbon"]
    before, began = crossed(made), time.monotonic()
    facts = oslo.facts("handoff", guest, "--to", "lisbon", "--disk", disk, timeout=1800)
    report = facts["report"]
    with contextlib.suppress(Exception):
        if disk == "on-demand":
            lisbon.facts("fill", guest, "--mode", "off")
    sh(lisbon, guest, "true")
    answered = time.monotonic() - began
    moved = crossed(made) - before
    reading = time.monotonic()
    if last >= first:
        read(lisbon, guest, first, last, pause_s)
    return {
        "answer_s": answered,
        "handoff_s": float(report["total_s"]),
        "downtime_ms": float(report["downtime_ms"]),
        "moved": moved,
        "bytes": crossed(made) - before,
        "total_s": time.monotonic() - began,
        "reading_s": time.monotonic() - reading,
        "left": int(report["disk"]["left_behind"]),
    }


def run(quick: bool) -> Any:
    from report import Report, Target

    rate, files = ("100mbit", 12) if quick else ("100mbit", 200)
    used, more = max(1, files // 10), max(1, files // 20)
    scenarios = [
        ("nothing more", 1, 0, 0.0),
        ("a twentieth more", used + 1, used + more, 0.0),
        ("all of it, spread", used + 1, files, 0.2),
    ]
    made_of = template(512)
    rows: list[dict[str, object]] = []
    targets: list[Target] = []

    def prepare(name: str, root: Path) -> None:
        made_of.copy_to(root)

    with fleet(["oslo", "lisbon"], [("oslo", "lisbon", rate, "10ms")], guests=True, prepare=prepare) as made:
        backend = made.lab.backend
        for number, (what, first, last, pause_s) in enumerate(scenarios):
            found: dict[str, dict[str, Any]] = {}
            for place, disk in enumerate(("full", "on-demand")):
                guest = f"g{number}{place}"
                prepare_guest(made, guest, f"10.77.0.{100 + 2 * number + place}/24", files, used)
                found[disk] = one(made, guest, disk, first, last, pause_s)
                made["lisbon"].client.delete(f"/v1/guests/{guest}?force=1")
            full, left = found["full"], found["on-demand"]
            rows.append(
                {
                    "full/on-demand bytes": full["bytes"] / left["bytes"],
                    "first answer": full["answer_s"] / left["answer_s"],
                    "then": what,
                    "full MB": full["bytes"] / 1e6,
                    "on-demand MB": left["bytes"] / 1e6,
                    "full answers s": full["answer_s"],
                    "on-demand answers s": left["answer_s"],
                    "full total s": full["total_s"],
                    "on-demand total s": left["total_s"],
                    "full downtime ms": full["downtime_ms"],
                    "on-demand downtime ms": left["downtime_ms"],
                }
            )
            name = f"{what}: time to first answer, on demand against full"
            targets.append(Target.at_most(name, left["answer_s"] / full["answer_s"], 1.0))
    data = files * PIECE_MB
    notes = [f"{data} MB of user data, {used * PIECE_MB} MB of it in use; load {os.getloadavg()}"]
    return Report(rows=rows, targets=targets, link=f"{rate}, 20 ms round trip ({backend})", notes=notes)
