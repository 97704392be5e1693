"""Urgent pages between two ends: whole, checked, in order, and nothing before QEMU has made its connection."""

from __future__ import annotations

import contextlib
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
from haulier.handoff.memory_link import MemoryPump
from haulier.handoff.messages import Channel
from haulier.handoff.urgent import READ, UrgentPump, UrgentSink, pack, unpack
from haulier.memory.proxy import SourceProxy
from haulier.memory.references import Referring
from haulier.memory.target_proxy import TargetProxy
from tests.handoff.test_memory_link import WIDE, Carrier
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


class Unsure:
    """What pages would be referred to with, were there no trouble with it."""

    begun, pages = True, 3

    def refer(self, data: bytes) -> tuple[bytes, bytes]:
        raise IndexError("no such block")


def test_pages_that_cannot_be_referred_go_as_they_are(tmp_path: Path) -> None:
    carrier, other = Carrier(), Carrier()
    carrier.peer, other.peer = other, carrier
    came = bytearray()
    other.on(Channel.URGENT, lambda message: came.extend(unpack(message)))
    other.run()
    failures: list[Exception] = []
    pump = UrgentPump(tmp_path / "out", carrier)
    pump.on_failure(failures.append)
    with socket.socket(socket.AF_UNIX) as main, socket.socket(socket.AF_UNIX) as second:
        main.connect(str(tmp_path / "out"))
        with pump.stream():
            pump.refer(Unsure(), 7)  # type: ignore[arg-type]
            second.connect(str(tmp_path / "out"))
            for part in (b"page", b"another"):
                had = bytes(came)
                second.sendall(part)
                wait_for(lambda had=had, part=part: came == had + part, what="the page")  # type: ignore[misc]
            assert failures == [] and pump.referred == 3
            pump.close()
    other.stop()


def test_when_no_more_urgent_pages_can_go_qemu_is_not_left_writing_them(tmp_path: Path) -> None:
    carrier, other = Carrier(), Carrier()
    carrier.peer, other.peer = other, carrier
    pump = UrgentPump(tmp_path / "out", carrier)
    with socket.socket(socket.AF_UNIX) as main, socket.socket(socket.AF_UNIX) as second:
        main.connect(str(tmp_path / "out"))
        with contextlib.closing(SourceProxy(tmp_path / "mirror")) as proxy:
            memory = MemoryPump(pump.stream(), proxy, carrier, lambda: WIDE)
            memory.serve("ram0", pump)
            memory.start()
            second.connect(str(tmp_path / "out"))
            wait_for(lambda: other.inbox, what="the word that QEMU has connected")
            trouble = ZeroDivisionError("of no kind that is expected")

            def send(channel: int, payload: bytes, *, urgent: bool = False) -> None:
                raise trouble

            carrier.send = send  # type: ignore[method-assign]
            second.sendall(b"page")
            for end in (second, main):
                end.settimeout(20)
                assert end.recv(1) == b"", "QEMU sees it closed, pauses its post-copy, and goes on with new workers"
            wait_for(lambda: memory.error is trouble, what="the error")
            assert memory.ended.wait(20)
            memory.close()


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


@pytest.mark.parametrize(
    ("most", "what"), [("MOST_WAITING", 5), ("MOST_WAITING_BYTES", 5 * len(pack(b"page", 7))), ("MOST_AHEAD", 6)]
)
def test_what_waits_for_batches_is_bounded_and_after_that_qemu_gets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, what: int
) -> None:
    ours, theirs = socket.socketpair()
    carrier, failures = Carrier(), list[Exception]()
    into = TargetProxy(tmp_path / "target")
    sink = UrgentSink(lambda: ours, carrier, lambda data: None, into)
    sink.on_failure(failures.append)
    take = carrier.callbacks[Channel.URGENT]
    for _ in range(20):
        take(pack(b"page"))
    monkeypatch.setattr(urgent, most, what)
    for _ in range(6):
        take(pack(b"page", 7))
    assert [type(error) for error in failures] == [Corrupt] and "too much" in str(failures[0])
    assert len(theirs.recv(1 << 16)) == 20 * len(b"page")
    # What came between is gone: QEMU would take this for a part of it.
    take(pack(b"page"))
    sink.go_on()
    assert len(failures) == 1
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    sink.close()
    theirs.close()
    into.close()


def test_a_qemu_that_does_not_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urgent, "ACCEPT_S", 0.05)
    pump = UrgentPump(tmp_path / "out", Carrier())
    with pytest.raises(GuestError, match="does not send its memory"):
        pump.stream()
    pump.close()
