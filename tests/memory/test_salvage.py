"""Mirrors whose process died: made whole, compared, and made equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from haulier.errors import Corrupt
from haulier.memory import salvage
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from haulier.units import PAGE

BLOCKS = {"ram0": 200 * PAGE, "vga": 40 * PAGE}


def filled(values: list[int]) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8), PAGE).reshape(-1, PAGE)


def whole(path: Path, pages: dict[int, int]) -> MemoryBase:
    mirror = Mirror.create(path, BLOCKS)
    mirror.set(np.array(sorted(pages)), filled([pages[page] for page in sorted(pages)]))
    mirror.complete()
    mirror.close()
    return MemoryBase.from_mirror(path)


def died(path: Path, base: MemoryBase | None, pages: dict[int, int]) -> Path:
    """As `whole`, but for the end."""
    mirror = Mirror.create(path, BLOCKS, base)
    mirror.set(np.array(sorted(pages)), filled([pages[page] for page in sorted(pages)]))
    mirror.close()
    return path


def test_a_mirror_in_use_is_no_picture(tmp_path: Path) -> None:
    path = died(tmp_path / "mirror", None, {3: 7})
    with pytest.raises(Corrupt, match="is not a mirror"):
        MemoryBase.from_mirror(path)


def test_what_was_left_lies_over_what_it_began_with(tmp_path: Path) -> None:
    base = whole(tmp_path / "base", {1: 1, 2: 2, 150: 3, 210: 4})
    path = died(tmp_path / "mirror", base, {2: 9, 60: 8, 211: 6})
    salvage.salvage(path, base)
    found = MemoryBase.from_mirror(path)
    values = {1: 1, 2: 9, 60: 8, 150: 3}
    assert [int(page[0]) for page in found.view("ram0")] == [values.get(page, 0) for page in range(200)]
    assert [int(page[0]) for page in found.view("vga")] == [{10: 4, 11: 6}.get(page, 0) for page in range(40)]


def test_a_file_that_was_made_whole_already_is_refused(tmp_path: Path) -> None:
    whole(tmp_path / "base", {1: 1}).close()
    with pytest.raises(Corrupt):
        salvage.salvage(tmp_path / "base", None)


def test_regions_that_differ_are_found_and_only_they(tmp_path: Path) -> None:
    mine = whole(tmp_path / "a", {0: 1, 40: 2, 100: 3, 230: 5})
    theirs = whole(tmp_path / "b", {0: 1, 40: 9, 100: 3, 231: 5})
    # 200 pages are 7 regions of 32, so the second block begins with region 7.
    assert salvage.differing(salvage.regions(mine), salvage.regions(theirs)).tolist() == [1, 7]
    assert salvage.differing(salvage.regions(mine), salvage.regions(mine)).tolist() == []


def test_pages_in_doubt_are_given_up_at_both_and_nothing_else(tmp_path: Path) -> None:
    mine = whole(tmp_path / "a", {0: 1, 40: 2, 41: 7, 199: 3, 230: 5})
    theirs = whole(tmp_path / "b", {0: 1, 40: 9, 41: 7, 198: 3, 231: 5})
    numbers = salvage.differing(salvage.regions(mine), salvage.regions(theirs))
    a, b = (np.frombuffer(salvage.pages_of(base, numbers), np.uint64) for base in (mine, theirs))
    unlike = a != b
    assert salvage.give_up(mine, numbers, unlike) == salvage.give_up(theirs, numbers, unlike) == 5
    assert salvage.regions(mine) == salvage.regions(theirs)
    assert [int(mine.view("ram0")[page][0]) for page in (0, 40, 41, 198, 199)] == [1, 0, 7, 0, 0]
    assert not mine.view("ram0").flags.writeable
    mine.close()
    # In this process alone: the file is as it was.
    assert MemoryBase.from_mirror(tmp_path / "a").view("ram0")[40][0] == 2


@pytest.mark.parametrize("numbers", [[9], [0, 400]])
def test_regions_that_there_are_not_are_refused(tmp_path: Path, numbers: list[int]) -> None:
    base = whole(tmp_path / "a", {0: 1})
    with pytest.raises(Corrupt, match="speaks of region"):
        salvage.pages_of(base, np.array(numbers))


@pytest.mark.parametrize("count", [31, 33])
def test_a_comparison_of_another_length_is_refused(tmp_path: Path, count: int) -> None:
    base = whole(tmp_path / "a", {0: 1})
    with pytest.raises(Corrupt, match="compared"):
        salvage.give_up(base, np.array([0]), np.zeros(count, np.bool_))
    with pytest.raises(Corrupt, match="form"):
        salvage.differing(salvage.regions(base), salvage.regions(base)[8:])
