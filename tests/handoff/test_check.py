"""Digests of memory by region: what differs is named, and holes are zeros."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from haulier.errors import Corrupt
from haulier.handoff.check import DIGEST, REGION, differing, memory_digests

SIZE = 16 * REGION


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """16 MiB: data in MiB 2, 3 and 9 (one page in the middle), holes elsewhere."""
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(2 * REGION)
        file.write(os.urandom(2 * REGION))
        file.seek(9 * REGION + 100 * 4096)
        file.write(os.urandom(4096))
    return path


def copy(path: Path, name: str, sparse: bool) -> Path:
    data = path.read_bytes()
    other = path.with_name(name)
    with other.open("wb") as file:
        if sparse:
            file.truncate(len(data))
            for at in range(0, len(data), 4096):
                if any(data[at : at + 4096]):
                    file.seek(at)
                    file.write(data[at : at + 4096])
        else:
            file.write(data)
    return other


@pytest.mark.parametrize("sparse", [True, False])
def test_holes_and_written_zeros_are_alike(ram: Path, sparse: bool) -> None:
    assert memory_digests(copy(ram, "other", sparse)) == memory_digests(ram)


@pytest.mark.parametrize(
    "at", [0, 5, REGION - 1, REGION, 2 * REGION + 7, 4 * REGION - 1, 9 * REGION + 101 * 4096, SIZE - 1]
)
def test_one_flipped_bit_names_its_mib(ram: Path, at: int) -> None:
    other = copy(ram, "other", True)
    with other.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert differing(memory_digests(ram), memory_digests(other)) == [at // REGION]


def test_a_last_region_that_is_not_whole_counts(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * (REGION + 4096))
    b.write_bytes(b"x" * (REGION + 4095) + b"y")
    assert len(memory_digests(a)) == 2 * DIGEST
    assert differing(memory_digests(a), memory_digests(b)) == [1]


def test_empty_files_and_holes_only(tmp_path: Path) -> None:
    empty, hole = tmp_path / "empty", tmp_path / "hole"
    empty.touch()
    hole.touch()
    os.truncate(hole, 3 * REGION)
    assert memory_digests(empty) == b""
    full = tmp_path / "full"
    full.write_bytes(bytes(3 * REGION))
    assert memory_digests(hole) == memory_digests(full)


def test_memories_of_different_size_are_never_equal(ram: Path, tmp_path: Path) -> None:
    other = tmp_path / "short"
    other.write_bytes(ram.read_bytes()[: 8 * REGION])
    with pytest.raises(Corrupt, match="16 MiB here and 8 MiB there"):
        differing(memory_digests(ram), memory_digests(other))
    with pytest.raises(Corrupt):
        differing(b"x" * 17, b"x" * 17)
