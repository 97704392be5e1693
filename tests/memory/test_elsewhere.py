"""Pages of a base by content and by index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from haulier.errors import Corrupt
from haulier.memory import elsewhere
from haulier.memory.base import MemoryBase
from haulier.memory.elsewhere import BasePages
from tests.support.qemustream import PAGE, mapped_ram, page_of

SIZES = {"ram0": 20 * PAGE, "a.rom": 3 * PAGE}


@pytest.fixture
def base(tmp_path: Path) -> BasePages:
    mapped_ram(tmp_path / "golden", {"ram0": {2: page_of(1), 9: page_of(2)}, "a.rom": {1: page_of(3)}}, SIZES)
    return BasePages(MemoryBase.from_mapped_ram(tmp_path / "golden"))


def rows(*values: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.frombuffer(b"".join(page_of(value) for value in values), np.uint8).reshape(-1, PAGE)


def test_find_and_read(base: BasePages) -> None:
    # Blocks are sorted by name: a.rom has the indexes 0 to 2, ram0 those from 3 on.
    assert base.find(rows(2, 7, 3, 1)).tolist() == [12, -1, 1, 5]
    assert base.read(np.array([12, 1, 5, 0], np.uint32)).tobytes() == rows(2, 3, 1, 0).tobytes()


def test_a_hash_alone_does_not_decide(base: BasePages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "page_hashes", lambda pages: np.full(len(pages), 5, np.uint64))
    assert set(base.find(rows(8, 9)).tolist()) == {-1}


def test_beyond_the_base(base: BasePages) -> None:
    assert base.read(np.array([22], np.uint32)).shape == (1, PAGE)
    with pytest.raises(Corrupt):
        base.read(np.array([23], np.uint32))


def test_an_empty_base(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "golden", {}, {"ram0": 4 * PAGE})
    assert BasePages(MemoryBase.from_mapped_ram(tmp_path / "golden")).find(rows(1, 0)).tolist() == [-1, -1]
