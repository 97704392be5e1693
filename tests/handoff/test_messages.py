"""Control messages: every kind comes back as it was, and nothing else is taken."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from haulier.errors import Corrupt
from haulier.handoff import messages
from haulier.handoff.messages import (
    AnyMessage,
    Arrived,
    Base,
    BaseReady,
    Clock,
    Compare,
    Failed,
    Filled,
    Finish,
    GivenUp,
    GiveUp,
    GoFirst,
    Heat,
    Job,
    MemoryReady,
    Offer,
    Options,
    Own,
    Poised,
    Prepared,
    PrepareMemory,
    Running,
    Stretch,
    Stretched,
    Unlike,
    decode,
    encode,
)

SAMPLES: list[AnyMessage] = [
    Base(b"\0manifest\xff"),
    BaseReady(),
    PrepareMemory("golden:" + "0" * 64),
    Heat(b"packed"),
    Compare(b"12345678" * 3),
    Unlike(b"\x01\0\0\0", b"12345678"),
    GiveUp(b"\x80"),
    GivenUp(),
    MemoryReady(),
    Prepared(),
    Stretch(vni=9, home="192.0.2.1", away="2001:db8::1", gateway_mac="02:00:00:00:77:01"),
    Stretched("no vxlan"),
    Clock(1.25, 7.5),
    Arrived(3, 1 << 40, bytes(32), b"m" * 32, b"r" * 16, 0.25),
    GoFirst(),
    Poised(3, b"m" * 32, 1.5),
    Filled(1 << 40, bytes(32), 25, 180.5, 60.25, 1.5),
    Own("token", 1 << 60),
    Running(1e9 + 0.125),
    Finish("id", b"places"),
    Failed("no room", 6),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_every_message_comes_back_as_it_was(message: AnyMessage) -> None:
    assert decode(encode(message)) == message


def test_the_samples_are_all_there_is() -> None:
    assert {type(sample) for sample in SAMPLES} == set(get_args(AnyMessage))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode(["unheard-of"]),
        msgspec.msgpack.encode({"type": "own", "event": "token", "epoch": 1}),
        msgspec.msgpack.encode(["own", "token"]),
        msgspec.msgpack.encode(["own", "token", "1"]),
        msgspec.msgpack.encode(["own", 5, 1]),
        msgspec.msgpack.encode(["base", "text"]),
        encode(Own("token", 1)) + b"\0",
        b"\x81" * 5000,
    ],
)
def test_what_is_no_message_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        decode(data)


@example(b"\x91\xa3\x00\x00\x80")  # text that is not UTF-8
@given(st.binary(max_size=300))
def test_noise_is_corrupt_or_a_message(data: bytes) -> None:
    try:
        found = decode(data)
    except Corrupt:
        return
    assert isinstance(found, get_args(AnyMessage))


@given(st.sampled_from(SAMPLES), st.data())
def test_a_truncated_message_is_corrupt(message: AnyMessage, data: st.DataObject) -> None:
    whole = encode(message)
    with pytest.raises(Corrupt):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_a_message_beyond_the_bound_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_CONTROL", 100)
    assert decode(encode(Failed("x" * 50)))
    with pytest.raises(Corrupt, match="at most 100"):
        decode(encode(Failed("x" * 200)))


def test_a_job_with_its_offer_survives_the_file() -> None:
    offer = Offer(
        handoff="h1",
        source="oslo",
        spec={"name": "web1"},
        epoch=2,
        secret="0" * 64,
        manifest="1" * 64,
        memory_bases=("a", "b"),
        options=Options(downtime_ms=100, check=True),
    )
    job = Job(handoff="h1", role="target", guest="web1", peer="oslo", offer=offer, golden=True)
    assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job
