"""The mirror against a plain array; its file; a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from haulier.errors import Corrupt, NoRoom, UsageError
from haulier.memory import sparse
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from tests.support.qemustream import PAGE, mapped_ram, page_of

BLOCKS = {"ram0": 40 * PAGE, "rom": 8 * PAGE}


def rows(*values: int) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(page_of(value) for value in values), np.uint8).reshape(-1, PAGE)


def contents(mirror: Mirror) -> bytes:
    return mirror.get(np.arange(mirror.pages)).tobytes()


def golden(folder: Path) -> tuple[MemoryBase, NDArray[np.uint8]]:
    """A base of BLOCKS with data in every third page, and its pages."""
    content = {"ram0": {page: page_of(100 + page) for page in range(0, 40, 3)}, "rom": {2: page_of(7)}}
    mapped_ram(folder / "golden", content, BLOCKS)
    model = np.zeros((48, PAGE), np.uint8)
    for first, name in ((0, "ram0"), (40, "rom")):
        for page, data in content[name].items():
            model[first + page] = np.frombuffer(data, np.uint8)
    return MemoryBase.from_mapped_ram(folder / "golden"), model


steps = st.tuples(
    st.sampled_from(["set", "zero"]), st.lists(st.integers(0, 47), unique=True, max_size=20), st.integers(0, 9)
)


@given(st.lists(steps, max_size=12), st.sampled_from([0, 7, 1000]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_like_a_plain_array(tmp_path: Path, changes: list[tuple[str, list[int], int]], plain: int) -> None:
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS)
    mirror.most_plain = plain
    model = np.zeros((48, PAGE), np.uint8)
    for what, pages, value in changes:
        gidx = np.array(pages, np.int64)
        if what == "set":
            new = rows(*(value + k for k in range(2 * len(pages))))
            # Rows further apart than their pages are, in places.
            chosen = np.cumsum(np.array([1 + (page % 2) for page in pages], np.int64)) - 1
            mirror.set(gidx, new, chosen)
            mirror.pack()
            model[gidx] = new[chosen]
        else:
            mirror.zero(gidx)
            model[gidx] = 0
        assert contents(mirror) == model.tobytes()
        assert not model[~mirror.present].any()
        assert what == "set" or not mirror.present[gidx].any()
    mirror.complete()
    mirror.close()
    base = MemoryBase.from_mirror(tmp_path / "mirror")
    assert b"".join(base.view(name).tobytes() for name in BLOCKS) == model.tobytes()
    base.close()


@given(st.lists(steps, max_size=12), st.sampled_from([0, 7, 1000]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_like_a_plain_array_that_began_as_the_base(
    tmp_path: Path, changes: list[tuple[str, list[int], int]], plain: int
) -> None:
    base, model = golden(tmp_path)
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS, base)
    mirror.most_plain = plain
    for what, pages, value in changes:
        gidx = np.array(pages, np.int64)
        if what == "set":
            new = rows(*(value + k for k in range(len(pages))))
            mirror.set(gidx, new)
            mirror.pack(value)
            model[gidx] = new
        else:
            mirror.zero(gidx)
            model[gidx] = 0
        assert contents(mirror) == model.tobytes()
        assert mirror.get(gidx[::-1]).tobytes() == model[gidx[::-1]].tobytes()
        assert not model[~mirror.present].any()
    (tmp_path / "copy").unlink(missing_ok=True)
    mirror.complete(tmp_path / "copy")
    mirror.complete()
    assert contents(mirror) == model.tobytes()
    mirror.close()
    copied = MemoryBase.from_mirror(tmp_path / "copy")
    assert b"".join(copied.view(name).tobytes() for name in BLOCKS) == model.tobytes()
    copied.close()
    base.close()
    left = MemoryBase.from_mirror(tmp_path / "mirror")
    assert b"".join(left.view(name).tobytes() for name in BLOCKS) == model.tobytes()
    left.close()


def test_what_was_not_completed_is_no_picture(tmp_path: Path) -> None:
    base, _ = golden(tmp_path)
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS, base)
    mirror.set(np.array([1]), rows(1))
    mirror.close()
    with pytest.raises(Corrupt, match="not a mirror"):
        MemoryBase.from_mirror(tmp_path / "mirror")


def test_it_holds_only_what_the_base_does_not(tmp_path: Path) -> None:
    base, _ = golden(tmp_path)
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS, base)
    mirror.set(np.array([1]), rows(1))
    assert os.stat(tmp_path / "mirror").st_blocks * 512 <= 2 * PAGE
    mirror.close()


def test_starts_as_the_base_by_name_and_length(tmp_path: Path) -> None:
    sizes = {"rom": 8 * PAGE, "gone": 4 * PAGE, "ram0": 40 * PAGE, "grown": 4 * PAGE}
    content = {"rom": {1: page_of(1)}, "gone": {0: page_of(2)}, "ram0": {7: page_of(3)}, "grown": {0: page_of(4)}}
    mapped_ram(tmp_path / "golden", content, sizes)
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    mirror = Mirror.create(
        tmp_path / "mirror", {"ram0": 40 * PAGE, "nic.rom": 2 * PAGE, "grown": 5 * PAGE, "rom": 8 * PAGE}, base
    )
    expected = {7: page_of(3), 40 + 2 + 5 + 1: page_of(1)}
    for page in range(mirror.pages):
        assert mirror.get(np.array([page])).tobytes() == expected.get(page, bytes(PAGE)), page
    assert np.flatnonzero(mirror.present).tolist() == sorted(expected)
    assert mirror.first == {"ram0": 0, "nic.rom": 40, "grown": 42, "rom": 47}


def test_the_base_itself_never_changes(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {7: page_of(3)}, "rom": {}}, BLOCKS)
    before = (tmp_path / "golden").read_bytes()
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS, base)
    mirror.set(np.arange(48), rows(*range(1, 49)))
    mirror.zero(np.arange(48))
    mirror.close()
    assert base.view("ram0")[7].tobytes() == page_of(3)
    assert (tmp_path / "golden").read_bytes() == before


def test_the_file_is_private_and_sparse_and_gives_memory_back(tmp_path: Path) -> None:
    mirror = Mirror.create(tmp_path / "mirror", {"ram0": 4096 * PAGE})
    status = os.stat(tmp_path / "mirror")
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 < 1 << 20
    mirror.set(np.arange(1024), rows(*range(1, 1025)))
    grown = os.stat(tmp_path / "mirror").st_blocks
    assert grown * 512 >= 1024 * PAGE
    mirror.zero(np.arange(1024))
    assert os.stat(tmp_path / "mirror").st_blocks < grown // 2
    assert not mirror.get(np.arange(1024)).any()


def test_zero_pages_are_never_read(tmp_path: Path) -> None:
    mirror = Mirror.create(tmp_path / "mirror", {"ram0": 4096 * PAGE})
    before = os.stat(tmp_path / "mirror").st_blocks
    mirror.get(np.arange(4096))
    mirror.zero(np.arange(4096))
    assert os.stat(tmp_path / "mirror").st_blocks == before


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {7: page_of(3)}, "rom": {}}, BLOCKS)
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS)
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) >= PAGE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoRoom, match="mirror"):
        mirror.set(np.array([1]), rows(1))
    mirror.present[1] = True
    with pytest.raises(NoRoom):
        mirror.set(np.array([1, 2]), rows(1, 2))
    with pytest.raises(NoRoom):
        Mirror.create(tmp_path / "other", BLOCKS, base).complete()


def test_last_occurrences(tmp_path: Path) -> None:
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS)
    assert mirror.last(np.array([5, 6, 5, 7, 6])).tolist() == [False, False, True, True, True]
    assert mirror.last(np.array([6])).tolist() == [True]


def test_it_replaces_what_was_there_and_forgets_its_digest(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_bytes(b"something else")
    (tmp_path / "mirror.digest").write_text("{}")
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS)
    mirror.complete()
    mirror.close()
    assert MemoryBase.from_mirror(tmp_path / "mirror").blocks == BLOCKS
    assert not (tmp_path / "mirror.digest").exists()


def test_without_blocks_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Mirror.create(tmp_path / "mirror", {})


@given(st.lists(st.integers(0, 3), max_size=600))
@settings(max_examples=50, deadline=None)
def test_nonzero_runs(values: list[int]) -> None:
    view = np.zeros((len(values), PAGE), np.uint8)
    for page, value in enumerate(values):
        # A page may differ from zero in one byte only, wherever it is.
        if value:
            view[page, value * 1301 + page % 8] = value
    found = [page for first, count in sparse.nonzero_runs(view, 0, len(view)) for page in range(first, first + count)]
    assert found == [page for page, value in enumerate(values) if value]
