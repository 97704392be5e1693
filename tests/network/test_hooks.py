"""The hooks that are shipped as examples, run as haulier runs them, with stand-ins for the programs that they call."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from haulier.agent.site import Site
from haulier.handoff import clients
from haulier.handoff.clients import call_moved_hook
from haulier.network import iproute
from tests.docs.pages import ROOT
from tests.handoff.hosts import SPEC

HOOKS = ROOT / "packaging" / "hooks"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "lisbon", "lisbon", "203.0.113.20:7447", ("203.0.113.20", "198.51.100.20"))


def stand_in(tmp_path: Path, code: int = 0) -> str:
    """A program that notes its words and what it is told on standard input."""
    path = tmp_path / "stand-in"
    path.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/told\n[ -t 0 ] || cat >>{tmp_path}/told\nexit {code}\n')
    path.chmod(0o755)
    return str(path)


def call(site: Site, hook: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> bool:
    object.__setattr__(site, "moved_hook", str(HOOKS / hook))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return call_moved_hook(site, SPEC, "oslo").worked


def told(tmp_path: Path) -> list[str]:
    return (tmp_path / "told").read_text().splitlines()


def test_bird_announces_the_guest_and_may_have_the_old_site_withdraw_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = stand_in(tmp_path)
    assert call(site, "bird", monkeypatch, BIRDC=program, BIRD_DIR=str(tmp_path / "bird"), WITHDRAW=program)
    assert [path.name for path in (tmp_path / "bird").iterdir()] == ["web1.conf"]
    assert (tmp_path / "bird" / "web1.conf").read_text() == 'route 10.77.0.10/32 via "br0";\n'
    assert told(tmp_path) == ["configure", "oslo 10.77.0.10"]


def test_a_guest_with_an_address_of_each_family_is_led_by_both(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = stand_in(tmp_path)
    both = msgspec.structs.replace(SPEC, address6="fd77::10/64")
    six = msgspec.structs.replace(SPEC, address="fd77::10/64", gateway="")
    monkeypatch.setattr(f"{__name__}.SPEC", both)
    assert call(site, "bird", monkeypatch, BIRDC=program, BIRD_DIR=str(tmp_path / "bird"), WITHDRAW=program)
    assert (tmp_path / "bird" / "web1.conf").read_text() == 'route 10.77.0.10/32 via "br0";\n'
    assert (tmp_path / "bird6" / "web1.conf").read_text() == 'route fd77::10/128 via "br0";\n'
    assert told(tmp_path) == ["configure", "oslo 10.77.0.10", "oslo fd77::10"]
    assert call(site, "ovn", monkeypatch, OVN_NBCTL=program)
    assert f"lsp-set-addresses web1 {both.mac} 10.77.0.10 fd77::10" in told(tmp_path)
    monkeypatch.setattr(f"{__name__}.SPEC", six)
    assert call(site, "ovn", monkeypatch, OVN_NBCTL=program)
    assert f"lsp-set-addresses web1 {six.mac} fd77::10" in told(tmp_path)


def test_ovn_binds_the_port_to_the_new_chassis_and_waits_for_it(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(site, "ovn", monkeypatch, OVN_NBCTL=stand_in(tmp_path), OVN_PREFIX="vm-")
    assert told(tmp_path) == [
        "lsp-set-options vm-web1 requested-chassis=lisbon",
        f"lsp-set-addresses vm-web1 {SPEC.mac} 10.77.0.10",
        "--wait=hv --timeout=8 sync",
    ]


def test_dns_points_the_name_to_the_new_site(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = stand_in(tmp_path)
    assert not call(site, "dns", monkeypatch, NSUPDATE=program), "it needs a zone"
    assert call(site, "dns", monkeypatch, DNS_ZONE="example.net", DNS_KEY="/etc/key")
    assert told(tmp_path) == [
        "-k /etc/key",
        "zone example.net",
        "update delete web1.example.net. A",
        "update add web1.example.net. 5 A 203.0.113.20",
        "send",
    ]


def test_dns_points_the_name_to_the_guests_address_of_the_new_site(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iproute, "run", lambda words, given=None: "")
    object.__setattr__(site, "pool", "fd78::21-fd78::21")
    site.root.mkdir()
    assert clients.leases(site).take("web1") == "fd78::21"
    assert call(site, "dns", monkeypatch, NSUPDATE=stand_in(tmp_path), DNS_ZONE="example.net")
    assert "update add web1.example.net. 5 AAAA fd78::21" in told(tmp_path)


def test_haproxy_sends_new_connections_to_the_guests_own_address_where_it_has_none_of_the_site(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = stand_in(tmp_path)
    assert not call(site, "haproxy", monkeypatch), "it needs a way to the relay"
    assert call(site, "haproxy", monkeypatch, RELAY=program)
    assert "set server web1/guest addr 10.77.0.10" in told(tmp_path)


@pytest.mark.parametrize("hook", ["bird", "ovn", "dns", "haproxy"])
def test_a_program_that_fails_makes_the_hook_fail(
    hook: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = stand_in(tmp_path, 3)
    words = {
        "BIRDC": program,
        "OVN_NBCTL": program,
        "NSUPDATE": program,
        "RELAY": program,
        "DNS_ZONE": "z",
        "BIRD_DIR": str(tmp_path),
    }
    assert not call(site, hook, monkeypatch, **words)


def test_they_are_programs_that_a_shell_can_read() -> None:
    for path in HOOKS.iterdir():
        assert os.access(path, os.X_OK)
        subprocess.run(["sh", "-n", str(path)], check=True)
