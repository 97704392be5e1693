"""Taps in a namespace of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.errors import UnknownThing, UsageError
from haulier.guests.tap import check_bridge, create_tap, delete_tap, exists, tap_name


def test_names_fit_and_differ() -> None:
    names = {tap_name("a" * 41), tap_name("b" * 41), tap_name("web1"), tap_name("web1", "oslo")}
    assert len(names) == 4
    assert all(len(name) <= 15 for name in names)
    assert tap_name("web1") == tap_name("web1")


@pytest.mark.parametrize("name", ["", "x" * 16, "../../x", "-batch", "a b", "A"])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        create_tap(name)
    with pytest.raises(UsageError):
        delete_tap(name)


def inside(netns: str) -> list[str]:
    """Not `ip -n`, which mounts /sys anew."""
    return ["nsenter", f"--net=/run/netns/{netns}"]


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"guests-tap-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.root
def test_a_tap_joins_the_bridge_and_goes(netns: str) -> None:
    subprocess.run([*inside(netns), "ip", "link", "add", "br0", "type", "bridge"], check=True)
    tap = tap_name("web1")
    create_tap(tap, netns=netns)
    create_tap(tap, netns=netns)  # one left over from before is replaced
    shown = subprocess.run([*inside(netns), "ip", "-d", "-j", "link", "show", tap], check=True, capture_output=True)
    (link,) = json.loads(shown.stdout)
    assert link["master"] == "br0"
    assert link["linkinfo"]["info_kind"] == "tun"
    assert link["linkinfo"]["info_data"]["type"] == "tap"
    assert "UP" in link["flags"]
    delete_tap(tap, netns=netns)
    assert not exists(tap, netns=netns)
    delete_tap(tap, netns=netns)


@pytest.mark.root
def test_without_a_bridge_nothing_is_made(netns: str) -> None:
    with pytest.raises(UnknownThing, match="no bridge br0"):
        create_tap("hv-x", netns=netns)
    assert not exists("hv-x", netns=netns)


def own_sysfs() -> bool:
    """`ip netns exec` mounts /sys anew, for which / has to be a mount point: it is none in a chroot."""
    return any(line.split()[4] == "/" for line in Path("/proc/self/mountinfo").read_text().splitlines())


@pytest.mark.root
@pytest.mark.skipif(not own_sysfs(), reason="/ is no mount point here")
def test_a_bridge_needs_a_mac_of_its_own(netns: str) -> None:
    ask = [
        "ip", "netns", "exec", netns, sys.executable, "-c",
        "from haulier.guests.tap import check_bridge; print(check_bridge())",
    ]  # fmt: skip

    def verdict() -> str:
        return subprocess.run(ask, check=True, capture_output=True, text=True).stdout

    assert "no bridge br0" in verdict()
    subprocess.run([*inside(netns), "ip", "link", "add", "br0", "type", "bridge"], check=True)
    assert "not pinned" in verdict()
    subprocess.run([*inside(netns), "ip", "link", "set", "br0", "address", "52:54:00:ff:00:01"], check=True)
    assert verdict().strip() == "[]"
    assert check_bridge("nosuchbridge")
