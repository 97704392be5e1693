"""Bases: mapped-ram files as QEMU writes them, and mirrors left behind; identity by content."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haulier.errors import Corrupt, HaulierError, UnknownThing, Unsupported
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from tests.support.qemustream import PAGE, Writer, mapped_ram, page_of

SIZES = {"ram0": 700 * PAGE, "pc.rom": 3 * PAGE}
CONTENT = {
    "ram0": {0: page_of(1), 1: page_of(2), 300: page_of(3), 699: page_of(4)},
    "pc.rom": {1: page_of(5)},
}


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    mapped_ram(path, CONTENT, SIZES)
    return path


def mirror_of(path: Path, content: dict[str, dict[int, bytes]], sizes: dict[str, int]) -> Path:
    mirror = Mirror.create(path, sizes)
    for name, pages in content.items():
        for page, data in pages.items():
            mirror.set(np.array([mirror.first[name] + page]), np.frombuffer(data, np.uint8).reshape(1, PAGE))
    mirror.complete()
    mirror.close()
    return path


def holds(base: MemoryBase, content: dict[str, dict[int, bytes]], sizes: dict[str, int]) -> bool:
    for name, length in sizes.items():
        view = base.view(name)
        assert view.shape == (length // PAGE, PAGE)
        if any(view[page].tobytes() != content[name].get(page, bytes(PAGE)) for page in range(len(view))):
            return False
    return base.blocks == sizes


def test_mapped_ram(snapshot: Path) -> None:
    base = MemoryBase.from_mapped_ram(snapshot)
    assert holds(base, CONTENT, SIZES)
    assert list(base.nonzero_runs("ram0")) == [(0, 2), (300, 1), (699, 1)]
    base.close()


def test_views_are_read_only(snapshot: Path) -> None:
    base = MemoryBase.from_mapped_ram(snapshot)
    with pytest.raises(ValueError, match="read-only"):
        base.view("ram0")[0, 0] = 1
    with pytest.raises(UnknownThing, match="nothing"):
        base.view("nothing")


def test_pages_that_only_the_file_still_has_are_zero(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    mapped_ram(path, CONTENT, SIZES, stale={"ram0": {2: page_of(8), 500: page_of(9)}})
    assert holds(MemoryBase.from_mapped_ram(path), CONTENT, SIZES)


def test_digest_is_of_content_only(snapshot: Path, tmp_path: Path) -> None:
    base = MemoryBase.from_mapped_ram(snapshot)
    backwards = {name: SIZES[name] for name in reversed(SIZES)}
    other = MemoryBase.from_mirror(mirror_of(tmp_path / "mirror", CONTENT, backwards))
    assert base.digest == other.digest
    dense = {"ram0": {page: CONTENT["ram0"].get(page, bytes(PAGE)) for page in range(700)}, "pc.rom": CONTENT["pc.rom"]}
    assert MemoryBase.from_mirror(mirror_of(tmp_path / "dense", dense, SIZES)).digest == base.digest


@pytest.mark.parametrize("what", ["page moved", "page changed", "block renamed", "block longer"])
def test_digest_tells_apart(what: str, snapshot: Path, tmp_path: Path) -> None:
    content, sizes = {name: dict(pages) for name, pages in CONTENT.items()}, dict(SIZES)
    if what == "page moved":
        content["ram0"][301] = content["ram0"].pop(300)
    elif what == "page changed":
        content["ram0"][300] = page_of(30)
    elif what == "block renamed":
        content["pc.bios"], sizes["pc.bios"] = content.pop("pc.rom"), sizes.pop("pc.rom")
    else:
        sizes["pc.rom"] += PAGE
    other = MemoryBase.from_mirror(mirror_of(tmp_path / "mirror", content, sizes))
    assert other.digest != MemoryBase.from_mapped_ram(snapshot).digest


def test_digest_is_stored_beside_the_file_and_belongs_to_it(snapshot: Path) -> None:
    digest = MemoryBase.from_mapped_ram(snapshot).digest
    stored = snapshot.with_name("memory.digest")
    assert json.loads(stored.read_text())["digest"] == digest.hex()
    marked = json.loads(stored.read_text()) | {"digest": bytes(32).hex()}
    stored.write_text(json.dumps(marked))
    assert MemoryBase.from_mapped_ram(snapshot).digest == bytes(32), "the stored one is used"
    mapped_ram(snapshot, {**CONTENT, "pc.rom": {2: page_of(6)}}, SIZES)
    assert MemoryBase.from_mapped_ram(snapshot).digest not in (digest, bytes(32)), "not that of another file"


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"digest": 1, "digest_of": {}}', '"x"'])
def test_a_broken_stored_digest_is_computed_anew(text: str, snapshot: Path) -> None:
    digest = MemoryBase.from_mapped_ram(snapshot).digest
    snapshot.with_name("memory.digest").write_text(text)
    assert MemoryBase.from_mapped_ram(snapshot).digest == digest


def test_a_cut_snapshot_is_refused(snapshot: Path) -> None:
    whole = snapshot.read_bytes()
    for size in (0, 4, 8, 20, 60, 200, 5000, 1 << 20, len(whole) - 4 * PAGE):
        snapshot.write_bytes(whole[:size])
        with pytest.raises(Corrupt):
            MemoryBase.from_mapped_ram(snapshot)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(Writer().begin().part().page("ram0", 1, page_of(1)).eos().data)
    with pytest.raises(Unsupported, match="mapped-ram"):
        MemoryBase.from_mapped_ram(path)
    path.write_bytes(b"ELF" * 1000)
    with pytest.raises(Corrupt):
        MemoryBase.from_mapped_ram(path)
    with pytest.raises(Corrupt):
        MemoryBase.from_mirror(path)


@given(at=st.integers(0, 400), value=st.binary(min_size=1, max_size=9))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_refused_or_read_within_bounds(at: int, value: bytes, snapshot: Path) -> None:
    good = snapshot.read_bytes()
    path = snapshot.with_name("damaged")
    path.write_bytes(good[:at] + value + good[at + len(value) :])
    try:
        base = MemoryBase.from_mapped_ram(path)
    except HaulierError:
        return
    assert sum(base.blocks.values()) <= len(good)
    for name in base.blocks:
        list(base.nonzero_runs(name))
    base.close()


def test_a_mirror_that_was_cut_or_damaged_is_refused(tmp_path: Path) -> None:
    path = mirror_of(tmp_path / "mirror", CONTENT, SIZES)
    good = path.read_bytes()
    for at in (0, 9, 12, 17, 30):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(Corrupt):
            MemoryBase.from_mirror(path)
    for size in (0, 10, 40, len(good) - PAGE, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(Corrupt):
            MemoryBase.from_mirror(path)
    path.write_bytes(good[:8] + struct.pack(">II", 1, 1 << 31) + good[16:])
    with pytest.raises(Corrupt, match="version"):
        MemoryBase.from_mirror(path)
