"""Pages written into the memory of the target's QEMU beside its stream: both together make the guest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.errors import Corrupt, NoRoom, Unsupported
from haulier.memory.base import MemoryBase
from haulier.memory.loading import GuestRam
from haulier.memory.proxy import SourceProxy
from haulier.memory.stream import Pages, StreamParser, Zeros
from haulier.memory.target_proxy import TargetProxy
from tests.support.qemustream import PAGE, Writer, mapped_ram, page_of

BLOCKS = {"ram0": 64 * PAGE, "rom": 4 * PAGE}
GARBAGE = b"firmware".ljust(PAGE, b"!")


def ram_file(folder: Path, garbage: tuple[int, ...] = ()) -> Path:
    path = folder / "ram"
    with path.open("wb") as file:
        file.truncate(BLOCKS["ram0"])
        for page in garbage:
            file.seek(page * PAGE)
            file.write(GARBAGE)
    return path


class Both:
    """A source, and a target beside whose stream pages are loaded; what QEMU was given."""

    def __init__(self, folder: Path, garbage: tuple[int, ...] = (), base: Path | None = None) -> None:
        bases = [MemoryBase.from_mapped_ram(base) if base is not None else None for _ in range(2)]
        self.out = SourceProxy(folder / "a", bases[0], window_log=20)
        self.into = TargetProxy(folder / "b", bases[1])
        self.path = ram_file(folder, garbage)
        self.ram = self.into.ram = GuestRam(self.path, "ram0")
        self.given = b""

    def stream(self, data: bytes) -> None:
        for batch in [*self.out.feed(data), *self.out.flush()]:
            self.given += b"".join(self.into.feed(batch.data))

    def ahead(self, pages: dict[int, bytes]) -> None:
        content = np.frombuffer(b"".join(pages.values()), np.uint8).reshape(-1, PAGE)
        for batch in self.out.ahead("ram0", np.array(list(pages), np.int64), content):
            assert self.into.feed(batch.data) == []

    def memory(self) -> bytes:
        self.into.close()
        return self.path.read_bytes()


def expected(data: bytes, garbage: tuple[int, ...] = ()) -> bytes:
    """The RAM as the stream alone defines it."""
    model = bytearray(BLOCKS["ram0"])
    for page in garbage:
        model[page * PAGE : (page + 1) * PAGE] = GARBAGE
    for token in StreamParser().feed(data):
        if isinstance(token, Pages | Zeros) and token.block == "ram0":
            for number, at in enumerate(token.addresses.tolist()):
                model[at : at + PAGE] = token.pages[number].tobytes() if isinstance(token, Pages) else bytes(PAGE)
    return bytes(model)


records = st.lists(st.tuples(st.integers(0, 63), st.integers(0, 5)), max_size=60)
guesses = st.dictionaries(st.integers(0, 63), st.integers(0, 5), max_size=20)


@given(st.lists(st.tuples(records, guesses), min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_memory_is_what_the_stream_makes_it_whatever_went_ahead(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[list[tuple[int, int]], dict[int, int]]], based: bool
) -> None:
    folder = tmp_path_factory.mktemp("loading")
    base = folder / "golden" if based else None
    if base is not None:
        mapped_ram(base, {"ram0": {page: page_of(page % 6) for page in range(0, 64, 2) if page % 6}}, BLOCKS)
    garbage = (3, 4, 40)
    both = Both(folder, garbage, base)
    writer = Writer(blocks=BLOCKS).begin()
    done = 0
    for real, ahead in rounds:
        writer.part()
        for page, value in real:
            writer.page("ram0", page, page_of(value))
            writer.page("rom", page % 4, page_of(value + 1))
        writer.eos()
        both.stream(writer.data[done:])
        done = len(writer.data)
        if ahead:
            both.ahead({page: page_of(value) for page, value in ahead.items()})
    writer.part(end=True).page("rom", 3, page_of(77)).eos().device(b"devices" * 100)
    both.stream(writer.data[done:])
    assert both.into.digest() == both.out.finish() and both.into.raw_bytes == len(writer.data)
    assert both.memory() == expected(writer.data, garbage)
    parser = StreamParser()
    left = [token for token in parser.feed(both.given) if isinstance(token, Pages | Zeros)]
    assert parser.error is None and parser.device_state and {token.block for token in left} <= {"rom"}
    assert sum(len(token.addresses) for token in left) == 1 + sum(len(real) for real, _ in rounds)


def test_pages_that_are_known_are_not_written_again(tmp_path: Path) -> None:
    both = Both(tmp_path)
    writer = Writer(blocks=BLOCKS).begin().part().page("ram0", 1, page_of(1)).page("ram0", 2, page_of(2)).eos()
    both.stream(writer.data)
    assert both.ram.loaded[:4].tolist() == [False, True, True, False]
    with both.path.open("r+b") as file:
        file.seek(PAGE)
        file.write(GARBAGE)
    done = len(writer.data)
    writer.part().page("ram0", 1, page_of(1)).page("ram0", 2, page_of(9)).eos()
    both.stream(writer.data[done:])
    memory = both.memory()
    assert memory[PAGE : 2 * PAGE] == GARBAGE and memory[2 * PAGE : 3 * PAGE] == page_of(9)


def test_what_overtakes_the_stream_is_no_more_than_a_guess(tmp_path: Path) -> None:
    both = Both(tmp_path)
    writer = Writer(blocks=BLOCKS).begin().part().page("ram0", 1, page_of(1)).page("ram0", 2, page_of(2)).eos()
    both.stream(writer.data)
    both.ahead({1: page_of(7), 2: page_of(8)})
    done = len(writer.data)
    both.stream(writer.part().page("ram0", 1, page_of(7)).eos().data[done:])
    memory = both.memory()
    assert memory[PAGE : 2 * PAGE] == page_of(7), "the guess was right: the stream says that it is the same"
    assert memory[2 * PAGE : 3 * PAGE] == page_of(2), "the guess was old: QEMU has nothing more to send"


def test_zeros_leave_holes(tmp_path: Path) -> None:
    both = Both(tmp_path)
    writer = Writer(blocks=BLOCKS).begin().part()
    for page in range(64):
        writer.page("ram0", page, page_of(0))
    both.stream(writer.eos().data)
    assert both.ram.loaded.all()
    both.into.close()
    assert both.path.stat().st_blocks == 0


def test_a_stream_that_becomes_unknown_is_refused_after_pages_were_loaded(tmp_path: Path) -> None:
    both = Both(tmp_path)
    known = Writer(blocks=BLOCKS).begin().part().page("ram0", 5, page_of(5)).eos()
    both.stream(known.data)
    done = len(known.data)
    known.start("0000:00:03.0/vfio").raw(b"opaque vfio state " * 3000)
    with pytest.raises(Unsupported, match="cannot read"):
        both.stream(known.data[done:])
    assert both.out.opaque


def test_a_stream_unknown_from_its_beginning_goes_to_qemu_whole(tmp_path: Path) -> None:
    both = Both(tmp_path)
    both.stream(b"GET / HTTP/1.1\r\n\r\n" * 100)
    assert both.given == b"GET / HTTP/1.1\r\n\r\n" * 100


def test_a_block_of_another_size_goes_to_qemu_whole(tmp_path: Path) -> None:
    both = Both(tmp_path)
    other = {"ram0": 32 * PAGE, "rom": 4 * PAGE}
    writer = Writer(blocks=other).begin().part().page("ram0", 5, page_of(5)).eos()
    both.stream(writer.data)
    assert both.given == writer.data and both.memory() == bytes(BLOCKS["ram0"])


def test_no_room_for_the_guests_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, at: int) -> int:
        raise OSError(28, "No space left on device")

    both = Both(tmp_path)
    writer = Writer(blocks=BLOCKS).begin().part().page("ram0", 5, page_of(5)).eos()
    some = [*both.out.feed(writer.data), *both.out.flush()]
    pieces = [both.into.take(batch.data) for batch in some]
    monkeypatch.setattr("haulier.memory.pagefile.os.pwrite", full)
    assert pieces[-1] is not None
    with pytest.raises(NoRoom, match="memory of the guest"):
        pieces[-1].load()


@pytest.mark.parametrize("size", [0, PAGE + 1])
def test_a_file_that_is_no_guests_memory(tmp_path: Path, size: int) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(size))
    with pytest.raises(Corrupt, match="whole number"):
        GuestRam(path, "ram0")
