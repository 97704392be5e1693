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
from haulier.memory.proxy import SourceProxy
from haulier.memory.references import Referring
from haulier.memory.target_proxy import TargetProxy
from tests.handoff.test_memory_link import Carrier
from tests.support.qemustream import PAGE, Writer, changed
from tests.support.waiting import wait_for


@given(st.binary(max_size=5000))
def test_a_message_comes_back_as_it_was(data: bytes) -> None:
    assert unpack(pack(data)) == data


def test_what_is_not_right_is_refused() -> None:
    right = pack(os.urandom(4000))
    bomb = pack(b"x")[:18] + zstd.compress(bytes(1 << 26), 1)
    for wrong in (
        b"",
        right[:17],
        right[:-1],
        right[:-1] + bytes([right[-1] ^ 1]),
        bytes([right[0] ^ 1]) + right[1:],
        bomb,
    ):
        with pytest.raises(Corrupt):
            unpack(wrong)
    with pytest.raises(Corrupt, match="too much"):
        unpack(right[:8] + (READ + 1).to_bytes(4, "little") + right[12:])
    with pytest.raises(Corrupt, match="too much"):
        unpack(right[:16] + (17).to_bytes(2, "little") + right[18:])


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


def test_what_overtook_the_batches_it_refers_to_waits_for_them_in_its_order(tmp_path: Path) -> None:
    out, into = SourceProxy(tmp_path / "source"), TargetProxy(tmp_path / "target")
    writer = Writer().begin().part()
    noise = os.urandom(PAGE)
    batches = [*out.feed(writer.page("ram0", 3, noise).eos().data), *out.flush()]
    referring = Referring(out)
    data = Writer().page("ram0", 3, changed(noise, 5)).data
    differences, table = referring.refer(data)
    assert table
    ours, theirs = socket.socketpair()
    carrier = Carrier()
    came, failures = bytearray(), []
    sink = UrgentSink(lambda: ours, carrier, came.extend, into)
    sink.on_failure(failures.append)
    take = carrier.callbacks[Channel.URGENT]
    take(pack(b""))
    take(pack(data, len(batches), differences, table))
    take(pack(b"later"))
    assert len(differences) == len(data) and not came
    for batch in batches:
        assert not came
        into.feed(batch.data)
        sink.go_on()
    assert failures == [] and came == data + b"later" == theirs.recv(1 << 16)
    sink.close()
    theirs.close()
    out.close(), into.close()


def test_a_qemu_that_does_not_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urgent, "ACCEPT_S", 0.05)
    pump = UrgentPump(tmp_path / "out", Carrier())
    with pytest.raises(GuestError, match="does not send its memory"):
        pump.stream()
    pump.close()
