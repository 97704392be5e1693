"""The parser against streams written by hand: byte-exact for every split, clear refusals, bounded, never lost bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.errors import Corrupt, HaulierError, Unsupported
from haulier.memory.stream import Mark, Pages, Raw, StreamParser, Token, Zeros, rebuild, rebuild_all
from tests.support.qemustream import EOS, PAGE, Writer, changed, page_of, small

HELD_BACK = 128 << 10


def parse(data: bytes, *cuts: int) -> tuple[StreamParser, list[Token]]:
    parser, tokens = StreamParser(), []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        tokens += parser.feed(data[start:end])
    return parser, tokens


def memory_of(tokens: list[Token]) -> dict[tuple[str, int], bytes]:
    """What a target's memory would hold: the oracle's own reading of tokens."""
    memory = {}
    for token in tokens:
        if isinstance(token, Pages):
            for address, page in zip(token.addresses.tolist(), token.pages, strict=True):
                memory[token.block, address // PAGE] = page.tobytes()
        elif isinstance(token, Zeros):
            for address in token.addresses.tolist():
                memory[token.block, address // PAGE] = bytes(PAGE)
    return memory


def kinds(tokens: list[Token]) -> list[str]:
    return [token.kind for token in tokens if isinstance(token, Mark)]


def test_tokens_rebuild_the_stream_and_hold_its_pages() -> None:
    writer = small()
    parser, tokens = parse(writer.data)
    assert b"".join(rebuild(token) for token in tokens) == writer.data
    assert rebuild_all(tokens) == writer.data
    assert memory_of(tokens) == writer.memory
    assert parser.pending == b""


def test_what_the_parser_learned() -> None:
    parser, tokens = parse(small().data)
    assert parser.blocks == {"ram0": 64 * PAGE, "rom": 4 * PAGE}
    assert list(parser.blocks) == ["ram0", "rom"]
    assert parser.machine == "pc-q35-10.0"
    assert parser.ready and parser.device_state and parser.switchover and not parser.postcopy
    assert parser.sections == 4
    assert kinds(tokens) == ["setup", "part", "part", "end", "device"]


@pytest.mark.parametrize("step", [1, 7, 8, 9, 4095, 4103, 4104, 4105, 10007])
def test_any_piece_size_rebuilds(step: int) -> None:
    writer = small()
    parser, tokens = parse(writer.data, *range(step, len(writer.data), step))
    assert rebuild_all(tokens) == writer.data
    assert memory_of(tokens) == writer.memory
    assert parser.pending == b""


def test_every_single_cut_rebuilds() -> None:
    writer = Writer().begin().part().page("ram0", 3, page_of(0)).page("ram0", 4, page_of(5)).page("rom", 0, page_of(6))
    writer.eos().command(11).part(end=True).page("rom", 0, page_of(0)).eos().device()
    data = writer.data
    for cut in range(1, len(data)):
        _parser, tokens = parse(data, cut)
        assert rebuild_all(tokens) == data, cut
        assert memory_of(tokens) == writer.memory


def test_nothing_but_an_incomplete_record_is_held_back() -> None:
    data = small().data
    parser, given_out = StreamParser(), 0
    for at in range(0, len(data), 100):
        given_out += sum(token.size for token in parser.feed(data[at : at + 100]))
        assert given_out + len(parser.pending) == min(at + 100, len(data))
        assert len(parser.pending) < 8 + 1 + 255 + PAGE


def test_long_runs_are_cut_and_sizes_add_up() -> None:
    writer = Writer(blocks={"ram0": 100_000 * PAGE}).begin().part()
    for page in range(200):
        writer.page("ram0", page, page_of(page + 1))
    for page in range(50_000):
        writer.page("ram0", 1000 + page, page_of(0))
    writer.eos()
    _, tokens = parse(writer.data)
    assert max(len(token.pages) for token in tokens if isinstance(token, Pages)) == 63
    assert max(len(token.addresses) for token in tokens if isinstance(token, Zeros)) > 29_000
    assert max(token.size for token in tokens) <= 257 << 10
    assert sum(token.size for token in tokens) == len(writer.data)
    assert rebuild_all(tokens) == writer.data


def test_rounds_are_counted_by_the_scan_starting_again() -> None:
    writer = Writer().begin()
    for _ in range(3):
        for page in (1, 5, 9):
            writer.part().page("ram0", page, page_of(page)).eos()
    parser, _ = parse(writer.data)
    assert parser.rounds == 3


def test_streams_without_footers() -> None:
    writer = Writer(footers=False).begin().part().page("ram0", 1, page_of(1)).eos().part(end=True).eos().device()
    _, tokens = parse(writer.data, *range(1, len(writer.data)))
    assert rebuild_all(tokens) == writer.data


def test_a_record_may_name_its_block_again() -> None:
    writer = Writer().begin().part()
    for page in range(12):
        writer.page("ram0", page, page_of(page), named=page % 2 == 0)
    _parser, tokens = parse(writer.eos().data)
    assert rebuild_all(tokens) == writer.data


def test_post_copy() -> None:
    advise = struct.pack(">QQ", PAGE, PAGE)
    package = b"\x08" + struct.pack(">HH", 4, 0) + b"\x04 looks like a device " * 500
    writer = Writer().magic().configuration().command(1).command(2, bytes(4)).command(3, advise).start().sizes().eos()
    writer.part().page("ram0", 1, page_of(1)).page("ram0", 2, page_of(2)).eos()
    writer.command(6, b"\x00\x04ram0\x00" + struct.pack(">QQ", PAGE, PAGE))
    writer.command(7, struct.pack(">I", len(package))).raw(package)
    writer.part().page("ram0", 2, page_of(8)).page("ram0", 60, page_of(0)).eos()
    writer.part(end=True).eos().raw(b"\0")
    for step in (1, 333, 1 << 20):
        parser, tokens = parse(writer.data, *range(step, len(writer.data), step))
        assert rebuild_all(tokens) == writer.data
        assert memory_of(tokens) == writer.memory
        assert parser.postcopy and parser.device_state and parser.packaged
        assert kinds(tokens) == ["setup", "part", "device", "package", "part", "end"]
    assert parser.ids == [3]


def test_post_copy_that_broke_goes_on_without_a_beginning() -> None:
    writer = Writer().command(10, b"\x04ram0").command(10, b"\x03rom").command(9).command(2, bytes(4))
    writer.part().page("ram0", 2, page_of(8), named=True).page("ram0", 60, page_of(0)).eos()
    writer.part(end=True).eos().raw(b"\0")
    parser = StreamParser(blocks={"ram0": 64 * PAGE, "rom": 4 * PAGE}, ids=[3])
    tokens = [token for at in range(0, len(writer.data), 777) for token in parser.feed(writer.data[at : at + 777])]
    assert rebuild_all(tokens) == writer.data
    assert memory_of(tokens) == writer.memory and parser.device_state
    with pytest.raises(Corrupt, match="section 3"):
        StreamParser(blocks={"ram0": 64 * PAGE, "rom": 4 * PAGE}, ids=[4]).feed(writer.data)


def test_a_connection_for_urgent_pages_has_nothing_but_records() -> None:
    writer = Writer(footers=False)
    for page in (3, 9, 4):
        writer.page("ram0", page, page_of(page), named=True)
    writer.eos().page("rom", 1, page_of(0), named=True).eos()
    parser = StreamParser(blocks={"ram0": 64 * PAGE, "rom": 4 * PAGE}, bare=True)
    tokens = [token for at in range(0, len(writer.data), 999) for token in parser.feed(writer.data[at : at + 999])]
    assert rebuild_all(tokens) == writer.data and memory_of(tokens) == writer.memory
    with pytest.raises(Corrupt):
        parser.feed(b"\x02\0\0\0\1 is a section")


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (1, b"\0"),
        (2, bytes(5)),
        (4, b"\0"),
        (5, b"\0"),
        (6, b"\0"),
        (6, b"\x01\x04ram0\x00" + bytes(16)),
        (6, b"\x00\x04ram0\x00" + struct.pack(">QQ", 60 * PAGE, 5 * PAGE)),
        (6, b"\x00\x04ram0\x00" + struct.pack(">QQ", 5, PAGE)),
        (6, b"\x00\x04ram9\x00" + struct.pack(">QQ", 0, PAGE)),
        (7, struct.pack(">I", (1 << 30) + 1)),
        (9, b"\0"),
        (10, b"\x04ram9"),
        (10, b"\x05ram0"),
    ],
)
def test_commands_are_checked(number: int, data: bytes) -> None:
    writer = Writer().begin().command(number, data)
    with pytest.raises(Corrupt):
        parse(writer.data)


def test_after_the_device_state_begins_everything_is_verbatim() -> None:
    tail = b"\x02\x00\x00\x00\x03" + struct.pack(">Q", 0x08 | PAGE) + b"\x04ram0" + page_of(3)
    writer = Writer().begin().part(end=True).eos().device(tail)
    _, tokens = parse(writer.data)
    assert not any(isinstance(token, Pages) for token in tokens)
    assert rebuild_all(tokens) == writer.data


def test_a_second_table_alike_is_taken_and_another_one_refused() -> None:
    writer = Writer().begin().start().sizes().eos()
    parse(writer.data)
    writer.blocks = {"ram0": 65 * PAGE, "rom": 4 * PAGE}
    with pytest.raises(Unsupported, match="layout"):
        parse(writer.start().sizes().data)


UNSUPPORTED = {
    "vfio": Writer().begin().start("0000:00:02.0/vfio"),
    "dirty-bitmap": Writer().begin().start("dirty-bitmap"),
    "ram version": Writer().magic().configuration().start(version=5),
    "stream version": Writer().raw(struct.pack(">II", 0x5145564D, 4)),
    "x-ignore-shared": Writer(capabilities=("x-ignore-shared",)).magic().configuration().start(),
    "mapped-ram": Writer(capabilities=("mapped-ram",)).magic().configuration().start(),
    "xbzrle": Writer().begin().part().raw(struct.pack(">Q", 0x40 | 0x20)),
    "compress": Writer().begin().part().raw(struct.pack(">Q", 0x100)),
    "multifd": Writer().begin().part().raw(struct.pack(">Q", 0x200)),
    "rdma": Writer().begin().part().raw(struct.pack(">Q", 0x80)),
    "huge pages": Writer().magic().configuration().command(3, struct.pack(">QQ", PAGE | 0x200000, PAGE)),
    "early device state": Writer().begin().part().eos().device(),
    "unknown configuration": Writer().magic().configuration().raw(b"\x05\x04what" + bytes(4)),
    "fill byte": Writer().begin().part().raw(struct.pack(">Q", 0x02) + b"\x04ram0\x01"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported(what: str) -> None:
    with pytest.raises(Unsupported):
        parse(UNSUPPORTED[what].data)


CORRUPT = {
    "magic": Writer().raw(b"GET / HTTP/1.1\r\n"),
    "machine name too long": Writer().magic().raw(b"\x07" + struct.pack(">I", 1 << 30)),
    "machine name unprintable": Writer().magic().raw(b"\x07" + struct.pack(">I", 2) + b"\x00\x01"),
    "section type": Writer().begin().raw(b"\x55"),
    "part never started": Writer().begin().raw(b"\x02" + struct.pack(">I", 77)),
    "unknown block": Writer().begin().part().raw(struct.pack(">Q", 0x08) + b"\x04what" + page_of(1)),
    "unknown flags": Writer().begin().part().raw(struct.pack(">Q", 0x801)),
    "page beyond block": Writer().begin().part().page("rom", 4, page_of(1)),
    "zero page beyond block": Writer().begin().part().page("rom", 4, page_of(0)),
    "far beyond": Writer().begin().part().raw(struct.pack(">Q", (1 << 63) | 0x08) + b"\x04ram0" + page_of(1)),
    "page before any block": Writer().begin().part().page("ram0", 1, page_of(1), named=False),
    "block of no length": Writer(blocks={"ram0": PAGE, "none": 0, "more": PAGE}).begin(),
    "block of odd length": Writer(blocks={"ram0": PAGE + 1})
    .magic()
    .configuration()
    .start()
    .raw(struct.pack(">Q", PAGE | 4) + b"\x04ram0" + struct.pack(">Q", PAGE + 1)),
    "table does not add up": Writer()
    .magic()
    .configuration()
    .start()
    .raw(struct.pack(">Q", PAGE | 4) + b"\x04ram0" + struct.pack(">Q", 2 * PAGE)),
    "package length": Writer().begin().command(7, b"\x00\x00"),
    "too many capabilities": Writer()
    .magic()
    .configuration()
    .raw(b"\x05\x0ccapabilities" + struct.pack(">II", 1, 1 << 31)),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_corrupt(what: str) -> None:
    with pytest.raises(Corrupt):
        parse(CORRUPT[what].data)


@pytest.mark.parametrize("what", [*UNSUPPORTED, *CORRUPT])
@pytest.mark.parametrize("step", [1, 500, 1 << 20])
def test_a_refused_stream_loses_no_byte(what: str, step: int) -> None:
    data = {**UNSUPPORTED, **CORRUPT}[what].data + EOS + b"more"
    parser, rebuilt = StreamParser(), b""
    for at in range(0, len(data), step):
        try:
            rebuilt += rebuild_all(parser.feed(data[at : at + step]))
        except HaulierError:
            assert rebuilt + parser.pending == data[: at + step]
            with pytest.raises(type(parser.error)):  # type: ignore[arg-type]
                parser.feed(b"x")
            return
    pytest.fail("not refused")


records = st.tuples(
    st.sampled_from(["ram0", "rom"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
    st.integers(1, 12),
)
sections = st.lists(records, max_size=6)


@st.composite
def streams(draw: st.DrawFn) -> Writer:
    writer = Writer(blocks={"ram0": 16 * PAGE, "rom": 16 * PAGE}, footers=draw(st.booleans())).begin()
    for section in draw(st.lists(sections, max_size=4)):
        writer.part()
        for block, page, value, named, run in section:
            for number in range(run):
                content = page_of(value) if value < 3 else changed(page_of(2), number)
                writer.page(block, page + number, content, named=True if named and not number else None)
        writer.eos()
        if draw(st.booleans()):
            known = [(1, b""), (2, b"ping"), (6, b"\0\4ram0\0" + struct.pack(">QQ", 0, PAGE)), (11, b"")]
            writer.command(*draw(st.sampled_from(known) | st.tuples(st.just(99), st.binary(max_size=40))))
    return writer.part(end=True).eos().device(draw(st.binary(max_size=200)))


@given(streams(), st.data())
@settings(max_examples=80, deadline=None)
def test_any_stream_in_any_pieces(writer: Writer, data: st.DataObject) -> None:
    stream = writer.data
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    _parser, tokens = parse(stream, *cuts)
    assert rebuild_all(tokens) == stream
    assert memory_of(tokens) == writer.memory


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_nonsense_is_refused_or_carried_but_never_lost_or_kept(noise: bytes, at: int, section: int) -> None:
    good = Writer().begin().part().page("ram0", 1, page_of(1)).data
    start = min(at, len(good)) if section else 8
    data = good[:start] + noise + (good[start + len(noise) :] if section > 1 else b"") + bytes(PAGE) * 4
    parser, rebuilt = StreamParser(), b""
    for piece in (data[:start], data[start:]):
        try:
            rebuilt += rebuild_all(parser.feed(piece))
        except (Corrupt, Unsupported):
            break
        assert len(parser.pending) <= HELD_BACK
    assert data.startswith(rebuilt + parser.pending)


def test_pages_are_views_and_read_only() -> None:
    _, tokens = parse(Writer().begin().part().page("ram0", 1, page_of(1)).eos().data)
    (token,) = [token for token in tokens if isinstance(token, Pages)]
    assert token.addresses.dtype == np.uint64 and token.pages.shape == (1, PAGE)
    with pytest.raises(ValueError, match="read-only"):
        token.pages[0, 0] = 1


def test_a_mark_stands_for_no_bytes() -> None:
    assert rebuild(Mark("part")) == b"" and Raw(b"ab").size == 2
