"""Dirty rounds: the arithmetic alone, then against a real QEMU's block layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.disks.nbd import Extent
from haulier.disks.rounds import ZEROS, DiskRounds, HoldBack, clean_up, covered, runs
from haulier.errors import Conflict, GuestError
from haulier.units import CHUNK
from tests.disks.qemus import Disk, qemu_with_disk

SIZE = 64 << 20


@given(st.lists(st.tuples(st.integers(1, 3 * CHUNK), st.integers(0, 3)), min_size=1, max_size=30))
def test_covered_agrees_with_counting_bytes(runs: list[tuple[int, int]]) -> None:
    extents: list[Extent] = []
    for length, flags in runs:
        at = extents[-1].offset + extents[-1].length if extents else 0
        extents.append(Extent(at, length, flags))
    end = extents[-1].offset + extents[-1].length
    set_in: dict[int, int] = {}
    for offset, length, flags in extents:
        if flags & 1:
            for index in range(offset // CHUNK, -(-(offset + length) // CHUNK)):
                inside = min(offset + length, (index + 1) * CHUNK) - max(offset, index * CHUNK)
                set_in[index] = set_in.get(index, 0) + inside
    whole = {i for i, n in set_in.items() if n == min(CHUNK, end - i * CHUNK)}
    assert covered(extents, 1, whole=False) == set(set_in)
    assert covered(extents, 1, whole=True) == whole


@given(st.lists(st.sets(st.integers(0, 8)), min_size=1, max_size=8))
def test_nothing_dirty_is_ever_forgotten(rounds: list[set[int]]) -> None:
    hold, sent_at = HoldBack(), dict[int, int]()
    for number, dirty in enumerate(rounds):
        for index in hold.sort(dirty):
            sent_at[index] = number
    held = hold.release()
    for number, dirty in enumerate(rounds):
        for index in dirty:
            assert index in held or sent_at[index] >= number
    assert held == (rounds[-1] & rounds[-2] if len(rounds) > 1 else set())
    assert not hold.held


@given(st.sets(st.integers(0, 200)), st.integers(0, 20))
def test_runs_cover_and_bridge(indices: set[int], gap: int) -> None:
    found = list(runs(indices, gap))
    inside = {i for first, last in found for i in range(first, last + 1)}
    assert indices <= inside
    assert {i for run in found for i in run} <= indices
    assert all(after - before > gap for (_, before), (after, _) in itertools.pairwise(found))
    assert sum(1 for a, b in itertools.pairwise(sorted(indices)) if b - a > gap) == max(0, len(found) - 1)


class FakeQmp:
    def __init__(self, status: str) -> None:
        self.status = status
        self.commands: list[str] = []

    def execute(self, command: str, args: dict[str, Any] | None = None, timeout: float = 30) -> Any:
        self.commands.append(command)
        if command == "query-status":
            return {"status": self.status}
        raise AssertionError(command)


@pytest.mark.parametrize("status", ["postmigrate", "inmigrate"])
def test_a_disk_that_moved_is_never_exported_again(status: str, tmp_path: Path) -> None:
    qmp = FakeQmp(status)
    with pytest.raises(Conflict, match="new owner"):
        DiskRounds(qmp, "disk0", tmp_path / "r").begin()
    assert qmp.commands == ["query-status"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * (CHUNK // 4) * 100)
    with base.open("r+b") as file:
        file.truncate(SIZE)
    node = {"driver": "raw", "file": {"driver": "file", "filename": str(base), "read-only": True}}
    with qemu_with_disk(tmp_path, node, SIZE) as found:
        yield found


@pytest.mark.qemu
def test_rounds_find_every_write(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    disk.io("write -P 5 128k 64k")
    disk.io("write -P 6 1M 4k")
    with rounds.begin() as first:
        got = dict(first.items())
    assert sorted(got) == first.chunks == [2, 16]
    assert got[2] == b"\5" * CHUNK
    assert got[16] == b"\6" * 4096 + (b"base" * (CHUNK // 4))[4096:]

    disk.io("write -P 7 0 4k")
    with rounds.next() as second:
        disk.io("write -P 8 192k 64k")  # during the round: belongs to the next
        assert [index for index, _ in second.items()] == [0]
        assert second.read(16) == got[16]
    with rounds.next() as third:
        assert [(index, data[0]) for index, data in third.items()] == [(3, 8)]
    with rounds.final() as last:
        assert list(last.items()) == []
    rounds.stop()
    assert disk.bitmaps() == disk.exports() == []
    assert not (tmp_path / "r.sock").exists()


@pytest.mark.qemu
def test_discarded_and_zeroed_ranges_are_not_read(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    disk.io("write -P 9 40M 64k")
    with rounds.begin() as first:
        assert first.chunks == [640]
    disk.io("discard 0 32M")
    disk.io("write -z 40M 64k")
    disk.io("write -P 1 33M 4k")
    with rounds.next() as second:
        read: list[int] = []
        assert second._reader is not None
        plain = second._reader.read_many
        second._reader.read_many = lambda offsets, length: plain(_noted(offsets, read), length)  # type: ignore[method-assign]
        got = dict(second.items())
    assert set(got) == {*range(512), 640, 528} == second.dirty
    assert read == [33 << 20]
    assert all(got[index] is ZEROS for index in (*range(512), 640))
    rounds.abort()


def _noted(offsets: Any, into: list[int]) -> list[int]:
    into.extend(offsets)
    return list(into)


@pytest.mark.qemu
def test_hot_chunks_wait_for_the_final_round(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    rounds.begin().close()
    for value in (1, 2, 3):
        disk.io(f"write -P {value} 0 4k")
        disk.io(f"write -P {value} {value}M 4k")
        with rounds.next() as this:
            assert 0 in this.dirty
            assert (0 in this.chunks) == (value == 1)
            list(this.items())
    assert rounds.held_back == {0}
    with rounds.final() as last:
        assert {index: data[0] for index, data in last.items()} == {0: 3}
    rounds.stop()


@pytest.mark.qemu
def test_chunks_that_cooled_down_are_sent(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    rounds.begin().close()
    sent: list[list[int]] = []
    for places in ((0,), (0, 5), (5,), ()):
        for place in places:
            disk.io(f"write -P {len(sent) + 1} {place * CHUNK} 4k")
        with rounds.next() as this:
            sent.append([index for index, _ in this.items()])
    assert sent == [[0], [5], [0], [5]]
    assert rounds.held_back == set()
    with rounds.final() as last:
        assert last.chunks == []
    rounds.stop()


@pytest.mark.qemu
def test_an_interrupted_round_makes_nothing_hot(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    rounds.begin().close()
    disk.io("write -P 1 0 64k")
    rounds.next().close()
    with rounds.next() as this:
        assert [index for index, _ in this.items()] == [0]
    assert rounds.held_back == rounds.carried == set()
    rounds.abort()


@pytest.mark.qemu
def test_a_round_that_failed_is_not_passed_over(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    rounds.begin().close()
    disk.io("write -P 1 0 64k")
    moved = (tmp_path / "r.sock").rename(tmp_path / "elsewhere")
    with pytest.raises(GuestError, match="cannot be reached"):
        rounds.next()
    moved.rename(tmp_path / "r.sock")
    for go_on in (rounds.next, rounds.final, rounds.stop):
        with pytest.raises(Conflict):
            go_on()
    rounds.abort()
    with rounds.begin() as again:
        assert again.chunks == [0]
    rounds.abort()


@pytest.mark.qemu
def test_what_an_interrupted_round_left_comes_with_the_next(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    rounds.begin().close()
    for n in range(10):
        disk.io(f"write -P {n + 1} {n}M 64k")
    this = rounds.next()
    items = this.items()
    taken = {next(items)[0], next(items)[0]}
    this.close()
    assert rounds.carried == {n * 16 for n in range(10)} - taken
    with rounds.final() as last:
        assert {index for index, _ in last.items()} == {n * 16 for n in range(10)} - taken
    rounds.stop()


@pytest.mark.qemu
def test_stop_refuses_to_forget(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    rounds.begin().close()
    disk.io("write -P 1 0 4k")
    rounds.final()
    with pytest.raises(Conflict, match="not read"):
        rounds.stop()
    rounds.abort()
    assert disk.bitmaps() == disk.exports() == []


@pytest.mark.qemu
def test_abort_and_a_dead_worker_leave_nothing(disk: Disk, tmp_path: Path) -> None:
    disk.io("write -P 5 0 64k")
    disk.qmp.execute("block-dirty-bitmap-add", {"node": "disk0", "name": "someone-elses"})
    for _attempt in range(2):
        rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
        with rounds.begin() as first:
            assert first.chunks == [0]
        rounds.next()
        rounds.abort()
        assert disk.bitmaps() == ["someone-elses"] and disk.exports() == []
    forgotten = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    forgotten.begin().close()
    left_open = forgotten.next()
    clean_up(disk.qmp)
    assert left_open._reader is not None
    left_open._reader.close()
    assert disk.bitmaps() == ["someone-elses"] and disk.exports() == []
    again = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    with again.begin() as first:
        assert first.chunks == [0]
    again.abort()


@pytest.mark.qemu
def test_order_is_kept(disk: Disk, tmp_path: Path) -> None:
    rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.sock")
    with pytest.raises(Conflict, match="not begun"):
        rounds.next()
    rounds.begin()
    with pytest.raises(Conflict, match="begun already"):
        rounds.begin()
    disk.qmp.execute("cont")
    with pytest.raises(Conflict, match="still runs"):
        rounds.final()
    disk.qmp.execute("stop")
    with rounds.final():
        with pytest.raises(Conflict, match="final round"):
            rounds.next()
    rounds.stop()
    with pytest.raises(GuestError):
        DiskRounds(disk.qmp, "no-such-node", tmp_path / "r.sock").begin()
    assert disk.bitmaps() == disk.exports() == []
