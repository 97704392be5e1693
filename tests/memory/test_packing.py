"""Pages of a mirror that lie compressed: they take less, come back as they were, and outlive their process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from haulier.memory import packing, salvage
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from haulier.units import PAGE

COUNT = 2048


def text(first: int, count: int = COUNT) -> NDArray[np.uint8]:
    """Pages that a compressor makes small, each its own."""
    lines = b"".join((b"%06d: what a page may say " % (first + page) * 200)[:PAGE] for page in range(count))
    return np.frombuffer(lines, np.uint8).reshape(-1, PAGE)


def taken(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def packed(path: Path) -> Mirror:
    mirror = Mirror.create(path, {"ram0": COUNT * PAGE})
    mirror.most_plain = 64
    for at in range(0, COUNT, 100):
        some = np.arange(at, min(at + 100, COUNT))
        mirror.set(some, text(at, len(some)))
        while mirror.pack():
            pass
    return mirror


def test_what_was_set_long_ago_takes_a_part_of_its_bytes(tmp_path: Path) -> None:
    mirror = packed(tmp_path / "mirror")
    assert taken(tmp_path / "mirror") < COUNT * PAGE // 4
    # In an order that goes from record to record.
    order = np.random.default_rng(1).permutation(COUNT)
    assert (mirror.get(order) == text(0)[order]).all()
    mirror.close()


def test_records_without_a_page_give_their_memory_back(tmp_path: Path) -> None:
    mirror = packed(tmp_path / "mirror")
    before = taken(tmp_path / "mirror")
    for _ in range(20):
        mirror.set(np.arange(COUNT), text(7))
        mirror.pack(COUNT)
    assert taken(tmp_path / "mirror") < 2 * before
    mirror.zero(np.arange(COUNT))
    assert taken(tmp_path / "mirror") <= 2 * PAGE
    assert not mirror.get(np.arange(COUNT)).any()


def test_noise_is_left_as_it_is(tmp_path: Path) -> None:
    mirror = Mirror.create(tmp_path / "mirror", {"ram0": COUNT * PAGE})
    mirror.most_plain = 0
    noise = np.random.default_rng(1).integers(0, 256, (COUNT, PAGE), np.uint8)
    mirror.set(np.arange(COUNT), noise)
    assert mirror.pack(COUNT)
    assert taken(tmp_path / "mirror") <= COUNT * PAGE + 2 * PAGE
    assert (mirror.get(np.arange(COUNT)) == noise).all()


def test_where_all_of_it_is_wanted_at_once_nothing_is_packed(tmp_path: Path) -> None:
    mirror = Mirror.create(tmp_path / "mirror", {"ram0": COUNT * PAGE}, packs=False)
    mirror.most_plain = 0
    mirror.set(np.arange(COUNT), text(0))
    assert not mirror.pack()
    assert taken(tmp_path / "mirror") >= COUNT * PAGE
    assert (mirror.view == text(0)).all()


def test_without_holes_nothing_is_packed_and_zero_stays_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haulier.memory.pagefile.punch", lambda *_: False)
    mirror = packed(tmp_path / "mirror")
    mirror.zero(np.arange(0, COUNT, 2))
    mirror.complete()
    mirror.close()
    expected = text(0).copy()
    expected[::2] = 0
    base = MemoryBase.from_mirror(tmp_path / "mirror")
    assert (base.view("ram0") == expected).all()
    base.close()


def test_what_a_dead_process_had_packed_is_found(tmp_path: Path) -> None:
    mirror = packed(tmp_path / "mirror")
    again = np.arange(0, COUNT, 3)
    mirror.set(again, text(50_000, len(again)))
    mirror.pack(COUNT)
    mirror.close()
    assert taken(tmp_path / "mirror") < COUNT * PAGE // 2
    expected = text(0).copy()
    expected[again] = text(50_000, len(again))
    salvage.salvage(tmp_path / "mirror", None)
    base = MemoryBase.from_mirror(tmp_path / "mirror")
    assert (base.view("ram0") == expected).all()
    base.close()


@pytest.mark.parametrize("at", [0, 9, 13, 20, 30, 200])
def test_a_record_that_is_damaged_is_passed_over(tmp_path: Path, at: int) -> None:
    with open(tmp_path / "packed", "w+b") as file:
        pages = packing.PackedPages(
            file.fileno(), 0, COUNT, lambda data, offset: os.pwrite(file.fileno(), data, offset)
        )
        assert pages.add(np.arange(5, 25), text(0, 20)) and pages.add(np.arange(40, 60), text(40, 20))
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, at)[0] ^ 0x55]), at)
        found = list(packing.left(file.fileno(), 0))
    assert [gidx.tolist() for gidx, _ in found] == [list(range(40, 60))]
    assert (found[0][1] == text(40, 20)).all()
