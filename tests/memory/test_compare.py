"""Comparing RAM files against a plain comparison."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haulier.errors import UsageError
from haulier.memory.compare import compare_ram
from tests.support.qemustream import PAGE, changed, page_of

PAGES = 2100


def ram(path: Path, content: dict[int, bytes], pages: int = PAGES) -> Path:
    with path.open("wb") as file:
        file.truncate(pages * PAGE)
        for page, data in content.items():
            os.pwrite(file.fileno(), data, page * PAGE)
    return path


contents = st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 2), max_size=12)


@given(contents, contents)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_finds_just_the_pages_that_differ(tmp_path: Path, one: dict[int, int], two: dict[int, int]) -> None:
    a = ram(tmp_path / "a", {page: page_of(value) for page, value in one.items()})
    b = ram(tmp_path / "b", {page: page_of(value) for page, value in two.items()})
    report = compare_ram(a, b)
    assert report.pages == PAGES
    assert report.differing == sorted(page for page in {*one, *two} if one.get(page, 0) != two.get(page, 0))
    assert report.equal == (not report.differing)


def test_one_bit(tmp_path: Path) -> None:
    a = ram(tmp_path / "a", {5: page_of(1)})
    b = ram(tmp_path / "b", {5: changed(page_of(1), 511)})
    assert compare_ram(a, b).differing == [5]


def test_holes_are_zero_and_stay_holes(tmp_path: Path) -> None:
    a, b = ram(tmp_path / "a", {}), ram(tmp_path / "b", {page: bytes(PAGE) for page in range(100)})
    assert compare_ram(str(a), str(b)).equal
    assert os.stat(a).st_blocks == 0


def test_other_lengths_are_refused(tmp_path: Path) -> None:
    a, b = ram(tmp_path / "a", {}), ram(tmp_path / "b", {}, PAGES + 1)
    with pytest.raises(UsageError, match="one length"):
        compare_ram(a, b)
    (tmp_path / "odd").write_bytes(b"x")
    with pytest.raises(UsageError):
        compare_ram(tmp_path / "odd", tmp_path / "odd")
