from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.chunks import images
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.images import import_image
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, HaulierError, UnknownThing, Unsupported, UsageError
from haulier.units import CHUNK, MAX_DISK, MIB
from tests.chunks.samples import chunk, name


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store", reserve=0) as opened:
        yield opened


def sparse(path: Path, size: int, parts: dict[int, bytes]) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in parts.items():
            file.seek(offset)
            file.write(data)
    return path


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def content(store: ChunkStore, manifest: Manifest) -> bytes:
    return b"".join(store.get(fp) for fp in manifest)[: manifest.size]


def test_a_raw_image_comes_in_whole(store: ChunkStore, tmp_path: Path) -> None:
    size = 40 * MIB + 1536
    parts = {0: chunk(1), 5 * MIB + 512: chunk(2), 9 * MIB: bytes(CHUNK), size - 700: b"end" * 100}
    file = sparse(tmp_path / "a.raw", size, parts)
    told: list[tuple[int, int]] = []
    manifest = import_image(store, "debian-12", file, lambda done, total: told.append((done, total)))
    assert manifest.size == size
    assert content(store, manifest) == file.read_bytes()
    assert store.load_manifest("image/debian-12") == manifest
    assert manifest[9 * MIB // CHUNK] == ZERO
    assert len(manifest.unique()) == 4
    assert told == sorted(told)
    assert told[-1] == (size, size)
    assert store.manifest_meta("image/debian-12")["format"] == "raw"
    assert store.gc().chunks == 0
    assert store.check().ok


def test_holes_are_not_read(store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sparse(tmp_path / "a.raw", 8 << 30, {3 << 30: chunk(1)})
    read = []
    real = os.preadv

    def count(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(len(buffers[0]))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    manifest = import_image(store, "a", file)
    assert manifest[(3 << 30) // CHUNK] == name(1)
    assert sum(read) < 2 * MIB


def test_an_image_of_zeros_is_all_zero(store: ChunkStore, tmp_path: Path) -> None:
    assert import_image(store, "a", sparse(tmp_path / "a.raw", MIB, {})) == Manifest.zero(MIB)


def test_a_file_system_without_holes_will_do(
    store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sparse(tmp_path / "a.raw", MIB, {CHUNK: chunk(1)})

    def refuse(fd: int, offset: int, whence: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert list(import_image(store, "a", file))[:3] == [ZERO, name(1), ZERO]


@pytest.mark.parametrize("options", [[], ["-c"], ["-o", "compat=0.10"]])
def test_a_qcow2_image_is_flattened(store: ChunkStore, tmp_path: Path, options: list[str]) -> None:
    raw = sparse(tmp_path / "a.raw", 20 * MIB, {0: chunk(1), 7 * MIB + 4096: chunk(2)})
    file = tmp_path / "a.qcow2"
    qemu_img("convert", *options, "-O", "qcow2", raw, file)
    manifest = import_image(store, "a", file)
    assert manifest == import_image(store, "b", raw)
    assert store.manifest_meta("image/a")["format"] == "qcow2"
    left = {entry.name for entry in store.path.iterdir()} - {"index.sqlite-wal", "index.sqlite-shm", "gc.lock"}
    assert left == {"generation", "index.sqlite", "lock", "open", "packs"}


def test_importing_again_replaces_the_image(store: ChunkStore, tmp_path: Path) -> None:
    import_image(store, "a", sparse(tmp_path / "a.raw", MIB, {0: chunk(1)}))
    import_image(store, "a", sparse(tmp_path / "b.raw", 2 * MIB, {0: chunk(2)}))
    assert store.load_manifest("image/a").size == 2 * MIB
    assert store.gc().chunks == 1


@pytest.mark.parametrize("bad", ["", "A", "../x", "a b", "-a", "x" * 65, "a/b", "a\n"])
def test_names_are_checked(store: ChunkStore, tmp_path: Path, bad: str) -> None:
    with pytest.raises(UsageError, match="image name"):
        import_image(store, bad, sparse(tmp_path / "a.raw", MIB, {}))


@pytest.mark.parametrize("size", [0, 1000, 511, MAX_DISK + 512])
def test_sizes_that_no_disk_has_are_refused(store: ChunkStore, tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match=r"disk of|at most"):
        import_image(store, "a", sparse(tmp_path / "a.raw", size, {}))
    assert store.manifest_names() == []


def test_a_huge_qcow2_is_refused_before_it_is_unpacked(store: ChunkStore, tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "2T")
    with pytest.raises(UsageError, match="at most"):
        import_image(store, "a", tmp_path / "a.qcow2")


def test_a_backing_file_is_refused(store: ChunkStore, tmp_path: Path) -> None:
    raw = sparse(tmp_path / "base.raw", MIB, {})
    qemu_img("create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", tmp_path / "a.qcow2")
    with pytest.raises(Unsupported, match="backing file"):
        import_image(store, "a", tmp_path / "a.qcow2")


def test_encryption_is_refused(store: ChunkStore, tmp_path: Path) -> None:
    file = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", file, "1M")
    with open(file, "r+b") as opened:
        opened.seek(32)
        opened.write(struct.pack(">I", 2))  # crypt_method: LUKS
    with pytest.raises(Unsupported, match="encrypted"):
        import_image(store, "a", file)


def test_data_in_another_file_is_refused_without_opening_it(
    store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/secret", file, "1M")
    monkeypatch.setattr(images, "_run", lambda *words: pytest.fail("qemu-img was let near it"))
    with pytest.raises(Unsupported, match="another file"):
        import_image(store, "a", file)


def test_other_formats_are_refused(store: ChunkStore, tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "vmdk", tmp_path / "a.vmdk", "1M")
    with pytest.raises(Unsupported, match="vmdk"):
        import_image(store, "a", tmp_path / "a.vmdk")


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"QFI\xfb", Corrupt),
        (b"QFI\xfb" + struct.pack(">I", 9) + bytes(200), Unsupported),
        (b"QFI\xfb" + struct.pack(">I", 3) + b"\0" * 8 + b"\xff" * 200, HaulierError),
        (b"QFI\xfb" + struct.pack(">I", 3) + bytes(200), Corrupt),
    ],
)
def test_a_broken_qcow2_is_refused(store: ChunkStore, tmp_path: Path, head: bytes, error: type[HaulierError]) -> None:
    (tmp_path / "a.qcow2").write_bytes(head)
    with pytest.raises(error):
        import_image(store, "a", tmp_path / "a.qcow2")
    assert store.manifest_names() == []


@pytest.mark.parametrize("options", [[], ["-c"]])
def test_a_qcow2_that_was_cut_short_is_refused(store: ChunkStore, tmp_path: Path, options: list[str]) -> None:
    """qemu-img convert alone would read zeros there."""
    raw = sparse(tmp_path / "a.raw", 20 * MIB, {n * MIB: chunk(n) for n in range(20)})
    file = tmp_path / "a.qcow2"
    qemu_img("convert", *options, "-O", "qcow2", raw, file)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(Corrupt, match="cut short"):
        import_image(store, "a", file)
    assert store.manifest_names() == []


def test_what_is_no_file_is_refused(store: ChunkStore, tmp_path: Path) -> None:
    with pytest.raises(UnknownThing, match="check the path"):
        import_image(store, "a", tmp_path / "none.raw")
    with pytest.raises(UsageError):
        import_image(store, "a", tmp_path)
    with pytest.raises(UsageError, match="no regular file"):
        import_image(store, "a", Path("/dev/zero"))


def test_an_image_cut_while_it_is_read_is_corrupt(store: ChunkStore, tmp_path: Path) -> None:
    file = tmp_path / "a.raw"
    file.write_bytes(b"".join(chunk(n) for n in range(100)))

    def cut(done: int, total: int) -> None:
        if done:
            os.truncate(file, CHUNK)

    with pytest.raises(Corrupt, match="changed meanwhile"):
        import_image(store, "a", file, cut)
    assert store.manifest_names() == []
    assert store.gc().chunks >= 0
    assert store.stats().chunks == 0


def test_a_cancelled_import_holds_on_to_nothing(store: ChunkStore, tmp_path: Path) -> None:
    file = tmp_path / "a.raw"
    file.write_bytes(b"".join(chunk(n) for n in range(100)))

    def cancel(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_image(store, "a", file, cancel)
    store.gc()
    assert store.stats().chunks == 0
    assert store.stats().disk == 0
