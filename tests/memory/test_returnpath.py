"""The return path's messages, from bytes that real QEMUs said, in every split; nonsense is refused."""

from __future__ import annotations

import struct

import pytest

from haulier.errors import Corrupt
from haulier.memory.returnpath import (
    Message,
    Pong,
    Received,
    Request,
    ResumeAck,
    ReturnPathParser,
    Shut,
    SwitchoverAck,
    request,
)
from haulier.units import PAGE

BLOCKS = {"ram0": 32 << 20, "rom": 3 * PAGE}

# What a QEMU 10.0.2 said: PING 1 answered, the pages of a running guest asked for, the end.
RECORDED = bytes.fromhex(
    "0002000400000001000300110000000000800000000010000472616d300004000c0000000000801000000010000001000400000000"
)
BITMAP = (
    bytes.fromhex("0005000403726f6d")
    + struct.pack(">Q", 8)
    + b"\x05"
    + bytes(7)
    + struct.pack(">Q", 0x0123456789ABCDEF)
)


def parse(data: bytes, step: int) -> list[Message]:
    parser, out = ReturnPathParser(BLOCKS), []
    for at in range(0, len(data), step):
        out += parser.feed(data[at : at + step])
    return out


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_messages_in_every_split(step: int) -> None:
    assert parse(RECORDED, step) == [
        Pong(1),
        Request("ram0", 0x800000, PAGE),
        Request("ram0", 0x801000, PAGE),
        Shut(0),
    ]
    resumed = BITMAP + bytes.fromhex("0006000400000001") + bytes.fromhex("00070000") + RECORDED
    assert parse(resumed, step)[:3] == [Received("rom", 2), ResumeAck(), SwitchoverAck()]


def test_our_own_request_reads_as_qemus() -> None:
    assert request("ram0", 0x800000, PAGE) == RECORDED[8:29]
    assert parse(request("rom", PAGE, 2 * PAGE), 5) == [Request("rom", PAGE, 2 * PAGE)]


@pytest.mark.parametrize(
    "data",
    [
        bytes.fromhex("00090000"),
        bytes.fromhex("0002000500"),
        bytes.fromhex("0004000c000000000080100000001000"),
        request("none", 0, PAGE),
        request("rom", 2 * PAGE, 2 * PAGE),
        request("rom", 1, PAGE),
        request("rom", 0, 0),
        bytes.fromhex("0006000400000002"),
        BITMAP[:8] + struct.pack(">Q", 16),
        BITMAP[:-1] + b"\0",
        bytes.fromhex("000500050372616d30"),
    ],
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt):
        parse(data, 1000)
