"""A dump on its way: comes out as it went in, and nothing that was tampered with does."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from haulier.containers.checkpoint import CheckpointReceiver, CheckpointSender, End, PagesFile, Part, write_pages
from haulier.containers.images import pages_of
from haulier.errors import Corrupt, HaulierError
from haulier.units import PAGE


def dump(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    (folder / "core-1.img").write_bytes(bytes([seed]) * 3000)
    (folder / "files.img").write_bytes(os.urandom(200) + b"x" * 5000)
    (folder / "empty.img").write_bytes(b"")
    (folder / "tmpfs-dev-7.tar.gz.img").write_bytes(os.urandom(9 << 20))
    (folder / "pages-1.img").write_bytes(os.urandom(PAGE))
    (folder / "stats-dump").write_bytes(b"not wanted")
    return folder


def test_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    source = dump(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    sender, receiver = CheckpointSender(), CheckpointReceiver(out, 1000)
    trial = list(sender.files(source, trial=True))
    before = sender.wire_bytes
    real = list(sender.files(source))
    numbers = np.array([5, 6, 7, 900, 2], np.int64)
    last = sender.end(77, [("pages-1.img", numbers, b"d" * 16)])
    for message in [*trial, *real, last]:
        receiver.handle(message)
    names = {"core-1.img", "files.img", "empty.img", "tmpfs-dev-7.tar.gz.img"}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert receiver.end is not None and receiver.end.stream == 77
    ((name, found, digest),) = receiver.pages
    assert (name, found.tolist(), digest) == ("pages-1.img", numbers.tolist(), b"d" * 16)
    assert before > 9 << 20


def test_what_the_trial_had_costs_little(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "files.img").write_bytes(os.urandom(100_000))
    sender = CheckpointSender()
    list(sender.files(source, trial=True))
    before = sender.wire_bytes
    list(sender.files(source))
    assert sender.wire_bytes - before < 2000


def sent(folder: Path) -> tuple[CheckpointSender, list[bytes]]:
    sender = CheckpointSender()
    return sender, list(sender.files(folder))


NAMES = ["../x", "/etc/x", "a/b", "", ".hidden", "pages-1.img", "x" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_elsewhere_are_not_believed(tmp_path: Path, name: str) -> None:
    sender = CheckpointSender()
    good = msgspec.msgpack.decode(sender._part([("good", 3)], b"abc", False), type=Part)
    bad = msgspec.structs.replace(good, names=[(name, 3)])
    with pytest.raises(Corrupt):
        CheckpointReceiver(tmp_path, 10).handle(msgspec.msgpack.encode(bad))
    assert list(tmp_path.iterdir()) == []


def test_a_dump_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    source = dump(tmp_path / "source")
    (tmp_path / "out").mkdir()
    sender, messages = sent(source)
    end = sender.end(0, [])
    receiver = CheckpointReceiver(tmp_path / "out", 10)
    for message in messages[:-1]:
        receiver.handle(message)
    with pytest.raises(Corrupt, match="did not arrive"):
        receiver.handle(end)


def test_pages_beyond_the_picture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    sender, messages = sent(tmp_path / "source")
    end = sender.end(0, [("pages-1.img", np.array([3, 10], np.int64), bytes(16))])
    receiver = CheckpointReceiver(tmp_path, 10)
    for message in messages:
        receiver.handle(message)
    with pytest.raises(Corrupt, match="beyond"):
        receiver.handle(end)


def test_a_file_of_pages_has_a_good_name_and_a_bounded_number(tmp_path: Path) -> None:
    for name, count in (("../pages-1.img", 1), ("core-1.img", 1), ("pages-1.img", 1 << 40)):
        (tmp_path / name.replace("/", "_")).mkdir()
        receiver = CheckpointReceiver(tmp_path, 10)
        sender = CheckpointSender()
        list(sender.files(tmp_path / name.replace("/", "_")))
        end = msgspec.msgpack.decode(sender.end(0, []), type=End)
        bad = msgspec.structs.replace(end, pages=[PagesFile(name, count, b"", bytes(16))])
        with pytest.raises(Corrupt):
            receiver.handle(msgspec.msgpack.encode(bad))


@pytest.mark.parametrize("position", [0, 40, 200, 1000])
def test_a_changed_byte_is_noticed(tmp_path: Path, position: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "files.img").write_bytes(os.urandom(2000))
    sender, messages = sent(source)
    messages.append(sender.end(0, []))
    whole = bytearray(messages[0])
    whole[position] ^= 0x41
    messages[0] = bytes(whole)
    out = tmp_path / "out"
    out.mkdir()
    receiver = CheckpointReceiver(out, 10)
    with pytest.raises(HaulierError):
        for message in messages:
            receiver.handle(message)


def test_pages_are_written_in_the_order_asked_for(tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 255, (50, PAGE), dtype=np.uint8)
    numbers = np.array([3, 4, 5, 9, 8, 49, 0, 1], np.int64)
    digest = write_pages(tmp_path / "pages-1.img", numbers, picture)
    assert (tmp_path / "pages-1.img").read_bytes() == picture[numbers].tobytes()
    assert digest != write_pages(tmp_path / "pages-2.img", numbers[::-1].copy(), picture)


# -- what CRIU writes ------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(**fields: int) -> bytes:
    body = b"".join(varint(int(name[1:]) << 3) + varint(value) for name, value in fields.items())
    return len(body).to_bytes(4, "little") + body


MAGIC = (0x54564319).to_bytes(4, "little") + (0x56084025).to_bytes(4, "little")


def test_page_maps_say_whose_pages_a_file_has(tmp_path: Path) -> None:
    (tmp_path / "pages-7.img").write_bytes(bytes(6 * PAGE))
    entries = (
        message(f1=0x400000, f2=2, f4=4) + message(f1=0x900000, f2=9, f4=0) + message(f1=0x800000, f2=0, f5=1, f4=4)
    )
    (tmp_path / "pagemap-1.img").write_bytes(MAGIC + message(f1=7) + entries)
    (tmp_path / "pagemap-12.img").write_bytes(MAGIC + message(f1=7) + message(f1=0x1000, f2=2, f4=4))
    (tmp_path / "pagemap-shmem-55.img").write_bytes(MAGIC + message(f1=7) + message(f1=0, f2=1, f4=4))
    (one,) = pages_of(tmp_path)
    assert [(key, pages.tolist()) for key, pages in one.stretches] == [
        (("p", 1), [0x400, 0x401, 0x800]),
        (("p", 12), [1, 2]),
        (("s", 55), [0]),
    ]


def test_maps_and_pages_that_do_not_fit_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "pages-7.img").write_bytes(bytes(2 * PAGE))
    (tmp_path / "pagemap-1.img").write_bytes(MAGIC + message(f1=7) + message(f1=0x1000, f2=1, f4=4))
    with pytest.raises(Corrupt, match="name 1 pages"):
        pages_of(tmp_path)
    (tmp_path / "pagemap-1.img").write_bytes(b"something else")
    with pytest.raises(Corrupt, match="no page map"):
        pages_of(tmp_path)
