"""Pages read ahead of the stream: what is read, in which order; that only the mirrors learn of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from haulier.errors import Corrupt, UsageError
from haulier.memory.ahead import REGION, AheadReader
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from haulier.memory.proxy import SourceProxy
from haulier.memory.target_proxy import TargetProxy
from tests.memory.finders import Disk
from tests.support.qemustream import PAGE, Writer, mapped_ram, page_of

PAGES = 3 * REGION + 7
BLOCKS = {"ram0": PAGES * PAGE}


def ram(folder: Path, contents: dict[int, bytes]) -> Path:
    path = folder / "ram"
    with path.open("wb") as file:
        file.truncate(PAGES * PAGE)
        for page, data in contents.items():
            file.seek(page * PAGE)
            file.write(data)
    return path


def all_of(reader: AheadReader, mirror: Mirror) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while not reader.done:
        numbers, pages = reader.take(mirror, most=1)
        found += [(int(number), page.tobytes()) for number, page in zip(numbers, pages, strict=True)]
    return found


def stretch(first: int, count: int, salt: int) -> dict[int, bytes]:
    return {page: page_of(salt + page) for page in range(first, first + count)}


def test_only_what_the_mirror_lacks_and_the_dearest_region_first(tmp_path: Path) -> None:
    known = stretch(0, REGION, 1)
    few, many = stretch(REGION, REGION // 4, 50_000), stretch(2 * REGION, REGION, 90_000)
    mapped_ram(tmp_path / "golden", {"ram0": known}, BLOCKS)
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS, base)
    reader = AheadReader(ram(tmp_path, {**known, **few, **many, 5: page_of(77)}), "ram0")
    reader.plan(mirror, None)
    found = all_of(reader, mirror)
    # One changed page of a region is not met by its sample; QEMU's own pass brings it.
    assert dict(found) == {**few, **many}
    assert [page // REGION for page, _ in found] == sorted((page // REGION for page, _ in found), reverse=True)
    assert len(found) == len(few) + len(many) == reader.read_pages
    reader.close()
    base.close()


def test_pages_that_are_blocks_of_the_disk_do_not_make_a_region_dear(tmp_path: Path) -> None:
    cached, own = stretch(0, REGION, 1), stretch(2 * REGION, REGION, 90_000)
    disk = Disk(*cached.values())
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS)
    reader = AheadReader(ram(tmp_path, {**cached, **own}), "ram0")
    reader.plan(mirror, disk)
    assert dict(all_of(reader, mirror)) == own


def test_a_short_file_and_a_wrong_order_of_calls_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(PAGE + 1))
    with pytest.raises(UsageError, match="whole number of pages"):
        AheadReader(tmp_path / "odd", "ram0")
    mirror = Mirror.create(tmp_path / "mirror", BLOCKS)
    path = ram(tmp_path, stretch(0, REGION, 1))
    reader = AheadReader(path, "ram0")
    with pytest.raises(UsageError, match="plan"):
        reader.take(mirror)
    reader.plan(mirror, None)
    with path.open("r+b") as file:
        file.truncate(0)
    with pytest.raises(UsageError, match="shorter"):
        reader.take(mirror)


def rows(pages: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(pages), np.uint8).reshape(-1, PAGE)


@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 9)), max_size=100),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 9)), max_size=100),
)
@settings(max_examples=40, deadline=None)
def test_the_stream_stays_exact_whatever_went_ahead(
    tmp_path_factory: pytest.TempPathFactory, early: list[tuple[int, int]], real: list[tuple[int, int]]
) -> None:
    """Torn, stale or right: what went ahead changes the mirrors alike, and not a byte of the stream."""
    folder = tmp_path_factory.mktemp("ahead")
    blocks = {"ram0": 64 * PAGE, "rom": 4 * PAGE}
    begin = Writer(blocks=blocks).begin()
    writer = Writer(blocks=blocks).begin().part()
    for page, value in real:
        writer.page("ram0", page, page_of(value))
    writer.eos().part(end=True).eos().device()
    out, into = SourceProxy(folder / "a", window_log=20), TargetProxy(folder / "b")
    some = [*out.feed(begin.data), *out.flush()]
    given_out = b"".join(piece for batch in some for piece in into.feed(batch.data))
    numbers = np.array([page for page, _ in early], np.int64)
    ahead = out.ahead("ram0", numbers, rows([page_of(100 + value) for _, value in early]))
    assert all(batch.raw_bytes == 0 for batch in ahead)
    assert not [piece for batch in ahead for piece in into.feed(batch.data)]
    assert out.counters.ahead == len(early)
    some = [*out.feed(writer.data[len(begin.data) :]), *out.flush()]
    given_out += b"".join(piece for batch in some for piece in into.feed(batch.data))
    assert given_out == writer.data and into.digest() == out.finish() and into.raw_bytes == len(writer.data)
    if out.mirror is not None and into.mirror is not None:
        everything = np.arange(out.mirror.pages)
        assert out.mirror.get(everything).tobytes() == into.mirror.get(everything).tobytes()


def test_what_went_ahead_is_the_same_when_the_stream_comes_to_it(tmp_path: Path) -> None:
    blocks = {"ram0": 200 * PAGE}
    begin = Writer(blocks=blocks).begin()
    writer = Writer(blocks=blocks).begin().part()
    for page in range(200):
        writer.page("ram0", page, page_of(page + 1))
    writer.eos()
    out, into = SourceProxy(tmp_path / "a", window_log=20), TargetProxy(tmp_path / "b")
    assert out.ahead("ram0", np.arange(2), rows([page_of(1), page_of(2)])) == [], "memory has no names yet"
    first = [*out.feed(begin.data), *out.flush()]
    ahead = out.ahead("ram0", np.arange(200), rows([page_of(page + 1) for page in range(200)]))
    rest = [*out.feed(writer.data[len(begin.data) :]), *out.flush()]
    for batch in [*first, *ahead, *rest]:
        into.feed(batch.data)
    assert out.counters.pages["literal"] == 200 == out.counters.pages["same"]
    assert sum(len(batch.data) for batch in rest) < sum(len(batch.data) for batch in ahead) / 10


def test_unflushed_records_must_go_first(tmp_path: Path) -> None:
    blocks = {"ram0": 8 * PAGE}
    out = SourceProxy(tmp_path / "a", window_log=20)
    out.feed(Writer(blocks=blocks).begin().part().page("ram0", 1, page_of(3)).eos().data)
    with pytest.raises(UsageError, match="flush"):
        out.ahead("ram0", np.arange(1), rows([page_of(1)]))


def test_a_flipped_bit_in_a_batch_ahead_is_caught_before_the_mirror_changes(tmp_path: Path) -> None:
    blocks = {"ram0": 8 * PAGE}
    out, into = SourceProxy(tmp_path / "a", window_log=20), TargetProxy(tmp_path / "b")
    for batch in [*out.feed(Writer(blocks=blocks).begin().data), *out.flush()]:
        into.feed(batch.data)
    batches = out.ahead("ram0", np.arange(4), rows([page_of(value) for value in range(1, 5)]))
    assert into.mirror is None or not into.mirror.present.any()
    spoiled = bytearray(batches[-1].data)
    spoiled[20] ^= 1  # in the checksum
    for batch in batches[:-1]:
        into.feed(batch.data)
    with pytest.raises(Corrupt):
        into.feed(bytes(spoiled))
    assert into.mirror is not None and not into.mirror.present.any()
