"""A dump on its way: comes out as it went in, and nothing that was tampered with does."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from haulier.containers import checkpoint
from haulier.containers.checkpoint import (
    Borrowed,
    CheckpointReceiver,
    CheckpointSender,
    End,
    PagesFile,
    Part,
    digest_of,
)
from haulier.containers.images import pages_of
from haulier.containers.usual import usual_dump
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
    numbers = np.array([5, 6, 7, 900, 2], np.int64)
    early = sender.layout(0, [("pages-1.img", numbers[:3])], early=True)
    layout = sender.layout(33, [("pages-1.img", numbers[:3])])
    real = list(sender.files(source))
    last = sender.end(77, [("pages-1.img", numbers)])
    for message in [*trial, early]:
        receiver.handle(message)
    assert receiver.layout is not None and not receiver.settled
    for message in [layout, *real, last]:
        receiver.handle(message)
    names = {"core-1.img", "files.img", "empty.img", "tmpfs-dev-7.tar.gz.img"}
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert receiver.end is not None and receiver.end.stream == 77
    ((name, found),) = receiver.pages
    assert (name, found.tolist()) == ("pages-1.img", numbers.tolist())
    assert receiver.settled and receiver.layout is not None and receiver.layout[0] == 33
    assert receiver.layout[1][0][1].tolist() == [5, 6, 7]
    with pytest.raises(Corrupt):
        receiver.handle(sender.digests([b"d" * 16] * 2))
    receiver.handle(sender.digests([b"d" * 16]))
    assert receiver.digests == [b"d" * 16]
    with pytest.raises(Corrupt):
        receiver.handle(last)
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
    with pytest.raises(Corrupt):
        CheckpointReceiver(tmp_path, 10).handle(CheckpointSender()._part([(name, 3)], b"abc", False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("listing", [-1, 0, 5, 9, 1 << 40])
def test_a_list_of_files_of_another_length_is_refused(tmp_path: Path, listing: int) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "good").write_bytes(b"abc")
    sender, messages = sent(tmp_path / "source")
    good = msgspec.msgpack.decode(messages[0], type=Part)
    assert good.listing not in (0, 5, 9)
    bad = msgspec.structs.replace(good, listing=listing, plain=good.listing + 3 - listing)
    receiver = CheckpointReceiver(tmp_path, 10)
    with pytest.raises(Corrupt):
        receiver.handle(msgspec.msgpack.encode(bad))
        receiver.handle(sender.end(0, []))


def small_dump(folder: Path) -> Path:
    folder.mkdir()
    (folder / "core-1.img").write_bytes(os.urandom(3000))
    (folder / "files.img").write_bytes(os.urandom(4000))
    return folder


def taken(receiver: CheckpointReceiver, messages: Iterable[bytes]) -> CheckpointReceiver:
    for message in messages:
        receiver.handle(message)
    return receiver


def test_of_a_dump_that_both_sites_kept_only_what_changed_is_sent(tmp_path: Path) -> None:
    source, out, back = small_dump(tmp_path / "source"), tmp_path / "out", tmp_path / "back"
    out.mkdir()
    back.mkdir()
    first = CheckpointSender()
    kept = taken(CheckpointReceiver(out, 10), first.files(source)).kept
    assert kept and kept == first.kept
    (source / "files.img").write_bytes(b"a little else" + (source / "files.img").read_bytes()[13:])
    again = CheckpointSender(known=kept)
    messages = list(again.files(source, trial=True))
    assert sum(map(len, messages)) < first.wire_bytes / 5
    messages += [*again.files(source), again.end(0, [])]
    with pytest.raises(Corrupt):
        taken(CheckpointReceiver(tmp_path, 10), messages)
    taken(CheckpointReceiver(back, 10, kept), messages)
    assert (back / "files.img").read_bytes() == (source / "files.img").read_bytes()


def test_a_large_dump_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_KEPT", 6000)
    source, out = small_dump(tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    sender = CheckpointSender()
    assert taken(CheckpointReceiver(out, 10), sender.files(source)).kept == sender.kept == b""


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
    end = sender.end(0, [("pages-1.img", np.array([3, 10], np.int64))])
    receiver = CheckpointReceiver(tmp_path, 10)
    for message in messages:
        receiver.handle(message)
    with pytest.raises(Corrupt, match="beyond"):
        receiver.handle(end)


def test_files_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in memory, beside the guests'."""
    monkeypatch.setattr(checkpoint, "MAX_FILE", 100_000)
    sender, receiver = CheckpointSender(), CheckpointReceiver(tmp_path, 10)
    with pytest.raises(Corrupt, match="too many files"):
        for number in range(20):
            receiver.handle(sender._part([(f"a{number}.img", 50_000)], bytes(50_000), False))
    assert 0 < len(list(tmp_path.iterdir())) < 4
    monkeypatch.setattr(checkpoint, "MAX_FILES", 5)
    sender, receiver = CheckpointSender(), CheckpointReceiver(tmp_path, 10)
    with pytest.raises(Corrupt, match="too many files"):
        for number in range(20):
            receiver.handle(sender._part([(f"b{number}.img", 1)], b"x", False))


