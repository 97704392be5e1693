"""Guest images: their recipe, their cache, and (with the system tests) one that is really built."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from haulier.errors import GuestError, HaulierError, NoRoom, Unsupported
from haulier.lab import apt, image
from haulier.units import MIB


def test_the_partition_table_is_one_that_a_bios_accepts() -> None:
    table = image.partition_table(4096 * MIB)
    assert len(table) == 72 and table.endswith(b"\x55\xaa")
    active, _, kind, _, start, count = struct.unpack_from("<B3sB3sII", table, 6)
    assert (active, kind, start * 512) == (0x80, 0x83, image.ROOT_OFFSET)
    assert start * 512 + count * 512 == 4096 * MIB


@pytest.mark.parametrize("size", [0, -MIB, 512 * MIB, 4096 * MIB + 1])
def test_a_size_that_cannot_be_is_refused_before_anything_is_done(tmp_path: Path, size: int) -> None:
    with pytest.raises(NoRoom, match="1024 MiB"):
        image.build_debian(tmp_path / "a.raw", size=size)
    assert not list(tmp_path.iterdir())


def test_a_tool_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="scripts/setup"):
        image.build_debian(tmp_path / "a.raw")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unsupported, match="root"):
        image.build_debian(tmp_path / "a.raw")


def test_a_step_that_fails_says_what_it_said() -> None:
    heard: list[str] = []
    image._run(["sh", "-c", "echo 'I: one'; echo two"], heard.append)
    assert heard == ["one"]
    with pytest.raises(GuestError, match=r"(?s)sh failed with 3.*the last words"):
        image._run(["sh", "-c", "seq 1000; echo the last words >&2; exit 3"])


def test_the_recipe_decides_where_an_image_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(out: Path, *_: Any) -> None:
        built.append(out)
        out.write_bytes(b"an image")

    monkeypatch.setenv("HAULIER_CACHE", str(tmp_path))
    monkeypatch.setattr(image, "build_debian", build)
    first = image.cached_image()
    assert image.cached_image() == first and built == [first]
    assert first.parent == tmp_path / "images" and apt.host_release()[1] in first.name
    other = image.cached_image(size=2048 * MIB)
    assert other != first and built == [first, other]
    monkeypatch.setattr(image, "COMMAND_LINE", "something else")
    assert image.cached_image() not in built[:2]


def test_callers_at_the_same_time_build_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    both, second = threading.Barrier(4), threading.Event()

    def build(out: Path, *_: Any) -> None:
        built.append(out)
        if len(built) > 1:
            second.set()
        # As long as a build takes: time enough for another one to begin, if it can.
        second.wait(0.3)
        out.write_bytes(b"an image")

    def call() -> None:
        both.wait(20)
        image.cached_image()

    monkeypatch.setenv("HAULIER_CACHE", str(tmp_path))
    monkeypatch.setattr(image, "build_debian", build)
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(built) == 1


def test_images_of_other_recipes_go_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "images"
    cache.mkdir()
    for name, age in (("old.raw", 2 * 86400), ("recent.raw", 3600)):
        (cache / name).touch()
        then = (cache / name).stat().st_mtime - age
        os.utime(cache / name, (then, then))
    monkeypatch.setenv("HAULIER_CACHE", str(tmp_path))
    monkeypatch.setattr(image, "build_debian", lambda out, *_: out.touch())
    fresh = image.cached_image()
    assert {path.name for path in cache.glob("*.raw")} == {"recent.raw", fresh.name}


def test_the_command_tells_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image.main([str(tmp_path / "a.raw"), "--size-mib", "1"]) == NoRoom.exit_code
    assert capsys.readouterr().err.startswith("image: an image of 1048576 bytes")


def inside(disk: Path, command: str) -> str:
    """What debugfs says about the root file system of an image."""
    where = f"{disk}?offset={image.ROOT_OFFSET}"
    return subprocess.run(["debugfs", "-R", command, where], check=True, capture_output=True, text=True).stdout


@pytest.mark.system
@pytest.mark.timeout(900)
def test_an_image_is_built_from_packages(tmp_path: Path) -> None:
    """Two builds: a good one, looked into without mounting it; then one that fails and leaves nothing behind."""
    disk, heard = tmp_path / "guest.raw", list[str]()
    image.build_debian(disk, size=2048 * MIB, progress=heard.append)
    assert disk.stat().st_size == 2048 * MIB and disk.stat().st_blocks * 512 < 1024 * MIB
    assert [path.name for path in tmp_path.iterdir()] == [disk.name] and len(heard) > 3
    check = ["e2fsck", "-fn", f"{disk}?offset={image.ROOT_OFFSET}"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    assert "discard" in inside(disk, "cat /etc/fstab")
    assert inside(disk, "cat /usr/lib/haulier/workload.py") == Path(image.__file__).with_name("workload.py").read_text()
    # What must not be shared by the guests that are made of it.
    assert inside(disk, "cat /etc/machine-id") == "" and "ssh_host" not in inside(disk, "ls /etc/ssh")
    assert "haulier-workload.service" in inside(disk, "ls /etc/systemd/system/multi-user.target.wants")
    boot = inside(disk, "ls /boot")
    assert "vmlinuz" in boot and "initrd.img" in boot

    with pytest.raises(HaulierError, match="mmdebstrap"):
        image.build_debian(tmp_path / "never.raw", suite="no-such-suite")
    assert [path.name for path in tmp_path.iterdir()] == [disk.name]
