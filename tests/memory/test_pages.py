"""The page codec: every kind, batches with one page twice, agreement of the two mirrors, malformed columns."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haulier.errors import Corrupt, HaulierError
from haulier.memory import varint
from haulier.memory.base import MemoryBase
from haulier.memory.elsewhere import BasePages
from haulier.memory.mirror import Mirror
from haulier.memory.pages import COLUMNS, Decoded, Encoded, PageDecoder, PageEncoder
from haulier.memory.stream import Pages, Raw, StreamParser, Token, Zeros, rebuild_all
from tests.memory.finders import Disk
from tests.support.qemustream import PAGE, Writer, changed, mapped_ram, page_of

BLOCKS = {"ram0": 64 * PAGE, "rom": 4 * PAGE}


def pages(block: str, first: int, *contents: bytes, named: bool = False) -> Pages:
    addresses = (np.arange(len(contents), dtype=np.uint64) + np.uint64(first)) * np.uint64(PAGE)
    return Pages(block, named, addresses, np.frombuffer(b"".join(contents), np.uint8).reshape(-1, PAGE))


def zeros(block: str, *numbers: int, named: bool = False) -> Zeros:
    return Zeros(block, named, np.array(numbers, np.uint64) * np.uint64(PAGE))


class Pair:
    """An encoder and a decoder with a mirror each."""

    def __init__(self, folder: Path, base: MemoryBase | None = None, disk: Disk | None = None, elsewhere: bool = False):
        found = BasePages(base) if base is not None else None
        self.encoder = PageEncoder(Mirror.create(folder / "a", BLOCKS, base), disk, found if elsewhere else None)
        self.decoder = PageDecoder(Mirror.create(folder / "b", BLOCKS, base), disk, found)

    def send(self, *tokens: Token) -> Encoded:
        """Through the codec; fails unless the bytes and both mirrors agree."""
        batch = self.encoder.encode(tokens)
        payload = b"".join(batch.parts)
        assert len(payload) == batch.size
        raw = rebuild_all(tokens)
        decoded = self.decoder.decode(payload, len(raw))
        assert decoded.raw == raw
        self.decoder.apply(decoded)
        everything = np.arange(self.encoder.mirror.pages)
        assert self.encoder.mirror.get(everything).tobytes() == self.decoder.mirror.get(everything).tobytes()
        return batch


def only(counts: dict[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_literal_then_same_then_xor_then_zero(pair: Pair) -> None:
    one = page_of(1)
    assert only(pair.send(pages("ram0", 3, one)).pages) == {"literal": 1}
    assert only(pair.send(pages("ram0", 3, one)).pages) == {"same": 1}
    batch = pair.send(pages("ram0", 3, changed(one, 0, 100, 511)))
    assert only(batch.pages) == {"xor": 1}
    assert batch.columns["xor"] == 64 + 3 * 8
    assert only(pair.send(zeros("ram0", 3)).pages) == {"zero": 1}
    assert only(pair.send(pages("ram0", 3, one)).pages) == {"literal": 1}


def test_numbers_that_run_on_go_as_differences(pair: Pair) -> None:
    rng = np.random.default_rng(1)
    sums = np.cumsum(rng.integers(0, 256, 2048).astype(np.uint32), dtype=np.uint32)
    batch = pair.send(pages("ram0", 3, page_of(1), sums[:1024].tobytes(), sums[1024:].tobytes(), page_of(2)))
    assert only(batch.pages) == {"literal": 2, "series": 2}
    assert batch.columns["series"] == 2 * PAGE and batch.raw["series"] == 2 * (8 + PAGE)
    assert only(pair.send(pages("ram0", 4, sums[:1024].tobytes(), changed(sums[1024:].tobytes(), 9))).pages) == {
        "same": 1,
        "xor": 1,
    }


def test_half_the_words_decide_between_xor_and_literal(pair: Pair) -> None:
    pair.send(pages("ram0", 0, page_of(1), page_of(2)))
    batch = pair.send(pages("ram0", 0, changed(page_of(1), *range(255)), changed(page_of(2), *range(256))))
    assert only(batch.pages) == {"xor": 1, "literal": 1}


def test_blocks_of_the_disk(tmp_path: Path) -> None:
    disk = Disk(page_of(1), page_of(2), page_of(3))
    pair = Pair(tmp_path, disk=disk)
    batch = pair.send(pages("ram0", 0, page_of(3), page_of(9), page_of(1)), pages("rom", 0, page_of(2)))
    assert only(batch.pages) == {"block": 3, "literal": 1}
    disk.asked = 0
    pair.send(pages("ram0", 0, page_of(3), page_of(9)))
    assert disk.asked == 0, "what is the same is not looked up"
    assert only(pair.send(pages("ram0", 0, changed(page_of(3), 7))).pages) == {"xor": 1}


def test_the_base_at_the_same_address(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {5: page_of(1), 6: page_of(2)}, "rom": {}}, BLOCKS)
    pair = Pair(tmp_path, MemoryBase.from_mapped_ram(tmp_path / "golden"))
    batch = pair.send(pages("ram0", 5, page_of(1), changed(page_of(2), 3), page_of(1)))
    assert only(batch.pages) == {"same": 1, "xor": 1, "literal": 1}


def test_the_base_elsewhere_only_if_asked(tmp_path: Path) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {5: page_of(1)}, "rom": {2: page_of(2)}}, BLOCKS)
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    batch = Pair(tmp_path, base, elsewhere=True).send(pages("ram0", 30, page_of(1), page_of(3), page_of(2)))
    assert only(batch.pages) == {"base": 2, "literal": 1}


def test_raw_and_everything_in_order(pair: Pair) -> None:
    batch = pair.send(
        Raw(b"head"),
        pages("ram0", 1, page_of(1), page_of(2), named=True),
        zeros("ram0", 9, 4, 5),
        pages("ram0", 20, page_of(3)),
        Raw(b"between"),
        zeros("rom", 0, named=True),
        pages("rom", 2, page_of(4)),
        Raw(b"tail"),
    )
    assert only(batch.pages) == {"literal": 4, "zero": 4}
    assert batch.raw["raw"] == 15 + len("_ram0_rom"), "names of blocks count as raw"
    assert batch.raw["zero"] == 36


def test_of_one_page_twice_in_a_batch_the_last_counts(pair: Pair) -> None:
    pair.send(pages("ram0", 1, page_of(1), page_of(2), page_of(3)))
    pair.send(
        pages("ram0", 1, page_of(7), page_of(8), page_of(9)),
        zeros("ram0", 2),
        pages("ram0", 1, page_of(1)),  # back to what the mirror had before the batch
        zeros("ram0", 3),
        pages("ram0", 3, changed(page_of(3), 1)),
    )
    held = pair.encoder.mirror.get(np.array([1, 2, 3])).tobytes()
    assert held == page_of(1) + bytes(PAGE) + changed(page_of(3), 1)
    # Zero, and then what the mirror had before the batch: the zero must not reach the mirror.
    pair.send(zeros("ram0", 1), pages("ram0", 1, page_of(1)))
    assert pair.encoder.mirror.get(np.array([1])).tobytes() == page_of(1)


def test_a_zero_page_sent_as_a_page(pair: Pair) -> None:
    pair.send(pages("ram0", 1, bytes(PAGE)))
    pair.send(pages("ram0", 1, page_of(1)), pages("ram0", 2, bytes(PAGE)))
    pair.send(pages("ram0", 1, bytes(PAGE)))


def test_an_empty_batch(pair: Pair) -> None:
    assert pair.send().size == 40


actions = st.tuples(
    st.sampled_from(["pages", "zeros", "raw"]), st.integers(0, 60), st.integers(1, 4), st.integers(0, 6), st.booleans()
)


@given(st.lists(st.lists(actions, max_size=8), max_size=5))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batches(tmp_path: Path, batches: Sequence[Sequence[tuple[str, int, int, int, bool]]]) -> None:
    mapped_ram(tmp_path / "golden", {"ram0": {page: page_of(page % 5) for page in range(20)}, "rom": {}}, BLOCKS)
    base = MemoryBase.from_mapped_ram(tmp_path / "golden")
    pair = Pair(tmp_path, base, Disk(page_of(1), page_of(4)), elsewhere=True)
    for batch in batches:
        tokens: list[Token] = []
        for what, first, count, value, named in batch:
            if what == "raw":
                tokens.append(Raw(bytes([value]) * count))
            elif what == "zeros":
                tokens.append(zeros("ram0", *range(first, first + count), named=named))
            else:
                some = [changed(page_of(value), k) if k % 2 else page_of(value + k) for k in range(count)]
                tokens.append(pages("ram0", first, *some, named=named))
        pair.send(*tokens)
    base.close()


def test_a_whole_stream_by_its_parser(pair: Pair) -> None:
    writer = Writer(blocks=BLOCKS).begin().part()
    for page in range(64):
        writer.page("ram0", page, page_of(page % 7))
    pair.send(*StreamParser().feed(writer.eos().data))
    for (block, page), data in writer.memory.items():
        assert pair.decoder.mirror.get(np.array([pair.decoder.mirror.first[block] + page])).tobytes() == data


# Malformed payloads, built column by column.


def payload(**columns: bytes) -> bytes:
    parts = [columns.get(name, b"") for name in COLUMNS]
    return struct.pack("<10I", *map(len, parts)) + b"".join(parts)


ONE_PAGE = varint.encode_few([1, 1])
AT_3 = varint.encode_few([6, 0])

MALFORMED = {
    "nothing": (b"", 0),
    "half a header": (bytes(20), 0),
    "columns too short": (struct.pack("<10I", 5, *[0] * 9), 0),
    "columns too long": (payload() + b"x", 0),
    "half an operation": (payload(ops=b"\x01"), 4104),
    "unknown operation": (payload(ops=varint.encode_few([3, 1])), 4104),
    "unknown flag": (payload(ops=varint.encode_few([9, 1])), 4104),
    "named raw": (payload(ops=varint.encode_few([4, 1]), raw=b"x"), 1),
    "empty run": (payload(ops=varint.encode_few([1, 0])), 0),
    "endless run": (payload(ops=varint.encode_few([2, 1 << 34])), 4104),
    "too many operations": (payload(ops=varint.encode_few([0, 1] * 5000), raw=bytes(5000)), 5000),
    "raw longer than its column": (payload(ops=varint.encode_few([0, 5]), raw=b"abc"), 5),
    "raw shorter than its column": (payload(ops=varint.encode_few([0, 2]), raw=b"abc"), 3),
    "no kind": (payload(ops=ONE_PAGE, addresses=AT_3), 4104),
    "unknown kind": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x06"), 4104),
    "no series": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x05"), 4104),
    "short series": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x05", series=bytes(4092)), 4104),
    "series too many": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x00", series=bytes(4096)), 4104),
    "no literal": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x01"), 4104),
    "short literal": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x01", literal=bytes(4095)), 4104),
    "literal too many": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x00", literal=bytes(4096)), 4104),
    "no mask": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x02"), 4104),
    "mask without words": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x02", masks=b"\xff" * 64), 4104),
    "words without mask": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x02", masks=bytes(64), words=bytes(8)), 4104),
    "no block": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x03"), 4104),
    "negative block": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x03", blocks=b"\x01"), 4104),
    "block that is not there": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x03", blocks=b"\x10"), 4104),
    "block beyond all": (
        payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x03", blocks=varint.encode_few([1 << 34])),
        4104,
    ),
    "base without a base": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x04", bases=b"\x00"), 4104),
    "address beyond memory": (payload(ops=ONE_PAGE, addresses=varint.encode_few([68 * 2, 0]), kinds=b"\x00"), 4104),
    "run across blocks": (
        payload(ops=varint.encode_few([1, 2]), addresses=varint.encode_few([63 * 2, 1]), kinds=b"\x00\x00"),
        8208,
    ),
    "other length": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x00"), 4105),
    "shorter than announced": (payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x00"), 9000),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed(what: str, tmp_path: Path) -> None:
    pair = Pair(tmp_path, disk=Disk(page_of(1)))
    pair.send(pages("ram0", 0, *(page_of(value) for value in range(1, 8))))
    before = pair.decoder.mirror.get(np.arange(68)).tobytes()
    data, length = MALFORMED[what]
    with pytest.raises(Corrupt if what != "block that is not there" else HaulierError):
        pair.decoder.decode(data, length)
    assert pair.decoder.mirror.get(np.arange(68)).tobytes() == before


def test_the_handmade_columns_are_right_where_they_should_be(tmp_path: Path) -> None:
    pair = Pair(tmp_path, disk=Disk(page_of(1)))
    good = payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x03", blocks=b"\x00")
    assert pair.decoder.decode(good, 4104).raw == rebuild_all([pages("ram0", 3, page_of(1))])


@given(at=st.integers(0, 250), value=st.binary(min_size=1, max_size=6), length=st.sampled_from([0, -1, 9, 4104]))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_batches_are_refused_or_make_the_announced_length(
    tmp_path: Path, at: int, value: bytes, length: int
) -> None:
    pair = Pair(tmp_path, disk=Disk(page_of(1), page_of(2)))
    tokens = [Raw(b"abc"), pages("ram0", 1, page_of(1), page_of(5), named=True), zeros("ram0", 3, 9), zeros("rom", 1)]
    data = b"".join(pair.encoder.encode(tokens).parts)
    data = data[:at] + value + data[at + len(value) :]
    wanted = len(rebuild_all(tokens)) + length
    try:
        decoded: Decoded = pair.decoder.decode(data, wanted)
    except HaulierError:
        return
    assert len(decoded.raw) == wanted


def test_a_reader_that_gives_too_little_is_noticed(pair: Pair) -> None:
    class Short(Disk):
        def read(self, ids):  # type: ignore[no-untyped-def]
            return super().read(ids)[:0]

    pair.decoder.reader = Short(page_of(1))
    with pytest.raises(Corrupt, match="read as"):
        pair.decoder.decode(payload(ops=ONE_PAGE, addresses=AT_3, kinds=b"\x03", blocks=b"\x00"), 4104)
