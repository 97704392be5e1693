"""This machine's package sources, as the image's builder and scripts/setup read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from haulier.errors import UnknownThing
from haulier.lab.apt import (
    Source,
    acquire_options,
    host_release,
    machine_sources,
    parse_deb822,
    parse_one_line,
    sources_for,
)

SETUP = Path(__file__).resolve().parents[2] / "scripts" / "setup"

DEB822 = """\
# The mirror of this house
Types: deb deb-src
URIs: http://mirror.example/debian http://other.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://security.example/
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abcd
 -----END PGP PUBLIC KEY BLOCK-----

Enabled: no
Types: deb
URIs: http://off.example/
Suites: bookworm
Components: main

Types: deb-src
URIs: http://sources.example/
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb http://commented.example/ bookworm main
deb http://plain.example/debian bookworm main non-free-firmware  # ours
deb [arch=amd64 signed-by=/etc/apt/keyrings/a.gpg] https://signed.example/debian bookworm main
deb [ trusted=yes ] file:/srv/flat ./
deb-src http://sources.example/debian bookworm main
deb broken
"""


def apt_directory(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "old.sources.disabled").write_text(DEB822)
    (tmp_path / "sources.list.d" / "more.list").write_text("deb http://more.example/ trixie main\n")
    return tmp_path


def test_deb822() -> None:
    first, second = parse_deb822(DEB822)
    assert first.uris == ("http://mirror.example/debian", "http://other.example/debian")
    assert first.suites == ("bookworm", "bookworm-updates") and first.components == ("main", "contrib")
    assert first.options == {"Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg"}
    assert second.options["Signed-By"].startswith("\n -----BEGIN") and "abcd" in second.options["Signed-By"]


def test_what_is_written_is_read_back_as_the_same() -> None:
    known = parse_deb822(DEB822) + parse_one_line(ONE_LINE)
    assert parse_deb822("\n".join(source.deb822() for source in known)) == known


def test_one_line() -> None:
    plain, signed, flat = parse_one_line(ONE_LINE)
    assert plain == Source(("http://plain.example/debian",), ("bookworm",), ("main", "non-free-firmware"))
    assert signed.options == {"Signed-By": "/etc/apt/keyrings/a.gpg"}
    assert flat.options == {"Trusted": "yes"} and flat.suites == ("./",)


@pytest.mark.parametrize("text", ["", "\n\n", ":", "Types: deb\n", " lost\n", "no colon", "\0\n: :\n"])
def test_nonsense_gives_nothing(text: str) -> None:
    assert parse_deb822(text) == [] and parse_one_line(text) == []


def test_all_files_of_a_machine_count_but_for_those_that_apt_leaves_out(tmp_path: Path) -> None:
    found = machine_sources(apt_directory(tmp_path))
    assert len(found) == 6 and found[-1].suites == ("trixie",)
    assert machine_sources(tmp_path / "nowhere") == []


def test_another_suite_comes_from_where_the_machine_gets_its_own(tmp_path: Path) -> None:
    known = machine_sources(apt_directory(tmp_path))
    own = sources_for("bookworm", "bookworm", known)
    assert [source.uris[0] for source in own] == [
        "http://plain.example/debian",
        "https://signed.example/debian",
        "http://mirror.example/debian",
    ]
    assert all(source.suites == ("bookworm",) for source in own)
    assert [source.uris for source in sources_for("trixie", "bookworm", known)] == [("http://more.example/",)]
    assert {source.suites for source in sources_for("forky", "bookworm", known)} == {("forky",)}
    with pytest.raises(UnknownThing, match="forky or sid"):
        sources_for("forky", "sid", known)


def test_the_release_of_a_machine(tmp_path: Path) -> None:
    file = tmp_path / "os-release"
    file.write_text('PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nVERSION_CODENAME=trixie\nID=debian\n')
    assert host_release(file) == ("debian", "trixie")
    file.write_text("ID=debian\n")
    with pytest.raises(UnknownThing, match="VERSION_CODENAME"):
        host_release(file)
    assert host_release()[1]


def test_how_this_machine_fetches_is_passed_on_in_a_form_that_apt_reads(tmp_path: Path) -> None:
    options = acquire_options()
    config = tmp_path / "apt.conf"
    config.write_text("\n".join(options))
    subprocess.run(["apt-config", "--config-file", str(config), "dump"], check=True, capture_output=True)
    assert not any("IndexTargets" in line for line in options)


def setup(directory: Path, command: str) -> str:
    """Runs `command` with the functions of scripts/setup, on the apt configuration in `directory`."""
    script = f"source {SETUP}; apt_dir={directory}; {command}"
    return subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout


def test_setup_reads_the_same_sources(tmp_path: Path) -> None:
    directory = apt_directory(tmp_path)
    seen = {tuple(line.split()[:2]) for line in setup(directory, "machine_sources").splitlines()}
    assert seen == {(uri, suite) for s in machine_sources(directory) for uri in s.uris for suite in s.suites}
    keys = {line.split()[2] for line in setup(directory, "machine_sources").splitlines()}
    assert f"inline:{directory}/sources.list.d/debian.sources" in keys and "/etc/apt/keyrings/a.gpg" in keys


@pytest.mark.root
@pytest.mark.parametrize("form", ["one line", "deb822", "inline key"])
def test_setup_adds_backports_of_the_same_mirror_with_its_key(tmp_path: Path, form: str) -> None:
    (tmp_path / "sources.list.d").mkdir()
    if form == "one line":
        text = "deb [signed-by=/etc/apt/keyrings/a.gpg] http://signed.example/debian bookworm main\n"
        (tmp_path / "sources.list").write_text(text)
        wanted = {"Signed-By": "/etc/apt/keyrings/a.gpg"}
    else:
        text = DEB822.split("\n\n")[0 if form == "deb822" else 1].replace("bookworm-security", "bookworm")
        (tmp_path / "sources.list.d" / "debian.sources").write_text(text + "\n")
        wanted = parse_deb822(text)[0].options
    setup(tmp_path, "add_backports bookworm; pin_qemu bookworm; add_backports bookworm")
    (added,) = parse_deb822((tmp_path / "sources.list.d" / "haulier-backports.sources").read_text())
    assert added.suites == ("bookworm-backports",) and added.components == ("main",) and added.options == wanted
    pins = (tmp_path / "preferences.d" / "haulier-qemu").read_text().split("\n\n")
    assert len(pins) == 2 and pins[0].endswith("Pin-Priority: 100") and "src:qemu" in pins[1]


def test_setup_adds_nothing_where_backports_are_there(tmp_path: Path) -> None:
    directory = apt_directory(tmp_path)
    (directory / "sources.list.d" / "mine.list").write_text("deb http://b.example/debian bookworm-backports main\n")
    setup(directory, "add_backports bookworm; pin_qemu bookworm")
    assert not (directory / "sources.list.d" / "haulier-backports.sources").exists()
    # Whoever has backports decides alone what else comes from there.
    assert "Package: *" not in (directory / "preferences.d" / "haulier-qemu").read_text()


@pytest.mark.parametrize(("version", "enough"), [("8.2", True), ("8.2.1", True), ("10.0.2", True), ("7.2", False)])
def test_setup_compares_versions(tmp_path: Path, version: str, enough: bool) -> None:
    said = setup(tmp_path, f"at_least {version} 8.2 && echo yes || echo no").strip()
    assert said == ("yes" if enough else "no")
