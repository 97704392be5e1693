"""What is said about QEMU and KVM."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from haulier.errors import GuestError, NoRoom, Unsupported
from haulier.guests.accel import QemuInfo, _verdict, check_version, parse_version, probe, qemu_info, qemu_version
from haulier.guests.model import new_spec
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu, memory_reasons, refuse_reasons

SPEC = new_spec("web1", "debian", memory_mib=256, disk_size=4 << 30)
INFO = QemuInfo((10, 0, 2), frozenset({"pc-q35-8.2"}), {"Nehalem-v1": (), "Other-v1": ("avx",)}, "tcg")


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", (10, 0, 2)),
        ("QEMU emulator version 8.2.0", (8, 2, 0)),
        ("QEMU emulator version 9.1", (9, 1, 0)),
    ],
)
def test_versions(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version
    check_version(version)


def test_old_and_strange_versions_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"QEMU 7\.2\.15 is too old.*8\.2"):
        check_version(parse_version("QEMU emulator version 7.2.15 (Debian 1:7.2)"))
    with pytest.raises(Unsupported, match="does not say its version"):
        parse_version("hello")


def test_an_old_qemu_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = program(tmp_path / "old", "echo QEMU emulator version 7.2.15; touch $0.started")
    monkeypatch.setenv("HAULIER_QEMU", old)
    with pytest.raises(Unsupported, match="too old"):
        qemu_version()
    with pytest.raises(Unsupported, match="too old"):
        Qemu.start(SPEC, GuestPaths(tmp_path / "g", tmp_path / "ram"))
    assert not (tmp_path / "g").exists()
    monkeypatch.setenv("HAULIER_QEMU", str(tmp_path / "none"))
    with pytest.raises(Unsupported, match="install QEMU"):
        qemu_version()


def test_a_qemu_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    mute = program(tmp_path / "mute", "[ $1 = --version ] && echo QEMU emulator version 10.0.0; exit 0")
    with pytest.raises(GuestError, match="did not answer query-machines, query-cpu-definitions"):
        qemu_info("tcg", mute)


def test_verdicts_of_the_boot_sector() -> None:
    assert _verdict(67, "").kind == "kvm"
    assert _verdict(None, "").kind == "tcg"
    assert "5 s" in _verdict(None, "").reason
    refused = _verdict(1, "qemu-system-x86_64: failed to initialize kvm: Permission denied\n")
    assert refused.kind == "tcg"
    assert "Permission denied" in refused.reason


def test_reasons_to_refuse_name_each_thing_that_is_missing(tmp_path: Path) -> None:
    import msgspec

    assert refuse_reasons(SPEC, INFO, ram_dir=tmp_path, source_accel="tcg") == []
    odd = msgspec.structs.replace(SPEC, machine="pc-q35-99.0", cpu="Other-v1")
    reasons = refuse_reasons(odd, QemuInfo((7, 2, 0), INFO.machines, INFO.cpus, "tcg"), source_accel="kvm")
    assert len(reasons) == 4
    for text, words in zip(reasons, ("too old", "pc-q35-99.0", "lacks avx", "runs under kvm"), strict=True):
        assert words in text
    assert "no CPU model" in refuse_reasons(msgspec.structs.replace(SPEC, cpu="Unheard-v1"), INFO)[0]


def test_memory_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    import msgspec

    huge = msgspec.structs.replace(SPEC, memory_mib=1 << 20)
    reasons = memory_reasons(huge, tmp_path / "not" / "yet")
    assert any(f"needs {1 << 20} MiB" in text for text in reasons)
    paths = GuestPaths(tmp_path / "g", tmp_path / "ram")
    with pytest.raises(NoRoom, match=r"needs .* MiB.*stop another guest"):
        Qemu.start(huge, paths)
    assert not paths.ram.exists()


def test_info_goes_through_json() -> None:
    assert QemuInfo.from_dict(json.loads(json.dumps(INFO.to_dict()))) == INFO


@pytest.mark.qemu
def test_this_hosts_qemu_gives_the_default_machine_and_cpu() -> None:
    assert qemu_version() >= (8, 2, 0)
    found = probe()
    assert found.kind in ("kvm", "tcg")
    assert found.reason
    assert refuse_reasons(SPEC, qemu_info()) == []
