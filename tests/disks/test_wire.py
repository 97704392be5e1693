"""Messages of a disk transfer: what goes in comes out; what never went in is refused within bounds."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.disks import wire
from haulier.errors import Corrupt, Unsupported
from haulier.units import CHUNK

FP = st.binary(min_size=32, max_size=32)
U32 = st.integers(0, (1 << 32) - 1)
FLAGS = st.lists(st.booleans(), max_size=300)
MESSAGES = st.one_of(
    st.builds(wire.Offer, st.integers(0, 1 << 40), U32, FP),
    st.builds(wire.Lacking, FLAGS, FLAGS),
    st.builds(wire.Ask, U32, st.lists(FP, min_size=1, max_size=20)),
    st.builds(wire.Answer, U32, FLAGS),
    st.builds(wire.Commit, U32, st.booleans(), U32, FP),
    st.builds(wire.Committed, U32, FP),
    st.builds(wire.Missing, U32, st.lists(FP, min_size=1, max_size=20)),
    st.builds(wire.Failed, st.integers(0, 255), st.text(max_size=400)),
)
KINDS: list[Any] = [
    wire.Offer, wire.Lacking, wire.Ask, wire.Answer, wire.Commit, wire.Committed, wire.Missing, wire.Failed
]  # fmt: skip


@given(MESSAGES)
def test_messages_come_back(message: Any) -> None:
    assert type(message).decode(message.encode()) == message


@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_nonsense_is_refused(kind: Any, data: bytes) -> None:
    try:
        kind.decode(data)
    except (Corrupt, Unsupported):
        pass


@given(MESSAGES, st.data())
def test_cut_messages_are_refused_or_say_less(message: Any, data: st.DataObject) -> None:
    raw = message.encode()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    try:
        assert type(message).decode(cut) != message or isinstance(message, wire.Failed)
    except (Corrupt, Unsupported):
        pass


def test_a_bomb_of_flags_is_not_unpacked() -> None:
    bomb = wire._pack_flags([False] * 8_000_000)
    with pytest.raises(Corrupt):
        wire.Answer.decode(struct.pack("<BI", wire.ANSWER, 1) + struct.pack("<I", 80) + bomb[4:])
    with pytest.raises(Corrupt):
        wire.Answer.decode(struct.pack("<BI", wire.ANSWER, 1) + struct.pack("<I", 1 << 31) + bomb[4:])


def entry(kind: int, size: int) -> wire.Entry:
    noise = random.Random(size * 4 + kind).randbytes
    return wire.Entry(kind, 7 if kind == wire.PATCH else 0, noise(8), noise(size // 2) + bytes(size - size // 2))


ENTRIES = st.lists(
    st.one_of(
        st.just(CHUNK).map(lambda n: entry(wire.LITERAL, n)),
        st.tuples(st.sampled_from([wire.RECIPE, wire.PATCH]), st.integers(1, wire.MAX_ENTRY)).map(lambda t: entry(*t)),
    ),
    max_size=40,
)


@given(ENTRIES)
def test_chunks_come_back_in_bounded_messages(entries: list[wire.Entry]) -> None:
    writer, reader = wire.ChunkWriter(3, 20), wire.ChunkReader(27)
    got: list[wire.Entry] = []
    total = 0

    def take() -> None:
        nonlocal total
        taken = writer.take()
        if taken is not None:
            assert len(taken[0]) <= wire.MAX_MESSAGE
            assert sum(taken[1].values()) < len(taken[0])
            total += len(taken[0])
            got.extend(reader.entries(taken[0]))

    for one in entries:
        if writer.add(one):
            take()
    take()
    key = lambda e: (e.prefix, e.data)  # noqa: E731
    assert sorted(got, key=key) == sorted(entries, key=key)


@given(st.data())
def test_damaged_chunk_messages_are_refused(data: st.DataObject) -> None:
    writer = wire.ChunkWriter(3, 20)
    writer.add(entry(wire.LITERAL, CHUNK))
    writer.add(entry(wire.RECIPE, 300))
    taken = writer.take()
    assert taken is not None
    message = bytearray(taken[0])
    if data.draw(st.booleans()):
        message = message[: data.draw(st.integers(0, len(message) - 1))]
    else:
        message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = wire.ChunkReader(27).entries(bytes(message))
    except Corrupt:
        return
    # What zstd cannot notice, the fingerprint does: sizes are still what they must be.
    assert all(len(e.data) <= wire.MAX_ENTRY for e in found)


def test_an_announced_bomb_is_refused() -> None:
    head = wire._CHUNKS.pack(wire.CHUNKS, 1, 4, 1 << 31)
    with pytest.raises(Corrupt, match="agreed"):
        wire.ChunkReader(27).entries(head + bytes(100))
    with pytest.raises(Corrupt, match="agreed"):
        wire.ChunkReader(27).entries(wire._CHUNKS.pack(wire.CHUNKS, 60000, 4, 100) + bytes(100))


def test_another_version_says_so() -> None:
    raw = bytearray(wire.Offer(1 << 30, 0, bytes(32)).encode())
    raw[1] = 9
    with pytest.raises(Unsupported, match="update"):
        wire.Offer.decode(bytes(raw))
