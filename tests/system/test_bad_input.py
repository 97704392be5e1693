"""What cannot work is refused with a message that says what, which and what next; the guest runs on at its source."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.chunks import index as sql
from haulier.chunks.store import ChunkStore
from haulier.errors import (
    Conflict,
    Corrupt,
    HaulierError,
    NoRoom,
    NotTrusted,
    UnknownThing,
    Unsupported,
    UsageError,
)
from haulier.guests.accel import qemu_binary
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


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("s/pc-q35-8.2/pc-q35-gone/g", "machine type pc-q35-8.2"),
        ("s/Nehalem-v1/Nehalem-gone/g", "CPU model Nehalem-v1"),
        ("s/emulator version [0-9.]*/emulator version 7.2.9/", "8.2"),
    ],
    ids=["machine", "cpu", "version"],
)
def test_the_targets_qemu_cannot_give_what_the_guest_needs(
    standing: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, said: str
) -> None:
    lisbon = standing.site("lisbon")
    other = tmp_path / "qemu"
    asks = '*"-machine none"* | *--version*'
    real = f'{qemu_binary()} "$@"'
    other.write_text(f'#!/bin/sh\ncase "$*" in {asks}) {real} | sed "{lacks}" ;; *) exec {real} ;; esac\n')
    other.chmod(0o755)
    lisbon.kill_agent()
    with monkeypatch.context() as patched:
        patched.setenv("HAULIER_QEMU", str(other))
        lisbon.start_agent()
    try:
        text = refused(standing, Unsupported, "handoff", "web1", "--to", "lisbon")
        assert "lisbon" in text and said in text
    finally:
        lisbon.kill_agent()
        lisbon.start_agent()


def test_images_that_are_none(standing: Stage, tmp_path: Path) -> None:
    odd = tmp_path / "odd.raw"
    odd.write_bytes(b"x" * 1000)
    assert "512" in refused(standing, UsageError, "image", "import", str(odd), "--no-warm")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(odd), "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write 0 8M", str(odd)], check=True, capture_output=True)
    with odd.open("r+b") as file:
        file.truncate(2_000_000)
    assert "cut short" in refused(standing, Corrupt, "image", "import", str(odd), "--no-warm")
    refused(standing, UnknownThing, "image", "import", str(tmp_path / "none.raw"), "--no-warm")
    assert "'debian'" in refused(standing, Conflict, "image", "import", str(odd), "--name", IMAGE, "--no-warm")


def test_a_join_token_that_expired(standing: Stage, tmp_path: Path) -> None:
    oslo = standing.site("oslo")
    token = oslo.facts("site", "token", "--minutes", "0.00001")["token"]
    words = ("site", "join", "porto", "--via", oslo.site.control, "--address", "127.0.0.1:7", "--root", str(tmp_path))
    done = standing.site("lisbon").haulier(*words, "--token", token, check=False)
    assert done.returncode == NotTrusted.exit_code and "expired" in done.stderr, done
    assert "site token" in done.stderr and not list(tmp_path.iterdir())


def test_a_corrupt_chunk_of_the_base(standing: Stage, made: Template) -> None:
    oslo, lisbon = standing.site("oslo"), standing.site("lisbon")
    lisbon.haulier("image", "remove", IMAGE)
    lisbon.haulier("gc")
    with ChunkStore(oslo.site.store) as store:
        fp = sorted(store.load_manifest("guest/web1").unique())[1000]
        with store.index.read() as db:
            at = sql.locate(db, fp)
        assert at is not None
        whole = store.get(fp)
    with next((oslo.site.store / "packs").glob(f"{at.pack:08d}*")).open("r+b") as pack:
        pack.seek(at.offset + 5000)
        flipped = bytes([pack.read(1)[0] ^ 1])
        pack.seek(at.offset + 5000)
        pack.write(flipped)
    handoff = standing.begin()
    code, _, err = handoff.result()
    assert code == Corrupt.exit_code and fp.hex() in err and "oslo" in err, (code, err)
    handoff.settled()
    assert standing.home() == "oslo"
    standing.assert_right()
    with ChunkStore(oslo.site.store) as store:
        store.put(whole, fp)
        store.commit()
        assert store.get(fp) == whole
    lisbon.kill_agent()
    shutil.rmtree(lisbon.site.store)
    made.copy_to(lisbon.root)
    lisbon.start_agent()


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
