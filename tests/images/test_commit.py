"""An overlay file becomes a layer: read by qemu-img, compared with what QEMU's tools wrote."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, UnknownThing
from haulier.images import commit, layers
from haulier.units import CHUNK, MIB

pytestmark = pytest.mark.qemu


def overlay(path: Path, *commands: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, str(path)], check=True, capture_output=True)
    return path


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
        found = commit.read_stopped(file, store, lambda share, what: said.append(share))
        at = MIB // CHUNK
        assert found.quiesced and found.changes == {
            at: fingerprint(b"\x07" * CHUNK),
            at + 1: fingerprint(b"\x07" * CHUNK),
            5 * at: fingerprint(b"\x08" * 4096 + bytes(CHUNK - 4096)),
            3 * at: ZERO,
            2 * at: ZERO,
        }
        assert said == sorted(said) and said[-1] <= 1
        below = Manifest(8 * MIB, b"".join([store.put(b"\x01" * CHUNK)] * (8 * at)))
        store.save_manifest("image/debian", below)
        commit.save_layer(store, "web", "debian", below, found, guest="g", uuid="u")
        facts = layers.facts(store, "web")
        assert (facts.parent, facts.guest, facts.quiesced, facts.own_bytes) == ("debian", "g", True, 2 * CHUNK)
        assert store.load_manifest("image/web")[0] == below[0]


def test_an_overlay_that_holds_nothing(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        assert commit.read_stopped(overlay(tmp_path / "o.qcow2"), store, lambda share, what: None).changes == {}


def test_an_overlay_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "o.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    with ChunkStore(tmp_path / "store") as store, pytest.raises(Corrupt, match="haulier verify"):
        commit.read_stopped(tmp_path / "o.qcow2", store, lambda share, what: None)


def test_a_layer_whose_chunks_are_not_there_is_not_made(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        below = Manifest.zero(8 * MIB)
        lacking = commit.Overlay({0: fingerprint(b"x" * CHUNK)})
        with pytest.raises(UnknownThing):
            commit.save_layer(store, "web", "debian", below, lacking)
        assert store.manifest_names() == []
