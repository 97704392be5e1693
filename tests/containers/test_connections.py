"""What the connections of a dump still had to say."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from haulier.containers import connections
from haulier.containers.protobuf import field
from haulier.errors import Corrupt

MAGICS = struct.pack("<II", 0x54564319, 0x51465506)


def stream(whole: int, unsent: int | None) -> bytes:
    """As CRIU begins a connection's file; the queues follow."""
    message = field(1, 0) + field(2, 77) + field(3, whole) + field(4, 99) + field(5, 7)
    if unsent is not None:
        message += field(12, unsent)
    return MAGICS + struct.pack("<I", len(message)) + message + b"queued" * 3000


@pytest.mark.parametrize(
    ("whole", "unsent", "expected"), [(300_000, 60_000, (240_000, 60_000)), (500, 0, (500, 0)), (500, None, (500, 0))]
)
def test_what_was_sent_is_told_from_what_was_not(whole: int, unsent: int | None, expected: tuple[int, int]) -> None:
    assert connections.unanswered(stream(whole, unsent)[:4096]) == expected


@pytest.mark.parametrize("data", [b"", b"x" * 100, stream(500, 501), stream(500, 0)[:20]])
def test_what_criu_does_not_write_is_refused(data: bytes) -> None:
    with pytest.raises(Corrupt):
        connections.unanswered(data)


def test_the_window_takes_the_most_that_was_sent_and_64_kib(tmp_path: Path) -> None:
    assert connections.window(tmp_path) == 0
    (tmp_path / "tcp-stream-1.img").write_bytes(stream(900_000, 0))
    (tmp_path / "tcp-stream-2.img").write_bytes(stream(900, 900))
    assert connections.window(tmp_path) == 0, "nothing new waits behind what was sent"
    (tmp_path / "tcp-stream-a1.img").write_bytes(stream(300_000, 100_000))
    found = connections.window(tmp_path)
    # As the kernel counts: 524 bytes a segment with timestamps, each piece of the queue a segment more.
    assert 200_000 / 524 + (64 << 10) / 524 < found < 1000
    (tmp_path / "tcp-stream-3.img").write_bytes(stream(2**31, 5))
    assert connections.window(tmp_path) == connections.MOST
