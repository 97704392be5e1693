"""Both proxies back to back: byte-exact, in order, verified before anything is given out; hostile batches."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haulier.compress import xz
from haulier.errors import Corrupt, HaulierError, UsageError
from haulier.memory import proxy as proxies
from haulier.memory.base import MemoryBase
from haulier.memory.proxy import FRESH, OPAQUE, PACKED, PAGES, TABLE, UNREAD, SourceProxy, WireBatch
from haulier.memory.target_proxy import TargetProxy
from tests.memory.finders import Disk
from tests.support.qemustream import PAGE, Writer, changed, mapped_ram, page_of, small

BLOCKS = {"ram0": 64 * PAGE, "rom": 4 * PAGE}


def source(folder: Path, **words: object) -> SourceProxy:
    return SourceProxy(folder / "source.mirror", window_log=20, **words)  # type: ignore[arg-type]


def target(folder: Path, **words: object) -> TargetProxy:
    return TargetProxy(folder / "target.mirror", **words)  # type: ignore[arg-type]


def batches(proxy: SourceProxy, data: bytes, step: int = 1 << 30) -> list[WireBatch]:
    out: list[WireBatch] = []
    for at in range(0, len(data), step):
        out += proxy.feed(data[at : at + step])
    return [*out, *proxy.flush()]


def deliver(proxy: TargetProxy, some: Iterable[WireBatch]) -> bytes:
    return b"".join(piece for batch in some for piece in proxy.feed(batch.data))


def busy(rounds: int = 3, pages: int = 64) -> Writer:
    """A stream in which later rounds change pages a little."""
    writer = Writer(blocks={"ram0": pages * PAGE, "rom": 4 * PAGE}).begin()
    for number in range(rounds):
        writer.part()
        for page in range(0, pages, number + 1):
            content = page_of(page % 11)
            writer.page("ram0", page, changed(content, *range(number)) if page % 11 else content)
        writer.page("rom", 1, page_of(200)).eos()
    return writer.part(end=True).page("ram0", 3, page_of(77)).eos().device(bytes(range(256)) * 500)


@pytest.mark.parametrize("step", [1 << 30, 100_000, 4097, 333])
def test_byte_exact(tmp_path: Path, step: int) -> None:
    writer = busy()
    out, into = source(tmp_path), target(tmp_path)
    assert deliver(into, batches(out, writer.data, step)) == writer.data
    assert out.finish() == into.digest() == blake3(writer.data).digest()
    assert into.raw_bytes == out.counters.raw_bytes == len(writer.data)
    assert out.device_state and out.parser.blocks == BLOCKS
    assert not out.warnings and not out.opaque


def test_the_two_mirrors_end_alike_and_hold_the_guests_memory(tmp_path: Path) -> None:
    writer = busy()
    out, into = source(tmp_path), target(tmp_path)
    deliver(into, batches(out, writer.data))
    out.keep()
    out.close()
    into.keep()
    into.close()
    here, there = MemoryBase.from_mirror(tmp_path / "source.mirror"), MemoryBase.from_mirror(tmp_path / "target.mirror")
    assert here.digest == there.digest
    for (block, page), data in writer.memory.items():
        assert there.view(block)[page].tobytes() == data


def test_what_a_stay_left_behind_is_the_base_of_the_way_back(tmp_path: Path) -> None:
    writer = busy()
    out, into = source(tmp_path), target(tmp_path)
    there = batches(out, writer.data)
    deliver(into, there)
    out.keep()
    out.close()
    into.keep()
    into.close()
    (tmp_path / "back").mkdir()
    ours = MemoryBase.from_mirror(tmp_path / "target.mirror")
    theirs = MemoryBase.from_mirror(tmp_path / "source.mirror")
    back = Writer(blocks=BLOCKS).begin().part()
    for (block, page), data in sorted(writer.memory.items()):
        back.page(block, page, data)
    back.eos().part(end=True).eos().device()
    out, into = source(tmp_path / "back", base=ours), target(tmp_path / "back", base=theirs)
    some = batches(out, back.data)
    assert deliver(into, some) == back.data
    assert set(out.counters.pages) == {"same", "zero"}


def test_with_base_and_disk(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {page: page_of(page % 11) for page in range(64)}, "rom": {}}, BLOCKS)
    disk = Disk(page_of(200), page_of(77))
    writer = busy()

    def base() -> MemoryBase:
        return MemoryBase.from_mapped_ram(tmp_path / "golden")

    out, into = source(tmp_path, base=base(), finder=disk), target(tmp_path, base=base(), reader=disk)
    assert deliver(into, batches(out, writer.data, 5000)) == writer.data
    assert out.counters.pages["block"] >= 2 and out.counters.pages["same"] > 40 and out.counters.pages["xor"] > 20
    assert "literal" not in out.counters.pages


@pytest.mark.parametrize("early", ["both", "source", "target"])
def test_mirrors_made_before_the_stream_are_those_it_gets(tmp_path: Path, early: str) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {page: page_of(page % 11) for page in range(64)}, "rom": {}}, BLOCKS)
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    out, into = source(tmp_path, base=base), target(tmp_path, base=base)
    made = out.prepare() if early != "target" else None
    if early != "source":
        into.prepare()
    writer = busy()
    assert deliver(into, batches(out, writer.data, 5000)) == writer.data
    assert early == "target" or out.mirror is made
    assert out.counters.pages["same"] > 40
    assert out.mirror is not None and into.mirror is not None
    assert (out.mirror.view == into.mirror.view).all() and out.mirror.view.any()


def test_a_mirror_made_early_of_other_memory_is_not_used(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {1: page_of(1)}, "rom": {}}, {"rom": 4 * PAGE, "ram0": 64 * PAGE})
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    out, into = source(tmp_path, base=base), target(tmp_path, base=base)
    made = out.prepare()
    into.prepare()
    writer = busy()
    assert deliver(into, batches(out, writer.data)) == writer.data
    assert made is not None and out.mirror is not made and out.mirror is not None
    assert list(out.mirror.blocks) == list(BLOCKS)


def test_nothing_is_made_early_without_a_base(tmp_path: Path) -> None:
    assert source(tmp_path).prepare() is None
    assert not (tmp_path / "source.mirror").exists()


def test_base_elsewhere(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {page: page_of(page + 1) for page in range(64)}, "rom": {}}, BLOCKS)
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    writer = Writer().begin().part()
    for page in range(20):
        writer.page("ram0", page, page_of(40 - page))
    for elsewhere, kind in ((False, "literal"), (True, "base")):
        out, into = source(tmp_path, base=base, elsewhere=elsewhere), target(tmp_path, base=base)
        assert deliver(into, batches(out, writer.eos().data)) == writer.data
        assert out.counters.pages[kind] == 20


def test_other_bases_are_noticed_before_a_byte_is_given_out(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "one", {"ram0": {3: page_of(1)}, "rom": {}}, BLOCKS)
    mapped_ram(tmp_path / "two", {"ram0": {3: page_of(2)}, "rom": {}}, BLOCKS)
    out = source(tmp_path, base=MemoryBase.from_mapped_ram(tmp_path / "one"))
    into = target(tmp_path, base=MemoryBase.from_mapped_ram(tmp_path / "two"))
    given_out = deliver(into, batches(out, Writer().begin().data))
    with pytest.raises(Corrupt, match="same base"):
        deliver(into, batches(out, Writer().part().page("ram0", 3, page_of(1)).eos().data))
    assert given_out == Writer().begin().data and into.raw_bytes == len(given_out)
    assert into.mirror is not None and into.mirror.get(np.array([3])).tobytes() == page_of(2)
    with pytest.raises(Corrupt, match="failed before"):
        into.feed(b"")


def test_batches_are_bounded_and_carry_what_they_say(tmp_path: Path) -> None:
    writer = Writer(blocks={"ram0": 4096 * PAGE}).begin().part()
    for page in range(1500):
        writer.page("ram0", page, page_of(page % 9))
    writer.eos().part(end=True).eos().device(os.urandom(1 << 20))
    some = batches(source(tmp_path), writer.data, 1 << 20)
    assert max(batch.raw_bytes for batch in some) <= 512 << 10
    assert sum(batch.raw_bytes for batch in some) == len(writer.data)
    assert [batch.raw_bytes == 0 for batch in some] == [batch.data[0] == TABLE for batch in some]
    assert {batch.data[0] for batch in some} == {OPAQUE, TABLE, PAGES}


def test_smaller_batches_for_slow_links(tmp_path: Path) -> None:
    writer = busy()
    out, into = source(tmp_path, batch_bytes=16384), target(tmp_path)
    some = batches(out, writer.data)
    assert max(batch.raw_bytes for batch in some) <= 16384
    assert deliver(into, some) == writer.data
    with pytest.raises(UsageError):
        source(tmp_path, batch_bytes=100)


def test_flush_leaves_only_an_incomplete_record(tmp_path: Path) -> None:
    out, into = source(tmp_path), target(tmp_path)
    data = Writer().begin().part().page("ram0", 1, page_of(1)).page("ram0", 2, page_of(2)).data
    deliver(into, batches(out, data[:-1]))
    assert out.unsent == 8 + PAGE - 1
    assert deliver(into, batches(out, data[-1:])) == data[-8 - PAGE :]
    assert out.unsent == 0 and out.flush() == []


def test_a_stream_that_ends_within_a_record(tmp_path: Path) -> None:
    out = source(tmp_path)
    batches(out, Writer().begin().part().page("ram0", 1, page_of(1)).data[:-1])
    with pytest.raises(Corrupt, match="into a record"):
        out.finish()


def test_finish_before_flush_is_a_mistake(tmp_path: Path) -> None:
    out = source(tmp_path)
    out.feed(small().data)
    with pytest.raises(UsageError, match="flush"):
        out.finish()


def test_an_empty_stream(tmp_path: Path) -> None:
    out, into = source(tmp_path), target(tmp_path)
    assert out.feed(b"") == [] and out.flush() == []
    assert out.finish() == into.digest() == blake3().digest()
    out.keep()
    out.close()
    into.keep()
    into.close()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n" * 1000, os.urandom(1_500_000), b"x"])
def test_an_unknown_stream_goes_compressed_with_a_warning(tmp_path: Path, data: bytes) -> None:
    data = data if len(data) > 8 else data * 8
    out, into = source(tmp_path), target(tmp_path)
    some = batches(out, data, 70_000)
    assert deliver(into, some) == data
    assert out.finish() == into.digest()
    assert out.opaque and len(out.warnings) == 1 and "compressed only" in out.warnings[0]
    assert {batch.data[0] for batch in some} == {UNREAD}
    assert max(batch.raw_bytes for batch in some) <= 512 << 10


@pytest.mark.parametrize("step", [1 << 30, 5000, 97])
def test_a_stream_that_becomes_unknown_goes_on_without_loss(tmp_path: Path, step: int) -> None:
    known = Writer(blocks=BLOCKS).begin().part().page("ram0", 5, page_of(5)).page("ram0", 6, page_of(0)).eos()
    known.start("0000:00:03.0/vfio").raw(b"opaque vfio state " * 3000)
    out, into = source(tmp_path), target(tmp_path)
    assert deliver(into, batches(out, known.data, step)) == known.data
    assert out.finish() == into.digest()
    assert "vfio" in out.warnings[0]


def test_counters_add_up(tmp_path: Path) -> None:
    writer = busy()
    out = source(tmp_path)
    some = batches(out, writer.data, 3000)
    counters = out.counters
    assert sum(counters.raw.values()) == counters.raw_bytes == len(writer.data)
    assert counters.wire_bytes == sum(len(batch.data) for batch in some)
    assert sum(counters.wire.values()) == pytest.approx(counters.wire_bytes)
    assert counters.batches == len(some)
    facts = counters.as_dict()
    assert facts["raw_bytes"] == counters.raw_bytes and isinstance(facts["wire"], dict)


# Hostile batches.


@pytest.fixture
def sent(tmp_path: Path) -> list[bytes]:
    out = source(tmp_path)
    some = batches(out, Writer().begin().data)
    some += batches(out, Writer().part().page("ram0", 3, page_of(1)).page("ram0", 4, page_of(2)).eos().data)
    assert [batch.data[0] for batch in some] == [TABLE, OPAQUE, PAGES]
    return [batch.data for batch in some]


def test_batches_out_of_order(tmp_path: Path, sent: list[bytes]) -> None:
    into = target(tmp_path)
    with pytest.raises(Corrupt, match="was due"):
        into.feed(sent[1])
    into = target(tmp_path)
    into.feed(sent[0])
    with pytest.raises(Corrupt, match="was due"):
        into.feed(sent[0])


HEAD = struct.Struct("<BIII16s")


def rewritten(batch: bytes, **fields: int | bytes) -> bytes:
    values = dict(zip(("kind", "sequence", "raw", "plain", "checksum"), HEAD.unpack_from(batch), strict=True)) | fields
    return HEAD.pack(*values.values()) + batch[HEAD.size :]


@pytest.mark.parametrize(
    "fields",
    [
        {"checksum": bytes(16)},
        {"raw": 1},
        {"raw": 1 << 31},
        {"plain": 1},
        {"plain": (1 << 32) - 1},
        {"kind": 0},
        {"kind": OPAQUE},
        {"kind": TABLE},
    ],
)
def test_headers_that_lie(tmp_path: Path, sent: list[bytes], fields: dict[str, int | bytes]) -> None:
    into = target(tmp_path)
    *first, last = sent
    for batch in first:
        into.feed(batch)
    given_out = into.raw_bytes
    with pytest.raises(Corrupt):
        into.feed(rewritten(last, **fields))
    assert into.raw_bytes == given_out


def test_an_opaque_batch_with_another_checksum(tmp_path: Path) -> None:
    (batch,) = batches(source(tmp_path), b"not a migration stream")
    with pytest.raises(Corrupt, match="checksum"):
        target(tmp_path).feed(rewritten(batch.data, checksum=bytes(16)))


def test_announcements_beyond_the_bounds_are_refused_at_once(tmp_path: Path) -> None:
    for raw, plain in (((1 << 20) + 1, 10), (10, (1 << 20) + 21)):
        with pytest.raises(Corrupt, match="too much"):
            target(tmp_path).feed(HEAD.pack(PAGES, 0, raw, plain, bytes(16)))


def test_pages_before_a_table(tmp_path: Path, sent: list[bytes]) -> None:
    pages = rewritten(sent[-1], sequence=0)
    with pytest.raises(Corrupt):
        target(tmp_path).feed(pages)


def table(blocks: bytes, sequence: int = 0) -> bytes:
    return HEAD.pack(TABLE, sequence, 0, len(blocks), bytes(16)) + blocks


def test_tables(tmp_path: Path) -> None:
    one = b"\x04ram0" + struct.pack(">Q", 16 * PAGE)
    into = target(tmp_path, max_memory=16 * PAGE)
    assert into.feed(table(one)) == []
    with pytest.raises(Corrupt, match="twice"):
        into.feed(table(one, 1))
    huge = b"\x04ram0" + struct.pack(">Q", 17 * PAGE)
    for bad in (
        b"",
        b"\x04ra",
        one + one,
        huge,
        b"\x04ram0" + struct.pack(">Q", 1 << 60),
        b"\x00" + bytes(8),
        one[:-1],
    ):
        with pytest.raises(Corrupt):
            target(tmp_path, max_memory=16 * PAGE).feed(table(bad))


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=5), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_batches_never_give_out_wrong_bytes(tmp_path: Path, at: int, value: bytes, cut: bool) -> None:
    out, into = source(tmp_path), target(tmp_path)
    data = small().data
    some = [batch.data for batch in batches(out, data, 9000)]
    which = at % len(some)
    place = at % len(some[which])
    some[which] = some[which][:place] + (b"" if cut else value + some[which][place + len(value) :])
    given_out = b""
    for batch in some:
        try:
            given_out += b"".join(into.feed(batch))
        except HaulierError:
            break
    assert data.startswith(given_out)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise(tmp_path: Path, noise: bytes) -> None:
    with pytest.raises(Corrupt):
        target(tmp_path).feed(noise)


def test_noise_with_a_good_header(tmp_path: Path) -> None:
    for kind in (OPAQUE, PAGES):
        with pytest.raises(Corrupt):
            target(tmp_path).feed(HEAD.pack(kind, 0, 100, 100, bytes(16)) + b"noise" * 10)


def test_the_level_may_change_between_any_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "LEAST_PACKED", 100)
    writer = busy(5)
    out, into = source(tmp_path, level=1), target(tmp_path)
    levels = [9, 9, 1, 22, 1, -5, 20, 26, 15]
    given = b""
    fresh = packed = 0
    presets = set()
    for number, at in enumerate(range(0, len(writer.data), 60_000)):
        some = batches(out, writer.data[at : at + 60_000])
        fresh += sum(bool(batch.data[0] & FRESH) for batch in some)
        packed += sum(bool(batch.data[0] & PACKED) for batch in some)
        given += deliver(into, some)
        presets |= {out._packer.level} if out._packer is not None else set()
        out.set_level(levels[number % len(levels)])
    assert presets == {20, 22, 26}
    assert given == writer.data and out.finish() == into.digest()
    assert fresh >= 3 and packed >= 2
    assert out.counters.plain_bytes > 0


def test_small_batches_go_through_zstd_which_knows_what_went_before(tmp_path: Path) -> None:
    out, into = source(tmp_path, level=22, recent=True), target(tmp_path)
    pages = np.random.default_rng(3).integers(0, 9, (32, PAGE), np.uint8)
    some = out.name({"ram0": 64 * PAGE})
    for first, count in ((0, 2), (2, 30), (32, 1)):
        some += out.ahead("ram0", np.arange(first, first + count), pages[:count] + np.uint8(first))
    assert deliver(into, some) == b""
    assert [batch.data[0] & PACKED for batch in some] == [0, 0, PACKED, 0]
    assert [len(data) >= proxies.LEAST_TRIED for data in out.recent] == [True]


def test_a_stream_may_begin_with_xz_and_zstd_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxies, "LEAST_PACKED", 100)
    writer = busy(5)
    out, into = source(tmp_path, level=22), target(tmp_path)
    given, kinds = b"", []
    for number, at in enumerate(range(0, len(writer.data), 60_000)):
        out.set_level([22, 5, 20, 5][number % 4])
        some = batches(out, writer.data[at : at + 60_000])
        kinds += [batch.data[0] & (FRESH | PACKED) for batch in some if batch.data[0] != TABLE]
        given += deliver(into, some)
    assert given == writer.data and out.finish() == into.digest()
    assert kinds.count(FRESH) == 1 and PACKED in kinds and 0 in kinds


def test_an_xz_batch_that_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(4).bytes(101)
    whole = [xz.Packer(22).pack(noise[:size]) for size in (99, 100, 101)]
    for contents in (b"noise" * 10, whole[0], whole[1][:-9], whole[2]):
        with pytest.raises(Corrupt):
            target(tmp_path).feed(HEAD.pack(OPAQUE | PACKED, 0, 100, 100, bytes(16)) + contents)


def test_the_cpu_time_of_compression_is_counted_by_the_clock_that_was_given(tmp_path: Path) -> None:
    ticks = iter(range(1 << 20))
    out = source(tmp_path, clock=lambda: float(next(ticks)))
    some = batches(out, busy().data)
    assert out.counters.compress_s == len([batch for batch in some if batch.data[0] != TABLE])


def test_pages_may_come_without_any_stream(tmp_path: Path) -> None:
    out, into = source(tmp_path), target(tmp_path)
    pages = np.stack([np.frombuffer(page_of(number), np.uint8) for number in (3, 5)])
    some = [*out.name({"ram0": 64 * PAGE}), *out.ahead("ram0", np.array([7, 9]), pages)]
    assert deliver(into, some) == b""
    assert into.mirror is not None and (into.mirror.get(np.array([7, 9])) == pages).all()
    assert out.ahead("rom", np.array([0]), pages[:1]) == []
    with pytest.raises(UsageError, match="named"):
        out.name({"ram0": 64 * PAGE})
