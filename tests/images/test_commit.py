"""An overlay file becomes a layer: read by qemu-img, compared with what QEMU's tools wrote."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, UnknownThing
from haulier.guests.command import block_devices
from haulier.guests.qemu import GuestPaths, create_overlay
from haulier.images import commit, layers
from haulier.units import CHUNK, MIB

pytestmark = pytest.mark.qemu


def overlay(path: Path, *commands: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, str(path)], check=True, capture_output=True)
    return path


def written(tmp_path: Path, base: bytes, *commands: str) -> tuple[Path, bytes]:
    """An overlay as guests have it, over the disk `base`, after these commands; and the whole disk as QEMU sees it."""
    file, below, whole = GuestPaths(tmp_path).overlay, tmp_path / "base.raw", tmp_path / "whole.raw"
    below.write_bytes(base)
    create_overlay(file, len(base))
    lies_on = {"driver": "raw", "file": {"driver": "file", "filename": str(below)}}
    nodes = block_devices(GuestPaths(tmp_path))
    disk = "json:" + json.dumps(nodes[1] | {"backing": lies_on})
    for command in commands:
        subprocess.run(["qemu-io", "-d", "unmap", "-c", command, disk], check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, str(whole)], check=True)
    return file, whole.read_bytes()


def manifest_of(store: ChunkStore, disk: bytes) -> Manifest:
    fps = [store.put(disk[at : at + CHUNK].ljust(CHUNK, b"\0")) for at in range(0, len(disk), CHUNK)]
    return Manifest(len(disk), b"".join(fps))


def test_what_lies_around_a_small_write_stays_in_the_layer(tmp_path: Path) -> None:
    base = random.Random(1).randbytes(2 * MIB + 3 * 2048)
    file, whole = written(
        tmp_path,
        base,
        "write -P 7 68k 4k",
        "write -P 8 190k 6k",
        "write -P 9 300000 512",
        "write -z 400k 8k",
        "write -z -u 512k 64k",
        "write -z 710k 100k",
        "discard 896k 128k",
        "write -P 1 1280k 64k",
        "discard 1284k 8k",
        "write -P 0 1412k 4k",
        "write -P 6 1600k 90k",
        f"write -P 5 {2 * MIB + 2048} 4k",
    )
    assert whole[68 * 1024 : 72 * 1024] == b"\x07" * 4096 and whole[72 * 1024 : 128 * 1024] == base[72 * 1024 :][:57344]
    with ChunkStore(tmp_path / "store") as store:
        below = manifest_of(store, base)
        store.save_manifest("image/debian", below)
        found = commit.read_stopped(file, below, store, lambda share, what: None)
        layer = commit.save_layer(store, "web", "debian", below, found)
        assert b"".join(store.get(fp) for fp in layer)[: len(whole)] == whole
        assert layer == manifest_of(store, whole) and 0 not in found.changes


def test_a_layer_needs_what_lies_around_a_small_write(tmp_path: Path) -> None:
    base = random.Random(2).randbytes(2 * CHUNK)
    file, _ = written(tmp_path, base, f"write -P 7 0 {CHUNK}", f"write -P 8 {CHUNK} 4k")
    with ChunkStore(tmp_path / "store") as store:
        below = Manifest(len(base), b"".join(fingerprint(base[at : at + CHUNK]) for at in (0, CHUNK)))
        with pytest.raises(UnknownThing):
            commit.read_stopped(file, below, store, lambda share, what: None)


def test_a_stopped_guests_overlay_is_read_cluster_by_cluster(tmp_path: Path) -> None:
    file = overlay(
        tmp_path / "o.qcow2",
        "write -P 7 1M 128k",
        "write -P 8 5M 4k",
        "write -z 3M 64k",
        "write -P 9 2M 64k",
        "discard 2M 64k",
    )
    said: list[float] = []
    with ChunkStore(tmp_path / "store") as store:
        below = Manifest(8 * MIB, b"".join([store.put(b"\x01" * CHUNK)] * (8 * MIB // CHUNK)))
        found = commit.read_stopped(file, below, store, lambda share, what: said.append(share))
        at = MIB // CHUNK
        assert found.quiesced and found.changes == {
            at: fingerprint(b"\x07" * CHUNK),
            at + 1: fingerprint(b"\x07" * CHUNK),
            5 * at: fingerprint(b"\x08" * 4096 + bytes(CHUNK - 4096)),
            3 * at: ZERO,
            2 * at: ZERO,
        }
        assert said == sorted(said) and said[-1] <= 1
        store.save_manifest("image/debian", below)
        commit.save_layer(store, "web", "debian", below, found, guest="g", uuid="u")
        facts = layers.facts(store, "web")
        assert (facts.parent, facts.guest, facts.quiesced, facts.own_bytes) == ("debian", "g", True, 2 * CHUNK)
        assert store.load_manifest("image/web")[0] == below[0]


def test_an_overlay_that_holds_nothing(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        file, below = overlay(tmp_path / "o.qcow2"), Manifest.zero(8 * MIB)
        assert commit.read_stopped(file, below, store, lambda share, what: None).changes == {}


def test_an_overlay_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "o.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    with ChunkStore(tmp_path / "store") as store, pytest.raises(Corrupt, match="haulier verify"):
        commit.read_stopped(tmp_path / "o.qcow2", Manifest.zero(8 * MIB), store, lambda share, what: None)


def test_a_layer_whose_chunks_are_not_there_is_not_made(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        below = Manifest.zero(8 * MIB)
        lacking = commit.Overlay({0: fingerprint(b"x" * CHUNK)})
        with pytest.raises(UnknownThing):
            commit.save_layer(store, "web", "debian", below, lacking)
        assert store.manifest_names() == []
