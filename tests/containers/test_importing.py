"""Images come into the store from OCI layouts and tar files, and lie in a site's layers as they were meant."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.chunks.store import ChunkStore
from haulier.compress import zstd
from haulier.containers.importing import import_container, layers_of
from haulier.containers.layers import make_layers
from haulier.containers.model import ContainerSpec
from haulier.containers.tree import OPAQUE
from haulier.errors import Corrupt, HaulierError, Unsupported

pytestmark = pytest.mark.root
BIG = os.urandom(200_000)


def member(name: str, data: bytes | None = None, **more: Any) -> tuple[tarfile.TarInfo, bytes | None]:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
    info.mode, info.mtime, info.size = (0o755 if data is None else 0o644), 1_600_000_000, len(data or b"")
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def tarred(members: list[tuple[tarfile.TarInfo, bytes | None]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if data is not None else None)
    return out.getvalue()


BASE = [
    member("etc"),
    member("etc/passwd", b"root:x:0:0::/:/bin/sh\n", mode=0o600, uid=7, gid=8),
    member("etc/gone", b"will be taken away"),
    member("old"),
    member("old/one", b"1"),
    member("old/two", b"2"),
    member("srv"),
    member("srv/big", BIG),
    member("srv/same", b"", type=tarfile.LNKTYPE, linkname="srv/big"),
    member("srv/link", b"", type=tarfile.SYMTYPE, linkname="../etc/passwd"),
]
TOP = [
    member("etc"),
    member("etc/.wh.gone", b""),
    member("etc/passwd", b"changed\n"),
    member("old"),
    member("old/.wh..wh..opq", b""),
    member("old/three", b"3"),
    member("opt"),
    member("opt/tool", b"#!/bin/sh\n", mode=0o4755),
]


RUN = {"Entrypoint": ["/opt/tool"], "Cmd": ["-x"], "Env": ["A=b"], "WorkingDir": "/srv", "User": "7:8"}


class Layout:
    """An OCI image layout, written by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs/sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.root / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    def json(self, value: object, kind: str) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), f"application/vnd.oci.image.{kind}+json")

    def image(self, layers: list[bytes]) -> dict[str, Any]:
        config = self.json(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {
                    "Entrypoint": ["/opt/tool"],
                    "Cmd": ["-x"],
                    "Env": ["A=b"],
                    "WorkingDir": "/srv",
                    "User": "7:8",
                },
            },
            "config.v1",
        )
        described = [self.blob(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers]
        return self.json({"schemaVersion": 2, "config": config, "layers": described}, "manifest.v1")

    def index(self, manifests: list[dict[str, Any]]) -> Path:
        (self.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": manifests}))
        return self.root


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store") as made:
        yield made


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def unpacked(store: ChunkStore, root: Path, name: str = "image") -> list[Path]:
    found = layers_of(store.manifest_meta(f"image/{name}"))
    spec = ContainerSpec(layers=found.layers, command=("x",))
    return make_layers(root, store, spec, store.load_manifest(f"image/{name}"))


def test_a_layout_with_layers_in_gzip_and_zstd(tmp_path: Path, store: ChunkStore, layout: Layout) -> None:
    source = layout.index([layout.image([gzip.compress(tarred(BASE)), zstd.compress(tarred(TOP))])])
    import_container(store, "image", source)
    config = layers_of(store.manifest_meta("image/image")).config
    assert config.command == ("/opt/tool", "-x") and config.env == ("A=b",)
    assert (config.cwd, config.user) == ("/srv", "7:8")
    base, top = unpacked(store, tmp_path / "layers")
    assert (base / "srv/big").read_bytes() == BIG
    assert (base / "srv/same").stat().st_ino == (base / "srv/big").stat().st_ino
    assert str((base / "srv/link").readlink()) == "../etc/passwd"
    status = (base / "etc/passwd").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o600, 7, 8)
    assert int(status.st_mtime) == 1_600_000_000
    hidden = (top / "etc/gone").lstat()
    assert stat.S_ISCHR(hidden.st_mode) and hidden.st_rdev == 0
    assert os.getxattr(top / "old", OPAQUE) == b"y"
    assert stat.S_IMODE((top / "opt/tool").stat().st_mode) == 0o4755
    assert not list(top.rglob(".wh.*"))


def test_mounted_the_layers_hide_what_they_take_away(tmp_path: Path, store: ChunkStore, layout: Layout) -> None:
    import_container(store, "image", layout.index([layout.image([tarred(BASE), gzip.compress(tarred(TOP))])]))
    base, top = unpacked(store, tmp_path / "layers")
    root = tmp_path / "root"
    root.mkdir()
    mount = ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={top}:{base}", str(root)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no overlay file system on this machine")
    try:
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        wanted = ["etc", "etc/passwd", "old", "old/three", "opt", "opt/tool", "srv", "srv/big", "srv/link", "srv/same"]
        assert names == wanted
        assert (root / "etc/passwd").read_text() == "changed\n"
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_an_index_of_several_platforms(tmp_path: Path, store: ChunkStore, layout: Layout) -> None:
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    ours, theirs = layout.image([tarred(BASE)]), layout.image([tarred(TOP)])
    ours["platform"] = {"os": "linux", "architecture": names[os.uname().machine]}
    theirs["platform"] = {"os": "linux", "architecture": "riscv64"}
    nested = layout.json({"schemaVersion": 2, "manifests": [theirs, ours]}, "index.v1")
    import_container(store, "image", layout.index([nested]))
    (folder,) = unpacked(store, tmp_path / "layers")
    assert (folder / "srv/big").exists()
    other = layout.json({"schemaVersion": 2, "manifests": [theirs]}, "index.v1")
    with pytest.raises(Unsupported, match="nothing for Linux"):
        import_container(store, "other", layout.index([other]))


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress, bytes], ids=["gzip", "zstd", "plain"])
def test_a_tar_file_of_a_root_file_system(tmp_path: Path, store: ChunkStore, pack: Any) -> None:
    (tmp_path / "root.tar").write_bytes(pack(tarred(BASE)))
    import_container(store, "image", tmp_path / "root.tar")
    (folder,) = unpacked(store, tmp_path / "layers")
    assert (folder / "srv/big").read_bytes() == BIG and (folder / "old/two").read_text() == "2"


