"""What cannot work is refused with a message that says what, which and what next; the guest runs on at its source."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.errors import Conflict, HaulierError, NoRoom, NotTrusted, UnknownThing, UsageError
from haulier.lab.scenario import IMAGE, LabSite, Template
from tests.support.certs import TestCa
from tests.system.stage import Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "bad") as standing:
        standing.run_guest()
        yield standing


def refused(standing: Stage, kind: type[HaulierError], *words: str, sent: int = 400_000) -> str:
    """Runs a command at oslo that has to fail; what it said. The guest runs on, and hardly a byte was sent."""
    before = standing.scenario.wan_bytes()
    done = standing.site("oslo").haulier(*words, check=False)
    assert done.returncode == kind.exit_code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.strip() and "Traceback" not in done.stderr, done.stderr
    assert standing.scenario.wan_bytes() - before < sent
    assert standing.home() == "oslo"
    standing.assert_right()
    return done.stderr


@contextlib.contextmanager
def small(site: LabSite, path: Path, megabytes: float) -> Iterator[None]:
    """A file system of its own at `path` of a site, with what lies there, and so much room left."""
    used = sum(file.stat().st_blocks * 512 for file in path.rglob("*")) if path.exists() else 0
    path.mkdir(parents=True, exist_ok=True)
    kept = path.with_name(path.name + ".kept")
    subprocess.run(["cp", "-a", "--sparse=always", str(path), str(kept)], check=True)
    size = used + int(megabytes * (1 << 20))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "haulier-test", str(path)], check=True)
    try:
        subprocess.run(["cp", "-a", "--sparse=always", f"{kept}/.", str(path)], check=True)
        # A process in a network namespace sees the mounts that there were when it started.
        site.kill_agent()
        site.start_agent()
        yield
    finally:
        site.kill_agent()
        subprocess.run(["umount", "-l", str(path)], check=True)
        shutil.rmtree(kept)
        site.start_agent()


def test_unknown_names_and_wrong_words(standing: Stage) -> None:
    assert "'nowhere'" in refused(standing, UnknownThing, "handoff", "web1", "--to", "nowhere")
    assert "'nobody'" in refused(standing, UnknownThing, "handoff", "nobody", "--to", "lisbon")
    assert "'oslo'" in refused(standing, UsageError, "handoff", "web1", "--to", "oslo")
    refused(standing, UsageError, "handoff", "web1", "--to", "lisbon", "--downtime", "1")
    refused(standing, UnknownThing, "cancel", "h123")
    refused(standing, UnknownThing, "plan", "web1", "--to", "nowhere")


def test_a_guest_of_that_name_lives_at_the_target(standing: Stage) -> None:
    lisbon = standing.site("lisbon")
    lisbon.haulier("guest", "run", "web1", "--image", IMAGE, "--memory", "512M", "--address", "10.77.0.99/24")
    try:
        done = lisbon.facts("guest", "show", "web1")
        assert done["status"] == "running"
        text = standing.site("oslo").haulier("handoff", "web1", "--to", "lisbon", check=False)
        assert text.returncode == Conflict.exit_code, text.stderr
        assert "'lisbon'" in text.stderr and "web1" in text.stderr and "name" in text.stderr
        assert lisbon.facts("guest", "show", "web1")["pid"] == done["pid"], "the other one is left alone"
        assert standing.site("oslo").client.guest("web1")["status"] == "running"
    finally:
        lisbon.haulier("guest", "stop", "web1", "--force", check=False)
        lisbon.haulier("guest", "remove", "web1")
    standing.assert_right()


def test_too_little_memory_at_the_target(standing: Stage) -> None:
    lisbon = standing.site("lisbon")
    with small(lisbon, lisbon.site.ram_dir, 64):
        text = refused(standing, NoRoom, "handoff", "web1", "--to", "lisbon")
    assert "lisbon" in text and "MiB" in text


def test_a_certificate_of_another_fleet(standing: Stage, tmp_path: Path) -> None:
    lisbon = standing.site("lisbon")
    other = TestCa(tmp_path / "ca").site("lisbon", peer="oslo")
    tls = lisbon.site.tls
    shutil.copytree(tls, tmp_path / "tls")
    lisbon.kill_agent()
    shutil.copy(other.certificate, lisbon.site.certificate)
    shutil.copy(other.key, lisbon.site.key)
    lisbon.start_agent()
    try:
        text = refused(standing, NotTrusted, "handoff", "web1", "--to", "lisbon")
        assert "lisbon" in text and "certificate" in text
    finally:
        lisbon.kill_agent()
        for path in (lisbon.site.certificate, lisbon.site.key):
            shutil.copy(tmp_path / "tls" / path.name, path)
        lisbon.start_agent()


def test_the_agent_of_the_target_is_not_there(standing: Stage) -> None:
    lisbon = standing.site("lisbon")
    lisbon.kill_agent()
    try:
        done = standing.site("oslo").haulier("handoff", "web1", "--to", "lisbon", check=False)
        assert done.returncode == 8 and "lisbon" in done.stderr, done.stderr
    finally:
        lisbon.start_agent()
    assert standing.home() == "oslo"


def test_the_targets_disk_is_full_in_the_middle(standing: Stage) -> None:
    lisbon = standing.site("lisbon")
    # Some megabytes that do not compress have to go over.
    standing.work("web1", files_per_s=3, file_kib=1024, random_share=1.0)
    with small(lisbon, lisbon.site.store, 3):
        handoff = standing.begin()
        code, result, err = handoff.result()
        assert code == NoRoom.exit_code, (code, err, handoff.logs())
        assert "lisbon" in err and "space" in err
        assert result["outcome"] == "failed"
        handoff.settled()
        assert standing.home() == "oslo"
        standing.assert_clean(handoff, "oslo")
        standing.assert_right()
    handoff = standing.begin()
    handoff.done()
    standing.assert_clean(handoff, "lisbon")
    standing.assert_right()