def test_layouts_that_name_ever_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    sender, messages = sent(tmp_path / "source")
    receiver = taken(CheckpointReceiver(tmp_path, 10), messages)
    with pytest.raises(Corrupt, match="layouts name too many"):
        for number in range(1, 10):
            receiver.handle(sender.layout(0, [(f"pages-{number}.img", np.arange(10))], early=True))


def test_a_file_of_pages_has_a_good_name_and_a_bounded_number(tmp_path: Path) -> None:
    for name, count in (("../pages-1.img", 1), ("core-1.img", 1), ("pages-1.img", 1 << 40)):
        (tmp_path / name.replace("/", "_")).mkdir()
        receiver = CheckpointReceiver(tmp_path, 10)
        sender = CheckpointSender()
        list(sender.files(tmp_path / name.replace("/", "_")))
        end = msgspec.msgpack.decode(sender.end(0, []), type=End)
        bad = msgspec.structs.replace(end, pages=[PagesFile(name, count, b"")])
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


# -- what is borrowed from the container's files -------------------------------------------------------------------


def borrowing(tmp_path: Path, **other: object) -> tuple[CheckpointReceiver, Path, bytes]:
    """A receiver that got a dump whose stream lies, but for its ends, in a file of the container."""
    source, out, root = tmp_path / "source", tmp_path / "out", tmp_path / "root"
    for folder in (source, out, root / "srv"):
        folder.mkdir(parents=True)
    contents = os.urandom(90_000)
    (root / "srv/video").write_bytes(contents)
    stream = b"head" + contents[10_000:70_000] + b"tail"
    (source / "tcp-stream-1.img").write_bytes(stream)
    fields: dict[str, object] = {
        "name": "tcp-stream-1.img",
        "at": 4,
        "path": b"srv/video",
        "offset": 10_000,
        "length": 60_000,
        "digest": digest_of(contents[10_000:70_000]),
    }
    borrowed = [Borrowed(**(fields | other))]  # type: ignore[arg-type]
    sender, receiver = CheckpointSender(), CheckpointReceiver(out, 10)
    for message in [*sender.files(source, borrowed), sender.end(0, [], borrowed)]:
        receiver.handle(message)
    assert sender.wire_bytes < 1000
    return receiver, root, stream


def test_what_a_dump_borrows_is_given_back(tmp_path: Path) -> None:
    receiver, root, stream = borrowing(tmp_path)
    receiver.give_back(root)
    assert (tmp_path / "out/tcp-stream-1.img").read_bytes() == stream


def test_a_file_that_is_another_one_is_noticed(tmp_path: Path) -> None:
    receiver, root, _ = borrowing(tmp_path)
    (root / "srv/video").write_bytes(bytes(90_000))
    with pytest.raises(Corrupt, match="srv/video"):
        receiver.give_back(root)


ODD = [{"path": b"../secret"}, {"path": b"srv/../../secret"}, {"path": b"srv"}, {"path": b"link"}, {"path": b"dir/x"}]


@pytest.mark.parametrize("other", ODD, ids=[str(one["path"]) for one in ODD])
def test_nothing_outside_the_containers_files_is_read(tmp_path: Path, other: dict[str, object]) -> None:
    receiver, root, _ = borrowing(tmp_path, **other)
    (tmp_path / "secret").write_bytes((root / "srv/video").read_bytes())
    (root / "link").symlink_to("srv/video")
    (tmp_path / "x").write_bytes((root / "srv/video").read_bytes())
    (root / "dir").symlink_to(tmp_path)
    with pytest.raises(Corrupt, match="borrows"):
        receiver.give_back(root)


@pytest.mark.parametrize("other", [{"name": "../x"}, {"name": "pages-1.img"}, {"at": -1}, {"length": 0}])
def test_what_is_borrowed_has_to_make_sense(tmp_path: Path, other: dict[str, object]) -> None:
    with pytest.raises(Corrupt, match="borrows"):
        borrowing(tmp_path, **other)


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


def test_a_dump_of_any_container_has_much_of_the_usual_one(tmp_path: Path) -> None:
    known = usual_dump()
    assert len(known) > 10_000
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "files.img").write_bytes(known[3000:9000] + os.urandom(50))
    sender, receiver = CheckpointSender(6050), CheckpointReceiver(out, 1000)
    for message in [*sender.files(source), sender.end(0, [])]:
        receiver.handle(message)
    assert (out / "files.img").read_bytes() == (source / "files.img").read_bytes()
    assert sender.wire_bytes < 500


def test_a_small_file_system_in_memory_goes_unpacked(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    plain = b"./\0" + b"an archive " * 5000
    whole = gzip.compress(plain, 6, mtime=1)
    kept = {"tmpfs-dev-1.tar.gz.img": whole[:-3], "tmpfs-dev-2.tar.gz.img": whole + b"more", "x.img": whole}
    for name, data in {"tmpfs-dev-3.tar.gz.img": whole, **kept}.items():
        (source / name).write_bytes(data)
    sender, receiver = CheckpointSender(), CheckpointReceiver(out, 1000)
    for message in [*sender.files(source), sender.end(0, [])]:
        receiver.handle(message)
    assert gzip.decompress((out / "tmpfs-dev-3.tar.gz.img").read_bytes()) == plain
    # What is no whole archive goes as it is.
    assert all((out / name).read_bytes() == data for name, data in kept.items())
