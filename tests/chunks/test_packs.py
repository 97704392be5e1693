from __future__ import annotations

import os
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from haulier.chunks import packs
from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.packs import (
    ALIGN,
    HEADER,
    RAW,
    ZSTD,
    Location,
    Pack,
    Writer,
    decode_record,
    encode_record,
    parse_record,
    punch,
    walk,
)
from haulier.compress import zstd
from haulier.errors import Corrupt, NoRoom
from haulier.units import CHUNK
from tests.chunks.samples import chunk, flip, name, soft_chunk

STORE = bytes(range(16))


def new_writer(folder: Path, number: int = 1) -> Writer:
    writer = Writer.create(folder, number, STORE)
    assert writer is not None
    return writer


def append(writer: Writer, seed: int, level: int | None = None) -> Location:
    return writer.append(*encode_record(name(seed), chunk(seed), level))


@pytest.mark.parametrize(
    ("data", "level", "codec"), [(chunk(1), None, RAW), (chunk(1), 3, RAW), (soft_chunk(1), 3, ZSTD)]
)
def test_a_record_comes_back(tmp_path: Path, data: bytes, level: int | None, codec: int) -> None:
    writer = new_writer(tmp_path)
    fp = fingerprint(data)
    at = writer.append(*encode_record(fp, data, level))
    assert at.codec == codec
    assert at.offset % ALIGN == at.end % ALIGN == 0
    assert decode_record(fp, at, Pack(tmp_path, 1).read_record(at)) == data


@pytest.mark.parametrize("offset", [0, 4, 5, 8, 16, 47, 60, HEADER, HEADER + CHUNK - 1])
def test_any_damage_to_a_record_is_seen(tmp_path: Path, offset: int) -> None:
    writer = new_writer(tmp_path)
    at = append(writer, 1)
    flip(writer.pack.path, at.offset + offset)
    assert decode_record(name(1), at, writer.pack.read_record(at)) is None


def test_a_record_of_another_chunk_or_a_cut_one_is_refused(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    at = append(writer, 1)
    record = writer.pack.read_record(at)
    assert decode_record(name(2), at, record) is None
    assert decode_record(name(1), at, record[:-1]) is None
    assert decode_record(name(1), at._replace(stored=CHUNK - 1), record) is None
    assert parse_record(record[:10]) is None


def test_a_compressed_record_does_not_inflate_without_bound(tmp_path: Path) -> None:
    body = zstd.compress(bytes(32 << 20))
    head = packs._RECORD.pack(b"HREC", 1, ZSTD, 0, len(body), 0, name(1), 0, 0)[:-8]
    head += xxh3_64_intdigest(head).to_bytes(8, "little")
    assert parse_record(head) == (name(1), len(body), ZSTD)
    assert decode_record(name(1), Location(1, 64, len(body), ZSTD), head + body) is None


def test_walk_finds_all_records(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    places = [(name(n), append(writer, n)) for n in range(5)]
    assert list(walk(writer.pack, writer.tail)) == places
    assert list(walk(writer.pack, writer.tail - 1)) == places[:-1]


def test_walk_steps_over_holes_and_damage(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    places = [(name(n), append(writer, n)) for n in range(40)]
    punch(writer.pack, places[3][1].offset, places[30][1].offset)
    flip(writer.pack.path, places[33][1].offset + 1)
    expected = [*places[:3], *places[30:33], *places[34:]]
    assert list(walk(writer.pack, writer.tail)) == expected


def test_walk_ignores_a_magic_in_a_payload(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    data = b"HREC".ljust(64, b"\0") * 1024
    fp = fingerprint(data)
    first = writer.append(*encode_record(fp, data, None))
    second = append(writer, 1)
    assert list(walk(writer.pack, writer.tail)) == [(fp, first), (name(1), second)]
    flip(writer.pack.path, first.offset)
    assert list(walk(writer.pack, writer.tail)) == [(name(1), second)]


def test_walk_of_a_file_shorter_than_told_ends(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    append(writer, 1)
    assert len(list(walk(writer.pack, writer.tail + (100 << 20)))) == 1


def test_one_writer_a_pack(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    append(writer, 1)
    assert Writer.adopt(tmp_path, 1) is None
    assert Writer.create(tmp_path, 1, STORE) is None
    tail = writer.tail
    del writer
    adopted = Writer.adopt(tmp_path, 1)
    assert adopted is not None
    assert adopted.set_tail(tail)
    assert not adopted.set_tail(tail + 64)


def test_a_torn_tail_is_cut_off(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    append(writer, 1)
    tail = writer.tail
    append(writer, 2)
    del writer
    adopted = Writer.adopt(tmp_path, 1)
    assert adopted is not None
    assert adopted.set_tail(tail)
    assert adopted.pack.size() == tail
    assert append(adopted, 3).offset == tail


def test_a_removed_pack_stays_readable_for_those_who_have_it_open(tmp_path: Path) -> None:
    at = append(new_writer(tmp_path), 1)
    reader = Pack(tmp_path, 1)
    reader.path.unlink()
    assert decode_record(name(1), at, reader.read_record(at)) == chunk(1)
    assert Writer.adopt(tmp_path, 1) is None


def test_punching_gives_space_back(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    places = [append(writer, n) for n in range(20)]
    writer.sync()
    before = writer.pack.allocated()
    punch(writer.pack, places[2].offset, places[18].offset)
    if writer.pack.allocated() == before:
        pytest.skip("this file system cannot punch holes")
    assert writer.pack.allocated() <= before - 15 * CHUNK
    assert writer.pack.size() == writer.tail
    for n in (0, 1, 18, 19):
        assert decode_record(name(n), places[n], writer.pack.read_record(places[n])) == chunk(n)
    punch(writer.pack, places[2].offset, places[18].offset)
    punch(writer.pack, writer.tail, writer.tail + CHUNK)


def test_a_short_write_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = new_writer(tmp_path)
    tail = writer.tail

    def short(fd: int, parts: list[bytes], offset: int) -> int:
        return os.pwrite(fd, b"".join(parts)[:1000], offset)

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", short)
    at = append(writer, 1)  # what was short is finished
    assert decode_record(name(1), at, writer.pack.read_record(at)) == chunk(1)
    with monkeypatch.context() as patch:
        real = os.pwrite
        patch.setattr(os, "pwritev", lambda fd, parts, offset: real(fd, b"".join(parts)[:1000], offset))
        patch.setattr(os, "pwrite", full)
        with pytest.raises(NoRoom, match="no room left"):
            append(writer, 2)
    assert writer.tail == at.end == writer.pack.size() > tail


def test_a_failing_disk_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    assert isinstance(packs.disk_error(OSError(5, "Input/output error"), tmp_path), Corrupt)
    assert isinstance(packs.disk_error(OSError(122, "Disk quota exceeded"), tmp_path), NoRoom)
