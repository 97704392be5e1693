"""Urgent pages between two ends: whole, checked, in order, and nothing before QEMU has made its connection."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.compress import zstd
from haulier.errors import Corrupt, GuestError
from haulier.handoff import urgent
from haulier.handoff.messages import Channel
from haulier.handoff.urgent import READ, UrgentPump, UrgentSink, pack, unpack
from tests.handoff.test_memory_link import Carrier
from tests.support.waiting import wait_for


@given(st.binary(max_size=5000))
def test_a_message_comes_back_as_it_was(data: bytes) -> None:
    assert unpack(pack(data)) == data


def test_what_is_not_right_is_refused() -> None:
    right = pack(os.urandom(4000))
    bomb = pack(b"x")[:8] + (1).to_bytes(4, "little") + zstd.compress(bytes(1 << 26), 1)
    for wrong in (
        b"",
        right[:11],
        right[:-1],
        right[:-1] + bytes([right[-1] ^ 1]),
        bytes([right[0] ^ 1]) + right[1:],
        bomb,
    ):
        with pytest.raises(Corrupt):
            unpack(wrong)
    with pytest.raises(Corrupt, match="too much"):
        unpack(right[:8] + (READ + 1).to_bytes(4, "little") + right[12:])


def test_from_one_qemu_to_the_other(tmp_path: Path) -> None:
    left, right = Carrier(), Carrier()
    left.peer, right.peer = right, left
    connections: list[socket.socket] = []

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        connections.append(theirs)
        return ours

    came, failures = bytearray(), []
    sink = UrgentSink(connect, right, came.extend)
    sink.on_failure(failures.append)
    pump = UrgentPump(tmp_path / "out", left)
    with socket.socket(socket.AF_UNIX) as main, socket.socket(socket.AF_UNIX) as second:
        main.connect(str(tmp_path / "out"))
        with pump.stream() as stream:
            right.run()
            main.sendall(b"main")
            assert stream.recv(4) == b"main" and connections == []
            second.connect(str(tmp_path / "out"))
            wait_for(lambda: connections, what="the second connection there")
            data = random.Random(1).randbytes(300_000)
            second.sendall(data)
            got = bytearray()
            while len(got) < len(data):
                got += connections[0].recv(1 << 16)
            assert got == data and pump.raw == len(data)
            wait_for(lambda: came == data, what="the count")
            right.callbacks[Channel.URGENT](b"nonsense of more than a head")
            assert [type(error) for error in failures] == [Corrupt]
            pump.close()
            sink.close()
            right.stop()
    connections[0].close()
    assert not (tmp_path / "out").exists()


def test_a_qemu_that_does_not_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urgent, "ACCEPT_S", 0.05)
    pump = UrgentPump(tmp_path / "out", Carrier())
    with pytest.raises(GuestError, match="does not send its memory"):
        pump.stream()
    pump.close()
