"""Pump and sink between two socket pairs, over a carrier in memory that can be slow, silent or broken."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from haulier.errors import Corrupt, HaulierError, PeerError
from haulier.handoff import memory_link
from haulier.handoff.convergence import Window
from haulier.handoff.memory_link import READ, MemoryPump, MemorySink
from haulier.handoff.messages import Channel
from haulier.memory.ahead import AheadReader
from haulier.memory.loading import GuestRam
from haulier.memory.proxy import SourceProxy
from haulier.memory.target_proxy import TargetProxy
from haulier.units import MIB, PAGE
from tests.support.streams import begin, end, part
from tests.support.waiting import wait_for

WIDE = Window(64 * MIB, 64 * MIB)


class Carrier:
    """One end of a session in memory. Messages wait in `inbox` of the other end until `run` or `step` delivers them."""

    def __init__(self) -> None:
        self.peer: Carrier = self
        self.inbox: deque[tuple[int, bytes]] = deque()
        self.callbacks: dict[int, Callable[[bytes], None]] = {}
        self.sent: dict[int, int] = {}
        self.broken: HaulierError | None = None
        self.error: Exception | None = None
        self.most = 0
        self._changed = threading.Condition()
        self._running = False
        self._thread: threading.Thread | None = None

    def send(self, channel: int, payload: bytes, *, urgent: bool = False) -> None:
        if self.broken is not None:
            raise self.broken
        self.sent[channel] = self.sent.get(channel, 0) + len(payload)
        with self.peer._changed:
            self.peer.inbox.append((channel, bytes(payload)))
            self.peer._changed.notify_all()
        self.most = max(self.most, self.unacked(Channel.MEMORY))

    def on(self, channel: int, callback: Callable[[bytes], None]) -> None:
        self.callbacks[channel] = callback

    def unacked(self, channel: int | None = None) -> int:
        with self.peer._changed:
            return sum(len(data) for number, data in self.peer.inbox if channel in (None, number))

    def wait_below(self, limit: int, channel: int | None = None, timeout: float | None = None) -> bool:
        with self.peer._changed:
            return self.peer._changed.wait_for(
                lambda: sum(len(d) for n, d in self.peer.inbox if channel in (None, n)) < limit, timeout
            )

    def step(self) -> bool:
        """Delivers one message that came here; False if there is none."""
        with self._changed:
            if not self.inbox:
                return False
            channel, data = self.inbox[0]
        try:
            if channel in self.callbacks:
                self.callbacks[channel](data)
        except Exception as error:
            self.error = error
        with self._changed:
            self.inbox.popleft()
            self._changed.notify_all()
        return True

    def run(self) -> None:
        self._running = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._running:
            if not self.step():
                with self._changed:
                    self._changed.wait(0.02)

    def stop(self) -> None:
        self._running = False
        if self._thread is not None:
            self._thread.join()


class Link:
    """QEMU (a socket) - pump - carriers - sink - QEMU (a socket)."""

    def __init__(self, tmp_path: Path, window: Window, *, run: bool = True, ahead: AheadReader | None = None) -> None:
        self.window = window
        self.failures: list[Exception] = []
        self.left, self.right = Carrier(), Carrier()
        self.left.peer, self.right.peer = self.right, self.left
        self.source_qemu, ours = socket.socketpair()
        self.target_qemu, theirs = socket.socketpair()
        self.pump = MemoryPump(ours, SourceProxy(tmp_path / "a"), self.left, lambda: self.window, ahead)
        self.sink = MemorySink(theirs, TargetProxy(tmp_path / "b"), self.right, self.failures.append)
        self.received = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if run:
            self.left.run()
            self.right.run()
        self.pump.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.target_qemu.recv(1 << 16):
                self.received += data

    def close(self) -> None:
        self.pump.close()
        self.sink.close()
        self.left.stop()
        self.right.stop()
        for end_ in (self.source_qemu, self.target_qemu):
            with contextlib.suppress(OSError):
                end_.shutdown(socket.SHUT_RDWR)
            end_.close()
        self._reader.join()
        self.pump.proxy.close()
        self.sink.proxy.close()


@pytest.fixture
def link(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Link]]:
    made: list[Link] = []

    def make(window: Window = WIDE, *, run: bool = True, ahead: AheadReader | None = None) -> Link:
        made.append(Link(tmp_path, window, run=run, ahead=ahead))
        return made[-1]

    yield make
    for one in made:
        one.close()


def stream(pages: int = 2000, seed: int = 1) -> bytes:
    """Three rounds over `pages` pages: zeros, text, noise, repeated."""
    chosen = random.Random(seed)
    kinds = [b"", b"the same line again \n".ljust(PAGE, b"."), *(chosen.randbytes(PAGE) for _ in range(6))]
    out = [begin(pages)]
    for share in (1.0, 0.3, 0.1):
        out.append(part((n, chosen.choice(kinds)) for n in range(pages) if chosen.random() < share))
    out.append(end([(5, kinds[3])]))
    return b"".join(out)


def give(sock: socket.socket, data: bytes) -> threading.Thread:
    """QEMU writes; in a thread, for the pump may let it wait."""

    def write() -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["pages", "unknown"])
def test_what_the_target_gets_is_what_the_source_gave(link: Callable[..., Link], kind: str) -> None:
    one = link()
    data = stream() if kind == "pages" else random.Random(2).randbytes(3 * MIB)
    give(one.source_qemu, data).join()
    wait_for(lambda: len(one.received) == len(data))
    assert bytes(one.received) == data
    wait_for(lambda: one.pump.delivered == len(data), what="the word that all was taken")
    assert one.pump.raw == one.sink.proxy.raw_bytes == len(data)
    assert one.sink.proxy.digest() == one.pump.proxy.finish() == blake3(data).digest()
    assert one.pump.wire == one.left.sent[Channel.MEMORY]
    assert (one.pump.device_state_at > 0) is (kind == "pages")
    assert one.pump.proxy.opaque is (kind == "unknown")
    if kind == "pages":
        assert one.pump.wire < len(data) / 5
    assert not one.failures and one.pump.error is None


def test_the_end_of_the_stream_ends_the_pump_without_an_error(link: Callable[..., Link]) -> None:
    one = link()
    give(one.source_qemu, stream(100)).join()
    one.source_qemu.shutdown(socket.SHUT_WR)
    assert one.pump.ended.wait(20)
    assert one.pump.error is None


def test_the_return_path_is_copied_untouched(link: Callable[..., Link]) -> None:
    one = link()
    words = random.Random(3).randbytes(200_000)
    give(one.target_qemu, words)
    got = bytearray()
    one.source_qemu.settimeout(20)
    while len(got) < len(words):
        got += one.source_qemu.recv(65536)
    assert bytes(got) == words


def test_no_more_than_the_wire_window_is_on_its_way(link: Callable[..., Link]) -> None:
    window = Window(100_000, 64 * MIB)
    one = link(window, run=False)
    data = begin(4000) + part((n, random.Random(n).randbytes(PAGE)) for n in range(4000))
    give(one.source_qemu, data)
    wait_for(lambda: one.left.unacked(Channel.MEMORY) >= window.wire)
    held = one.pump.raw
    # One batch may go beyond the bound, because its wire size is known only when it is made.
    assert one.left.most <= window.wire + READ + 4096
    while one.pump.delivered < len(data):
        assert one.left.unacked(Channel.MEMORY) <= window.wire + READ + 4096
        if not one.right.step():
            one.left.step()
    assert held < len(data) / 4
    assert one.pump.stalled_s > 0
    wait_for(lambda: len(one.received) == len(data))
    assert bytes(one.received) == data


def test_no_more_than_the_raw_window_is_on_its_way_however_well_it_compresses(link: Callable[..., Link]) -> None:
    window = Window(64 * MIB, MIB)
    one = link(window, run=False)
    zeros = begin(2_000_000) + part((n, b"") for n in range(2_000_000))
    give(one.source_qemu, zeros)
    wait_for(lambda: one.pump.raw >= window.raw - READ)
    most = 0
    while one.pump.delivered < len(zeros):
        most = max(most, one.pump.raw - one.pump.delivered)
        if not one.right.step():
            one.left.step()
    assert MIB / 2 <= most <= MIB + 4096
    assert one.sink.proxy.raw_bytes == len(zeros)


def ram(tmp_path: Path, pages: list[bytes]) -> AheadReader:
    (tmp_path / "ram").write_bytes(b"".join(pages))
    return AheadReader(tmp_path / "ram", "ram0")


def noise(count: int, seed: int = 3) -> list[bytes]:
    chosen = random.Random(seed)
    return [chosen.randbytes(PAGE) for _ in range(count)]


def test_a_hungry_link_gets_pages_that_qemu_has_not_come_to(link: Callable[..., Link], tmp_path: Path) -> None:
    pages = noise(1024)
    one = link(Window(64 * MIB, 64 * MIB, 64 * MIB), ahead=ram(tmp_path, pages))
    one.source_qemu.sendall(begin(1024))
    wait_for(lambda: one.pump.proxy.counters.ahead == 1024)
    wait_for(lambda: one.sink.proxy.mirror is not None and bool(one.sink.proxy.mirror.present.all()))
    mirror = one.sink.proxy.mirror
    assert mirror is not None and mirror.get(np.arange(1024)).tobytes() == b"".join(pages)
    assert bytes(one.received) == begin(1024)[: len(one.received)], "QEMU gets nothing of it"
    # Then QEMU's own pass, in which one page has changed since.
    pages[7] = noise(1, 99)[0]
    data = begin(1024) + part(enumerate(pages)) + end([])
    give(one.source_qemu, data[len(begin(1024)) :])
    wait_for(lambda: len(one.received) == len(data))
    assert bytes(one.received) == data
    assert one.pump.proxy.counters.pages["literal"] == 1025 and one.pump.proxy.counters.pages["same"] == 1023


def test_the_queue_of_the_first_pass_drains_before_its_end_is_read(link: Callable[..., Link], tmp_path: Path) -> None:
    one = link(Window(64 * MIB, 64 * MIB), run=False)
    data = begin(4000) + part(enumerate(noise(4000)))
    last = part([(1, b"changed".ljust(PAGE))]) + end([])
    give(one.source_qemu, data)
    wait_for(lambda: one.pump.raw >= len(data) - 4096)
    wait_for(lambda: not one.pump.first_pass)
    assert one.pump.may_end, "the source is to keep what is on its way small"
    one.window = Window(100_000, 64 * MIB)
    raw = one.pump.raw
    give(one.source_qemu, last)
    assert one.left.unacked(Channel.MEMORY) > 10 * one.window.wire and one.pump.raw <= raw + len(last)
    one.left.run()
    one.right.run()
    wait_for(lambda: len(one.received) == len(data) + len(last))
    assert bytes(one.received) == data + last and one.pump.proxy.first_pass_share == 1.0
    one.pump.first_pass_over()
    assert not one.pump.may_end


def test_a_link_with_enough_to_do_gets_none_ahead(link: Callable[..., Link], tmp_path: Path) -> None:
    one = link(Window(64 * MIB, 64 * MIB, 0), ahead=ram(tmp_path, noise(1024)))
    data = begin(1024) + part(enumerate(noise(1024))) + end([])
    give(one.source_qemu, data)
    wait_for(lambda: len(one.received) == len(data))
    assert one.pump.proxy.counters.ahead == 0


def test_after_the_first_pass_nothing_goes_ahead_and_qemus_end_is_seen_to_close(
    link: Callable[..., Link], tmp_path: Path
) -> None:
    one = link(Window(64 * MIB, 64 * MIB, 64 * MIB), run=False, ahead=ram(tmp_path, noise(4096)))
    one.pump.widen(one.source_qemu)
    one.pump.first_pass_over()
    data = begin(4096) + part(enumerate(noise(100))) + end([])
    give(one.source_qemu, data).join()
    one.left.run()
    one.right.run()
    wait_for(lambda: one.pump.raw == len(data))
    assert one.pump.proxy.counters.ahead == 0
    one.source_qemu.close()
    assert one.pump.ended.wait(20), "an end that is held open is never seen to close"


def test_nothing_goes_ahead_behind_device_state(link: Callable[..., Link], tmp_path: Path) -> None:
    """A guest may stop at the end of its very first pass; the target may have voted by then."""
    one = link(Window(64 * MIB, 64 * MIB, 0), ahead=ram(tmp_path, noise(1024)))
    data = begin(1024) + part(enumerate(noise(10))) + end([])
    give(one.source_qemu, data)
    wait_for(lambda: one.pump.delivered == len(data))
    one.window = Window(64 * MIB, 64 * MIB, 64 * MIB)
    give(one.source_qemu, b"the end of the device state")
    wait_for(lambda: one.pump.raw > len(data))
    one.source_qemu.shutdown(socket.SHUT_WR)
    assert one.pump.ended.wait(20)
    assert one.pump.proxy.counters.ahead == 0 and one.pump.error is None


def test_a_broken_batch_is_told_and_gives_qemu_nothing_of_it(link: Callable[..., Link]) -> None:
    one = link(run=False)
    data = stream(500)
    give(one.source_qemu, data).join()
    wait_for(lambda: one.pump.raw == len(data))
    one.source_qemu.shutdown(socket.SHUT_WR)
    assert one.pump.ended.wait(20)
    number = max(range(len(one.right.inbox)), key=lambda n: len(one.right.inbox[n][1]))
    channel, batch = one.right.inbox[number]
    bad = bytearray(batch)
    bad[len(bad) // 2] ^= 1
    one.right.inbox[number] = (channel, bytes(bad))
    while one.right.step():
        pass
    assert len(one.failures) == 1, "told once, however many batches follow"
    assert isinstance(one.failures[0], Corrupt) and one.sink.error is one.failures[0]
    assert data.startswith(bytes(one.received))


def test_a_target_qemu_that_dies_is_told(link: Callable[..., Link]) -> None:
    one = link()
    one.target_qemu.shutdown(socket.SHUT_RDWR)
    one.target_qemu.close()
    give(one.source_qemu, stream())
    wait_for(lambda: one.failures)
    assert isinstance(one.failures[0], OSError)


def test_after_the_seal_nothing_of_the_stream_gets_into_the_guest(link: Callable[..., Link], tmp_path: Path) -> None:
    one = link(run=False)
    path = tmp_path / "ram"
    path.write_bytes(bytes(64 * PAGE))
    ram = one.sink.proxy.ram = GuestRam(path, "ram0")
    first, later = noise(2)
    data = begin(64) + part([(3, first)])
    give(one.source_qemu, data).join()
    wait_for(lambda: one.pump.sent == len(data))
    while one.right.step():
        pass
    one.sink.seal()
    # What had come is in it, not still on its way.
    assert path.read_bytes() == bytes(3 * PAGE) + first + bytes(60 * PAGE)
    digest, given = one.sink.proxy.digest(), one.sink.proxy.raw_bytes
    more = part([(3, later), (4, later)]) + end([])
    give(one.source_qemu, more).join()
    wait_for(lambda: one.pump.raw == len(data) + len(more))
    one.source_qemu.shutdown(socket.SHUT_WR)
    assert one.pump.ended.wait(20)
    while one.right.step():
        pass
    assert [type(error) for error in one.failures] == [Corrupt] and "more memory came" in str(one.failures[0])
    one.sink.close()
    assert path.read_bytes() == bytes(3 * PAGE) + first + bytes(60 * PAGE)
    assert (one.sink.proxy.digest(), one.sink.proxy.raw_bytes) == (digest, given)
    mirror = one.sink.proxy.mirror
    assert mirror is not None and mirror.get(np.array([3])).tobytes() == first
    ram.close()


def test_a_stream_that_qemu_does_not_take_to_its_end_is_not_sealed(
    link: Callable[..., Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_link, "SEAL_S", 0.05)
    one = link(run=False)
    monkeypatch.setattr(one.sink.proxy, "raw_bytes", 7)
    with pytest.raises(Corrupt, match="has taken 0 of 7 bytes"):
        one.sink.seal()


@pytest.mark.parametrize("data", [b"", b"1234567", b"123456789", struct.pack(">Q", 1 << 62)])
def test_a_wrong_word_about_what_was_delivered_is_corrupt(link: Callable[..., Link], data: bytes) -> None:
    one = link(run=False)
    give(one.source_qemu, stream(100)).join()
    with pytest.raises(Corrupt):
        one.left.callbacks[Channel.DELIVERED](data)
    assert one.pump.delivered == 0


def test_delivered_never_goes_back(link: Callable[..., Link]) -> None:
    one = link(run=False)
    give(one.source_qemu, stream(100)).join()
    wait_for(lambda: one.pump.raw >= 5000)
    one.left.callbacks[Channel.DELIVERED](struct.pack(">Q", 5000))
    with pytest.raises(Corrupt):
        one.left.callbacks[Channel.DELIVERED](struct.pack(">Q", 4999))


def test_a_target_that_takes_nothing_though_the_link_carries_is_seen_to_stand_still(link: Callable[..., Link]) -> None:
    """QEMU there does not read; all that the session can carry is acknowledged."""
    one = link(Window(64 * MIB, 4 * MIB), run=False)
    # Part of a record at the end: QEMU goes on with it when it likes, and nobody waits for the target.
    data = begin(4000) + part(enumerate(noise(1000))) + part(enumerate(noise(1)))[:-1000]
    give(one.source_qemu, data)
    wait_for(lambda: one.pump.raw > 3 * MIB and one.left.unacked(Channel.MEMORY) > 3 * MIB)
    assert one.pump.still_s(1000.0, True) == 0.0
    assert one.pump.still_s(1003.0, True) == 3.0
    # A batch that arrives is progress of the link, though QEMU has taken none of it yet.
    assert one.right.step() and one.pump.delivered == 0
    assert one.pump.still_s(1006.0, True) == 0.0
    assert one.pump.still_s(1009.0, True) == 3.0
    # A link that is down is the session's matter, and what it has come to counts from when it is up again.
    assert one.pump.still_s(1012.0, False) == 0.0
    assert one.pump.still_s(1015.0, True) == 3.0
    one.left.run()
    one.right.run()
    wait_for(lambda: one.pump.raw == len(data) and one.pump.delivered == one.pump.sent, what="the word of all of it")
    one.pump.still_s(1016.0, True)
    assert one.pump.raw > one.pump.sent
    assert one.pump.still_s(1019.0, True) == 0.0, "nothing is waited for"


def test_a_lost_session_ends_the_pump_with_its_error(link: Callable[..., Link]) -> None:
    one = link()
    one.left.broken = PeerError("no path for 120 s")
    give(one.source_qemu, stream(100))
    assert one.pump.ended.wait(20)
    assert one.pump.error is one.left.broken


def test_hanging_up_lets_qemu_go_though_the_pump_hangs_in_the_session(link: Callable[..., Link]) -> None:
    one = link(run=False)
    hangs, go = threading.Event(), threading.Event()

    def send(channel: int, payload: bytes, *, urgent: bool = False) -> None:
        hangs.set()
        go.wait(60)

    one.left.send = send  # type: ignore[method-assign]
    give(one.source_qemu, stream())
    assert hangs.wait(20)
    one.pump.hang_up()
    one.source_qemu.settimeout(20)
    with contextlib.suppress(ConnectionError):
        assert one.source_qemu.recv(1) == b""
    assert not one.pump.ended.is_set()
    go.set()
    one.pump.close()
    assert one.pump.ended.is_set() and one.pump.error is None


def test_closing_ends_a_pump_that_waits_for_room_and_qemu_sees_it(link: Callable[..., Link]) -> None:
    one = link(Window(1000, 4 * MIB), run=False)
    give(one.source_qemu, begin(4000) + part((n, random.Random(n).randbytes(PAGE)) for n in range(4000)))
    wait_for(lambda: one.left.unacked(Channel.MEMORY) >= 1000)
    one.pump.close()
    assert one.pump.ended.is_set() and one.pump.error is None
    one.source_qemu.settimeout(20)
    with contextlib.suppress(ConnectionError):
        assert one.source_qemu.recv(1) == b""
