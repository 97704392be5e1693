"""site.toml, names and addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from haulier.agent.site import Site, check_name, default_root, split_address
from haulier.durable import write_atomically
from haulier.errors import Conflict, Corrupt, UnknownThing, UsageError


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    site = Site(
        tmp_path / "s", "oslo", "10.0.0.1:7447", ("10.0.0.1", "fd00::1"), moved_hook='/bin/a "b"', store_budget=9
    )
    site.save()
    assert Site.load(tmp_path / "s") == site
    for path in (tmp_path / "s", tmp_path / "s" / "guests"):
        assert path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(Conflict, match="already holds a site"):
        site.save()


def test_bulk_defaults_to_the_control_host(tmp_path: Path) -> None:
    assert Site(tmp_path, "oslo", "[fd00::2]:7447").bulk == ("fd00::2",)


def test_the_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAULIER_ROOT", "/srv/x")
    assert default_root() == Path("/srv/x")
    monkeypatch.delenv("HAULIER_ROOT")
    assert default_root() == Path("/var/lib/haulier")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = 'oslo'", "control is missing"),
        ("name = 3\ncontrol='a:1'", "type str"),
        ("name = 'oslo'\ncontrol='a:1'\ncolour='red'", "unknown setting 'colour'"),
        ("name = 'Oslo'\ncontrol='a:1'", "bad site name"),
        ("name = 'oslo'\ncontrol='a:99999'", "bad address"),
        ("name = 'oslo'\ncontrol='a:1'\nbulk=['a b']", "bad bulk address"),
        ("]", "not valid TOML"),
    ],
)
def test_a_bad_file_is_corrupt(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(Corrupt, match=why):
        Site.load(tmp_path)


def test_no_site(tmp_path: Path) -> None:
    with pytest.raises(UnknownThing, match="haulier site init"):
        Site.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UnknownThing, match="haulier site init"):
        Site.load(tmp_path / "file")


@pytest.mark.parametrize("name", ["", "-a", "A", "a/b", "..", "a" * 42, "a\n", "ä"])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError, match="bad guest name"):
        check_name(name, "guest")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":7",
        "host:0",
        "a..b:7",
        "a.:7",
        f"{'a' * 64}.b:7",
        f"{'a.' * 127}a:7",
        "host:65536",
        "a b:7",
        "host:٣",
        "h:1:2:x",
    ],
)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(UsageError, match="bad address"):
        split_address(address)


def test_good_addresses() -> None:
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("edge-1.example:7447") == ("edge-1.example", 7447)


def test_names_cannot_leave_the_directory(tmp_path: Path) -> None:
    site = Site(tmp_path, "oslo", "a:1")
    for bad in ("../x", "/etc", ".", "a/../../b"):
        with pytest.raises(UsageError):
            site.guest_root(bad)
        with pytest.raises(UsageError):
            site.handoff_root(bad)


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    site = Site(tmp_path, "oslo", "a:1")
    with pytest.raises(UsageError, match="too long"):
        site.check_socket_path(Path("/" + "x" * 120))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"one", 0o600)
    write_atomically(path, b"two", 0o600)
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and path.read_bytes() == b"two"