def test_the_same_files_in_another_image_are_the_same_chunks(store: ChunkStore, layout: Layout) -> None:
    import_container(store, "one", layout.index([layout.image([tarred(BASE)])]))
    extra = [*BASE, member("srv/more", b"more")]
    import_container(store, "two", layout.index([layout.image([gzip.compress(tarred(extra))])]))
    one, two = (store.load_manifest(f"image/{name}").unique() for name in ("one", "two"))
    assert len(one & two) >= len(BIG) // 65536


def test_a_blob_that_was_changed_is_refused(store: ChunkStore, layout: Layout) -> None:
    layer = tarred(BASE)
    source = layout.index([layout.image([layer])])
    path = layout.root / "blobs/sha256" / hashlib.sha256(layer).hexdigest()
    data = bytearray(layer)
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="digest"):
        import_container(store, "image", source)
    path.unlink()
    with pytest.raises(Corrupt, match="lacks"):
        import_container(store, "image", source)
    assert store.manifest_names("image/") == []


ODD = [
    {"manifests": []},
    {"manifests": [{"digest": "sha256:../../etc/passwd"}]},
    {"manifests": [{"digest": "md5:00"}]},
    [],
]


@pytest.mark.parametrize("index", ODD)
def test_an_index_that_makes_no_sense_is_refused(store: ChunkStore, layout: Layout, index: object) -> None:
    (layout.root / "index.json").write_text(json.dumps(index))
    with pytest.raises(HaulierError):
        import_container(store, "image", layout.root)


def test_a_layer_that_is_cut_short_is_refused(tmp_path: Path, store: ChunkStore, layout: Layout) -> None:
    for pack in (gzip.compress, zstd.compress):
        with pytest.raises(Corrupt, match="unpacked"):
            import_container(store, "image", layout.index([layout.image([pack(tarred(BASE))[:-3000]])]))
    assert not list((tmp_path / "store").glob(".import-*"))
