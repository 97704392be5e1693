"""xz's stream: there and back batch by batch, none larger than announced, and nothing else taken for one."""

from __future__ import annotations

import lzma
import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.compress import liblzma, xz
from haulier.compress.profile import LEVELS
from haulier.errors import Corrupt, HaulierError, Unsupported, UsageError

TEXT = random.Random(7).randbytes(300_000)


def unpacked(batches: list[tuple[bytes, int]]) -> list[bytes]:
    """What the other end makes of packed batches of so many bytes."""
    peer = xz.Unpacker()
    return [peer.unpack(data, size) for data, size in batches]


@given(st.lists(st.tuples(st.lists(st.binary(max_size=3000), max_size=3), st.integers(0, 6)), max_size=6))
def test_there_and_back_at_any_preset(batches: list[tuple[list[bytes], int]]) -> None:
    packer, sent = xz.Packer(xz.FIRST_LEVEL), []
    for parts, preset in batches:
        if packer.level != xz.FIRST_LEVEL + preset:
            packer.set_level(xz.FIRST_LEVEL + preset)
        sent.append((packer.pack(*parts), sum(map(len, parts))))
    assert unpacked(sent) == [b"".join(parts) for parts, _ in batches]


def test_a_batch_knows_what_went_before_also_at_another_preset() -> None:
    packer = xz.Packer(xz.FIRST_LEVEL + 2)
    first, second = packer.pack(TEXT), packer.pack(TEXT)
    packer.set_level(xz.FIRST_LEVEL + 6)
    third = packer.pack(TEXT)
    assert len(second) < len(first) / 20 and len(third) < len(first) / 20
    size = len(TEXT)
    assert unpacked([(first, size), (second, size), (third, size)]) == [TEXT] * 3


def heap(objects: int) -> bytes:
    """As memory of a program: pointers to its own objects and types, counters, some words."""
    chance = random.Random(11)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 9))).encode() for _ in range(500)]
    parts = []
    for number in range(objects):
        other, kind = chance.randrange(objects), chance.randrange(40)
        parts.append(struct.pack("<QQII", 0x7F3A40000000 + 64 * other, 0x55D0C0DE1000 + 16 * kind, number, other % 9))
        parts.append(b" ".join(chance.choices(words, k=4)).ljust(40, b"\0")[:40])
    return b"".join(parts)


def test_each_level_that_is_used_makes_fewer_bytes_than_the_one_before() -> None:
    data = heap(4000)
    sizes = [len(xz.Packer(level).pack(data)) for level in LEVELS if xz.is_xz(level)]
    assert len(sizes) > 4 and all(after < 0.995 * before for before, after in pairwise(sizes))


def test_more_went_before_than_is_looked_back_over() -> None:
    chance = random.Random(3)
    plain = [chance.randbytes(1 << 20) for _ in range(6)]
    packer, sent = xz.Packer(xz.FIRST_LEVEL), []
    for number, part in enumerate([*plain, plain[0], plain[5], TEXT]):
        if number == 6:
            packer.set_level(xz.FIRST_LEVEL + 1)
        sent.append((packer.pack(part), len(part)))
        assert len(packer._before) <= xz.REMEMBERED
    assert len(sent[6][0]) > 1 << 20, "of the first nothing is left"
    assert len(sent[7][0]) < 1 << 16, "of the last all"
    assert unpacked(sent) == [*plain, plain[0], plain[5], TEXT]


def test_more_than_was_announced_is_refused_before_it_is_made() -> None:
    bomb = xz.Packer(xz.FIRST_LEVEL).pack(bytes(64 << 20))
    assert len(bomb) < 64 << 10
    with pytest.raises(Corrupt, match="more than the 1000 bytes"):
        xz.Unpacker().unpack(bomb, 1000)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_noise_is_refused_or_is_not_what_was_packed(noise: bytes, cut: int) -> None:
    """Whether it is what was packed the checksum of a batch tells."""
    good = xz.Packer(xz.FIRST_LEVEL).pack(random.Random(1).randbytes(500))
    for data in (noise, good[:cut], good[:cut] + noise, good + noise):
        try:
            assert len(xz.Unpacker().unpack(data, 1000)) <= 1000
        except Corrupt:
            continue


def test_the_stream_never_ends() -> None:
    peer, packer = xz.Unpacker(), xz.Packer(xz.FIRST_LEVEL)
    assert peer.unpack(packer.pack(b"abc"), 3) == b"abc"
    with pytest.raises(Corrupt, match="ended the xz stream"):
        peer.unpack(b"\0", 100)
    with pytest.raises(Corrupt, match="end of the xz stream"):
        peer.unpack(packer.pack(b"abc"), 100)


def test_any_decoder_of_lzma2_takes_it() -> None:
    packer = xz.Packer(xz.FIRST_LEVEL + 4)
    stream = packer.pack(TEXT) + packer.pack(b"more") + b"\0"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": xz.DICTIONARY}]
    assert lzma.decompress(stream, lzma.FORMAT_RAW, filters=filters) == TEXT + b"more"


@pytest.mark.parametrize("level", [19, 30])
def test_levels_of_others_are_refused(level: int) -> None:
    with pytest.raises(UsageError, match="none of xz's"):
        xz.Packer(level)


def test_levels_have_names() -> None:
    assert xz.name_of(5) == "zstd level 5" and xz.name_of(24) == "xz level 4"
    assert xz.is_xz(20) and not xz.is_xz(19)


def test_what_liblzma_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="no preset 77"):
        liblzma.Encoder(77, 1 << 20)
    with pytest.raises(HaulierError, match="cannot begin"):
        liblzma.Encoder(2, 1)
    monkeypatch.setattr(liblzma, "_SONAME", "libnobody.so.9")
    with pytest.raises(Unsupported, match="install it"):
        liblzma.Encoder(2, 1 << 20)
