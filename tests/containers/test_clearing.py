"""Containers are cleared away as far as can be, whatever one of the host's tools does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from haulier import tools
from haulier.agent.site import Site
from haulier.containers import network
from haulier.containers.container import clear_runtime
from haulier.containers.runc import Runc
from haulier.errors import GuestError
from haulier.handoff.residence import container_paths
from haulier.network import dhcp
from haulier.process import ProcessId
from tests.support.freezing import as_container, freezable

HANGS = "exec sleep 1000"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program of one's own in the place of the host's, and has nobody wait for it for long."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(tools, "PATIENCE_S", 0.2)

    def put(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return put


@pytest.mark.root
def test_an_ip_that_hangs_keeps_no_process_from_being_ended(tmp_path: Path, stub: Callable[[str, str], Path]) -> None:
    site = Site(tmp_path / "s", "oslo", "127.0.0.1:7440")
    site.make_directories()
    with freezable() as (child, freezer):
        as_container(site, "web1", child)
        paths = container_paths(site, "web1")
        record = json.loads(paths.record.read_bytes())
        paths.record.write_text(json.dumps(record | {"cable": "hltest"}))
        freezer.freeze()
        ip = stub("ip", HANGS)
        with pytest.raises(GuestError, match=r"ip link show dev hltest did not end within 0\.2 s"):
            clear_runtime(paths)
        assert ProcessId.of(child.pid) is None
        assert paths.record.exists(), "what is left is known by it"
        ip.write_text("#!/bin/sh\nexit 1\n")
        clear_runtime(paths)
        assert not paths.record.exists()


def test_what_hangs_or_may_not_be_run_is_an_error_like_any_other(
    tmp_path: Path, stub: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("ip", HANGS)
    runc = stub("runc", HANGS)
    monkeypatch.setattr("haulier.containers.runc.STEP_S", 0.2)
    monkeypatch.setattr(network, "exists", lambda name: False)
    with pytest.raises(GuestError, match="did not end"):
        network.create("hc-test", "", mac="", addresses=[])
    with pytest.raises(GuestError, match="did not end"):
        Runc(tmp_path).run("c", tmp_path, tmp_path / "pid")
    with pytest.raises(GuestError, match="did not end"):
        network.plug("hltest")
    network.speak("hc-test", [])
    runc.write_text("no program")
    with pytest.raises(GuestError, match="cannot be run"):
        Runc(tmp_path).run("c", tmp_path, tmp_path / "pid")
    with pytest.raises(GuestError, match="cannot be set"):
        network._set(tmp_path / "none" / "arp_ignore", "8")


def test_a_dnsmasq_that_hangs(
    tmp_path: Path, stub: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = stub("dnsmasq", HANGS)
    monkeypatch.setattr(dhcp, "START_S", 0.2)
    monkeypatch.setattr(dhcp.shutil, "which", lambda name, path: str(program))
    found = [{"addr_info": [{"family": "inet", "local": "10.77.0.1", "prefixlen": 24}]}]
    monkeypatch.setattr(dhcp.iproute, "facts", lambda *words: found)
    with pytest.raises(GuestError, match="did not end"):
        dhcp.Dhcp(tmp_path / "dhcp", "br0").serve([])
