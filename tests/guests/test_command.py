"""What the command line promises to a handoff: the same devices, addresses and RAM blocks on both sides."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from haulier.errors import UsageError
from haulier.guests.accel import Accelerator
from haulier.guests.command import command_line, nic_device
from haulier.guests.model import new_spec
from haulier.guests.paths import GuestPaths

SPEC = new_spec("web1", "debian", memory_mib=256, disk_size=4 << 30)
PATHS = GuestPaths(Path("/run/h/web1"), Path("/dev/shm/h"))
TCG = Accelerator("tcg", "test")


def options(command: list[str], name: str) -> list[str]:
    return [value for key, value in itertools.pairwise(command) if key == name]


def devices(command: list[str]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in options(command, "-device")]


def test_source_and_target_differ_in_places_and_in_waiting_only() -> None:
    there = GuestPaths(Path("/run/h/web1"), Path("/dev/shm/h"))
    source = command_line("qemu", SPEC, PATHS, TCG, nic="tap-a")
    target = command_line("qemu", SPEC, there, TCG, nic="tap-b", incoming=True)
    assert devices(source) == devices(target)
    rest = [word for word in target if word not in ("-incoming", "defer", "-S")]
    assert [a for a, b in zip(source, rest, strict=True) if a != b] == options(source, "-netdev")
    assert options(target, "-incoming") == ["defer"]
    assert "-S" in target
    assert "-S" not in source


def test_the_ram_block_has_a_fixed_name_and_is_shared() -> None:
    command = command_line("qemu", SPEC, PATHS, TCG)
    memory = next(text for text in options(command, "-object") if text.startswith("memory-backend-file"))
    assert f"id=ram0,size=256M,mem-path={PATHS.ram},share=on" in memory
    assert options(command, "-machine") == ["pc-q35-8.2,memory-backend=ram0,usb=off"]
    assert "-nodefaults" in command


def test_a_nic_never_brings_an_option_rom() -> None:
    """It would be a RAM block that the golden snapshot does not have."""
    assert nic_device(SPEC)["romfile"] == ""
    cold = [d for d in devices(command_line("qemu", SPEC, PATHS, TCG, nic="tap0")) if d["id"] == "nic0"]
    assert cold == [nic_device(SPEC)]
    assert cold[0]["bus"] == "rp1"
    assert not [d for d in devices(command_line("qemu", SPEC, PATHS, TCG)) if d["id"] == "nic0"]


def test_every_device_has_an_address_or_needs_none() -> None:
    """Addresses handed out by QEMU would depend on the order and the version."""
    found = devices(command_line("qemu", SPEC, PATHS, TCG, nic="tap0"))
    for device in found:
        assert "addr" in device or device["driver"] in ("vmgenid", "virtserialport"), device
    places = [(d["bus"], d["addr"]) for d in found if "addr" in d]
    assert len(places) == len(set(places))


def test_an_outage_of_the_disk_stops_the_guest() -> None:
    disk = next(d for d in devices(command_line("qemu", SPEC, PATHS, TCG)) if d["id"] == "vda")
    assert (disk["rerror"], disk["werror"]) == ("stop", "stop")
    base, overlay = (json.loads(text) for text in options(command_line("qemu", SPEC, PATHS, TCG), "-blockdev"))
    assert base["read-only"] is True
    assert base["reconnect-delay"] > 0
    assert overlay["backing"] == base["node-name"]


def test_hinting_is_part_of_the_spec() -> None:
    import msgspec

    hinting = msgspec.structs.replace(SPEC, free_page_hint=True)
    balloon = next(d for d in devices(command_line("qemu", SPEC, PATHS, TCG)) if d["id"] == "balloon0")
    assert "free-page-hint" not in balloon
    balloon = next(d for d in devices(command_line("qemu", hinting, PATHS, TCG)) if d["id"] == "balloon0")
    assert balloon["free-page-hint"] is True


def test_a_comma_in_a_path_stays_a_comma() -> None:
    paths = GuestPaths(Path("/run/a,b"), Path("/dev/shm/c,d"))
    command = command_line("qemu", SPEC, paths, TCG)
    assert any("path=/run/a,,b/qmp.sock" in text for text in options(command, "-chardev"))
    assert any("mem-path=/dev/shm/c,,d/" in text for text in options(command, "-object"))


def test_two_sites_on_one_host_do_not_share_a_memory_file() -> None:
    oslo = GuestPaths(Path("/srv/oslo/guests/web1"), Path("/dev/shm/h"))
    lisbon = GuestPaths(Path("/srv/lisbon/guests/web1"), Path("/dev/shm/h"))
    assert oslo.ram != lisbon.ram
    assert oslo.ram == GuestPaths(Path("/srv/oslo/guests/web1"), Path("/dev/shm/h")).ram


def test_socket_paths_must_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose a shorter root"):
        GuestPaths(tmp_path / ("x" * 90), tmp_path / "ram").prepare()
    assert not (tmp_path / "ram").exists()
