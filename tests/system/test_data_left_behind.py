"""Three sites with real guests: chunks of the base, and memory, by a third site; data left behind and fetched later."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.agent.client import path_segment
from haulier.chunks.store import ChunkStore
from haulier.disks.export import DiskExport
from haulier.errors import HaulierError
from haulier.guests.qemu import Qemu
from haulier.handoff.residence import guest_paths, manifest_name, pin_name
from haulier.lab.scenario import IMAGE, LabSite, Template
from tests.support.fleet import Fleet, fleet
from tests.support.waiting import wait_for
from tests.system.stage import sh

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(600)]

LINKS = [
    ("oslo", "lisbon", "30mbit", "10ms"),
    ("porto", "lisbon", "60mbit", "5ms"),
    ("oslo", "porto", "60mbit", "5ms"),
]
DATA_MB = 48


@pytest.fixture(scope="module")
def sites(made: Template) -> Iterator[Fleet]:
    """oslo and porto have the image, lisbon has nothing."""

    def prepare(name: str, root: Path) -> None:
        if name != "lisbon":
            made.copy_to(root)

    with fleet(["oslo", "lisbon", "porto"], LINKS, guests=True, prepare=prepare) as up:
        yield up


def start(site: LabSite, name: str, address: str) -> None:
    site.facts("guest", "run", name, "--image", IMAGE, "--memory", "512M", "--address", address, timeout=300)


def hand_over(sites: Fleet, guest: str, source: str, target: str, *words: str) -> dict[str, Any]:
    facts: dict[str, Any] = sites[source].facts("handoff", guest, "--to", target, *words, timeout=400)
    assert facts["outcome"] == "done", facts
    return dict(facts["report"])


def status(site: LabSite, guest: str) -> str:
    return str(site.client.guest(guest)["status"])


def fill_facts(site: LabSite, guest: str) -> dict[str, Any]:
    return dict(DiskExport.attach(guest_paths(site.site, guest).nbd_ctl).stats()["fill"])


def test_the_base_comes_from_a_third_site_and_only_once(sites: Fleet) -> None:
    oslo, lisbon = sites["oslo"], sites["lisbon"]
    start(oslo, "first", "10.77.0.21/24")
    start(oslo, "second", "10.77.0.22/24")
    before = sum(sites.lab.wire_bytes("porto-lisbon"))
    report = hand_over(sites, "first", "oslo", "lisbon", "--check")
    origin = report["disk"]["origin"]
    assert origin["chunks_elsewhere"] > origin["chunks_sent"] + origin["chunks_recipe"], origin
    assert sum(sites.lab.wire_bytes("porto-lisbon")) - before > 20e6
    again = hand_over(sites, "second", "oslo", "lisbon", "--check")
    ratio = (origin["wire_bytes"] + sum(sites.lab.wire_bytes("porto-lisbon")) - before) / again["disk"]["origin"][
        "wire_bytes"
    ]
    print(f"disk bytes, first over second: {ratio:.0f}; from porto {origin['chunks_elsewhere']} chunks")
    assert ratio >= 20
    for guest in ("first", "second"):
        assert sh(lisbon, guest, "md5sum /bin/bash | cut -c1-8")
        lisbon.client.delete(f"/v1/guests/{path_segment(guest)}?force=1")


def test_data_stays_behind_until_it_is_read(sites: Fleet) -> None:
    oslo, lisbon = sites["oslo"], sites["lisbon"]
    start(oslo, "data", "10.77.0.23/24")
    make = (
        f"for i in 1 2 3 4; do head -c {DATA_MB // 4}M /dev/urandom > /var/tmp/f$i; done; sync; "
        "echo 3 > /proc/sys/vm/drop_caches; cd /var/tmp; md5sum f1 f2 f3 f4; echo 3 > /proc/sys/vm/drop_caches"
    )
    sums = sh(oslo, "data", make, 200).splitlines()
    assert len(sums) == 4
    before = sum(sites.lab.wire_bytes("oslo-lisbon"))
    report = hand_over(sites, "data", "oslo", "lisbon", "--disk", "on-demand", "--check")
    crossed = sum(sites.lab.wire_bytes("oslo-lisbon")) - before
    assert report["check"]["memory_equal"]
    assert report["disk"]["left_behind"] >= DATA_MB * 1e6, report["disk"]
    pin = pin_name("data", report["handoff"])

    # Both sides tell; nothing of it is collected at the source, across a restart of its agent.
    (here,) = lisbon.facts("status")["residuals"]["here"]
    (left,) = oslo.facts("status")["residuals"]["left"]
    assert here["left_bytes"] > 0
    assert (here["source"], left["target"]) == ("oslo", "lisbon")
    lisbon.facts("fill", "data", "--mode", "off")
    oslo.kill_agent()
    oslo.start_agent()
    oslo.facts("gc")
    with pytest.raises(HaulierError, match=r"still lacks|does not say"):
        oslo.facts("release", "data")
    with pytest.raises(HaulierError, match=r"fill data"):
        lisbon.facts("release", "data")
    with pytest.raises(HaulierError, match=r"still at site 'oslo'"):
        lisbon.facts("handoff", "data", "--to", "porto")

    # A read brings what it needs.
    demanded = fill_facts(lisbon, "data")["demanded"]
    assert sh(lisbon, "data", "md5sum /var/tmp/f1", 120).split()[0] == sums[0].split()[0]
    assert fill_facts(lisbon, "data")["demanded"] > demanded

    # Cut off: a write into missing clusters waits for nobody; a read stops the guest, which goes on by itself.
    sites.lab.link("oslo-lisbon").set(up=False)
    sites.lab.link("oslo-porto").set(up=False)
    sh(lisbon, "data", "dd if=/dev/urandom of=/var/tmp/f3 bs=4k seek=100 count=3 conv=notrunc,fsync 2>/dev/null", 60)
    qemu = Qemu.adopt(guest_paths(lisbon.site, "data"))
    with qemu.guest_agent(20) as agent:
        agent.execute("guest-exec", {"path": "/bin/sh", "arg": ["-c", "md5sum /var/tmp/f2 > /run/sum2"]})
    qemu.close()
    wait_for(lambda: status(lisbon, "data") == "io-error", 90, "the guest to stop at its read")
    sites.lab.link("oslo-lisbon").set(up=True)
    sites.lab.link("oslo-porto").set(up=True)
    wait_for(lambda: status(lisbon, "data") == "running", 60, "the guest to go on")
    wait_for(lambda: sh(lisbon, "data", "cat /run/sum2 2>/dev/null || true"), 60, "the sum of what was read")
    assert sh(lisbon, "data", "cat /run/sum2").split()[0] == sums[1].split()[0]

    # All of it, then: nothing is left, and the source is told.
    assert lisbon.facts("fill", "data", timeout=200)["left_bytes"] == 0
    wait_for(lambda: not oslo.facts("status")["residuals"]["left"], 60, "the source to let go")
    with ChunkStore(lisbon.site.store) as store:
        assert store.missing(store.load_manifest(manifest_name("data")).unique()) == []
        assert store.is_complete(manifest_name("data"))
    with ChunkStore(oslo.site.store) as store:
        assert pin not in store.manifest_names(pin)
    sh(lisbon, "data", "echo 3 > /proc/sys/vm/drop_caches")
    assert sh(lisbon, "data", "md5sum /var/tmp/f4", 60).split()[0] == sums[3].split()[0]
    print(f"{crossed / 1e6:.1f} MB crossed the link for {DATA_MB} MB of data; {time.process_time():.0f} s")
    lisbon.client.delete("/v1/guests/data?force=1")


def test_a_guest_goes_home_to_the_data_that_it_left(sites: Fleet) -> None:
    oslo, lisbon = sites["oslo"], sites["lisbon"]
    start(oslo, "home", "10.77.0.24/24")
    # So much that filling in the background, until it is turned off, leaves most of it.
    make = "head -c 40M /dev/urandom > /var/tmp/f; sync; echo 3 > /proc/sys/vm/drop_caches; md5sum /var/tmp/f"
    total = sh(oslo, "home", f"{make}; echo 3 > /proc/sys/vm/drop_caches", 200).split()[0]
    hand_over(sites, "home", "oslo", "lisbon", "--disk", "on-demand")
    lisbon.facts("fill", "home", "--mode", "off")
    sh(lisbon, "home", "head -c 1M /dev/urandom > /var/tmp/g; sync")
    assert any(row["left_bytes"] > 20e6 for row in lisbon.facts("status")["residuals"]["here"])
    found = lisbon.facts("verify", "home", timeout=200)
    assert found["ok"] and found["chunks_elsewhere"] > 300, found
    # The export is killed, too: the next one fetches as before.

    os.kill(DiskExport.attach(guest_paths(lisbon.site, "home").nbd_ctl).pid, signal.SIGKILL)
    report = hand_over(sites, "home", "lisbon", "oslo", "--check")
    assert report["disk"]["origin"]["wire_bytes"] < 10e6, report["disk"]
    assert sh(oslo, "home", "md5sum /var/tmp/f", 120).split()[0] == total
    wait_for(lambda: not oslo.facts("status")["residuals"]["left"], 60, "the pins to go")
    assert oslo.facts("verify", "home", timeout=200)["chunks_elsewhere"] == 0
    oslo.client.delete("/v1/guests/home?force=1")


def test_memory_goes_through_a_third_site_and_nothing_is_lost_when_that_dies(sites: Fleet) -> None:
    oslo, lisbon, porto = (sites[name] for name in ("oslo", "lisbon", "porto"))
    start(oslo, "far", "10.77.0.25/24")
    listening = porto_listens(sites)
    direct, beside = sites.lab.link("oslo-lisbon"), "porto-lisbon"
    direct.set(rate_bps=4e6)
    try:
        total = sh(oslo, "far", "head -c 24M /dev/urandom > /dev/shm/r; md5sum /dev/shm/r", 60).split()[0]
        before = sum(sites.lab.wire_bytes(beside))
        report = hand_over(sites, "far", "oslo", "lisbon", "--through", "porto", "--check")
        (through,) = (path for path in report["wire"]["paths"] if "through porto" in path["name"])
        assert report["check"]["memory_equal"] and report["waypoints"] == {"porto": ""}
        assert through["acked"] > 15e6, report["wire"]
        assert sum(sites.lab.wire_bytes(beside)) - before > through["acked"]
        wait_for(lambda: porto_listens(sites) == listening, 10, "the waypoint's end")

        # On the way back the third site dies, with what is on its way there.
        sh(lisbon, "far", "head -c 24M /dev/urandom > /dev/shm/r2", 60)
        again = sh(lisbon, "far", "md5sum /dev/shm/r2", 60).split()[0]
        options = {"check": True, "through": ["porto"], "downtime_ms": 1000}
        handoff = lisbon.client.start_handoff("far", "oslo", options)["id"]
        wait_for(lambda: carried(lisbon, handoff) > 4e6, 60, "something that went through porto")
        porto.kill_agent(signal.SIGKILL)
        wait_for(lambda: lisbon.client.handoff(handoff)["state"] == "ended", 200, "the handoff's end")
        ended = lisbon.client.handoff(handoff)
        assert ended["outcome"] == "done" and ended["report"]["check"]["memory_equal"], ended
        paths = ended["report"]["wire"]["paths"]
        assert [path["up"] for path in paths if "through porto" in path["name"]] == [False], paths
        assert [sh(oslo, "far", f"md5sum /dev/shm/{name}", 60).split()[0] for name in ("r", "r2")] == [total, again]

        # One that is not there is said, and the handoff goes without.
        report = hand_over(sites, "far", "oslo", "lisbon", "--through", "porto", "--check")
        assert "porto" in report["waypoints"]["porto"] and report["check"]["memory_equal"]
    finally:
        direct.set(rate_bps=30e6)
    lisbon.client.delete("/v1/guests/far?force=1")
    porto.start_agent()


def carried(site: LabSite, handoff: str) -> float:
    """Acknowledged bytes that went through another site."""
    paths = site.client.handoff(handoff)["status"].get("paths", [])
    return sum(float(path["acked"]) for path in paths if " through " in path["name"])


def porto_listens(sites: Fleet) -> list[str]:
    """Where it takes connections."""
    return sorted(line.split()[3] for line in sites.lab.exec("porto", ["ss", "-Hltn"]).stdout.splitlines())
