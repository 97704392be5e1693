"""The control channel over an in-memory pair: order, waiting, failures of either side, clocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from haulier.errors import Cancelled, Corrupt, GuestError, HandoffFailed, HaulierError, NoRoom, PeerError
from haulier.handoff import control as module
from haulier.handoff.control import Control, failure
from haulier.handoff.messages import (
    BaseReady,
    Channel,
    Clock,
    Failed,
    Finish,
    MemoryReady,
    Own,
    Running,
    encode,
)
from haulier.handoff.ownership import Event


class Wire:
    """As much of a session as control uses: what is sent is delivered at the peer at once."""

    def __init__(self) -> None:
        self.peer: Wire | None = None
        self.error: HaulierError | None = None
        self.over = False
        self.sent: list[tuple[int, bytes, bool]] = []
        self.connected = False
        self.callbacks: dict[int, Callable[[bytes], None]] = {}

    def wait_connected(self, timeout: float | None = None) -> bool:
        return self.connected

    def send(self, channel: int, payload: bytes, *, urgent: bool = False, more: bool = False) -> None:
        self.sent.append((channel, payload, urgent))
        if self.peer is not None:
            self.peer.callbacks[channel](payload)

    def on(self, channel: int, callback: Callable[[bytes], None]) -> None:
        self.callbacks[channel] = callback


class Pair:
    def __init__(self) -> None:
        self.left, self.right = Wire(), Wire()
        self.left.peer, self.right.peer = self.right, self.left
        self.stop: Exception | None = None
        self.a = Control(self.left, "lisbon", self._check)  # type: ignore[arg-type]
        self.b = Control(self.right, "oslo", lambda: None)  # type: ignore[arg-type]

    def _check(self) -> None:
        if self.stop is not None:
            raise self.stop


@pytest.fixture
def pair() -> Iterator[Pair]:
    yield Pair()


def test_messages_come_in_order_and_urgently(pair: Pair) -> None:
    pair.a.send(MemoryReady())
    pair.a.own(Event.TOKEN, 4)
    assert pair.b.next(0) == MemoryReady()
    assert pair.b.next(0) == Own("token", 4)
    assert pair.b.next(0) is None
    assert all(channel == Channel.CONTROL and urgent for channel, _, urgent in pair.left.sent)


def test_waiting_keeps_what_it_was_not_waiting_for(pair: Pair) -> None:
    pair.a.own(Event.READY, 2)
    pair.a.send(Running(5.0))
    pair.a.send(MemoryReady())
    assert pair.b.wait(MemoryReady, 5) == MemoryReady()
    assert pair.b.wait(Running, 5) == Running(5.0)
    pair.a.send(Finish("x"))
    assert pair.b.poll() == [Own("ready", 2), Finish("x")]
    assert pair.b.poll() == []


def test_what_is_dropped_is_not_heard_and_all_else_is(pair: Pair) -> None:
    pair.a.own(Event.READY, 2)
    pair.a.send(MemoryReady())
    assert pair.b.wait(MemoryReady, 5) == MemoryReady()
    pair.a.own(Event.READY, 2)
    pair.a.own(Event.READY, 3)
    pair.b.tell("loaded")
    pair.b.drop(Own("ready", 2))
    assert pair.b.next(0) == Own("ready", 3)
    assert pair.b.next(0) == "loaded"
    assert pair.b.next(0) is None and pair.b.poll() == []


def test_nobody_answers(pair: Pair) -> None:
    with pytest.raises(PeerError, match=r"'lisbon' did not answer within 0.05 s \(waiting for BaseReady\)"):
        pair.a.wait(BaseReady, 0.05)


def test_what_arrives_while_waiting_is_seen(pair: Pair) -> None:
    timer = threading.Timer(0.05, lambda: pair.b.send(BaseReady()))
    timer.start()
    assert pair.a.wait(BaseReady, 20) == BaseReady()
    timer.join()


@pytest.mark.parametrize("how", ["poll", "wait"])
def test_a_failure_of_the_peer_is_raised_as_what_it_was(pair: Pair, how: str) -> None:
    pair.b.send(failure(NoRoom("the store is full")))
    assert isinstance(pair.a.failed, NoRoom), "known at once, not only when somebody looks"
    with pytest.raises(NoRoom, match=r"^site 'lisbon': the store is full"):
        if how == "poll":
            pair.a.poll()
        else:
            pair.a.wait(BaseReady, 5)


def test_an_unknown_code_or_endless_text_of_the_peer_is_still_an_error(pair: Pair) -> None:
    pair.b.send(Failed("x" * 100_000, 9999))
    with pytest.raises(HaulierError) as caught:
        pair.a.poll()
    assert len(str(caught.value)) < 2100


def test_failure_names_what_is_no_error_of_ours() -> None:
    assert failure(GuestError("gone")) == Failed("gone", GuestError.exit_code)
    assert failure(ZeroDivisionError("oops")) == Failed("ZeroDivisionError: oops", HandoffFailed.exit_code)


def test_errors_of_other_threads_of_this_side_are_raised(pair: Pair) -> None:
    pair.a.tell("just a word")
    pair.a.tell(GuestError("qemu has gone"))
    with pytest.raises(GuestError, match="qemu has gone"):
        pair.a.wait(BaseReady, 5)


def test_cancelling_and_a_dead_session_end_every_wait(pair: Pair) -> None:
    pair.stop = Cancelled("stop")
    with pytest.raises(Cancelled):
        pair.a.wait(BaseReady, 5)
    pair.stop = None
    pair.left.error = PeerError("no path for 120 s")
    with pytest.raises(PeerError, match="no path"):
        pair.a.poll()


def test_waiting_for_the_connection_ends_with_it_a_cancel_or_the_time(pair: Pair) -> None:
    with pytest.raises(PeerError, match="site 'lisbon' within 0 s"):
        pair.a.wait_connected(0)
    pair.stop = Cancelled("stop")
    with pytest.raises(Cancelled):
        pair.a.wait_connected(1000)
    pair.left.connected = True
    pair.a.wait_connected(0)


def test_nonsense_on_the_channel_is_an_error_here(pair: Pair) -> None:
    pair.right.callbacks[Channel.CONTROL](b"\xc1nonsense")
    pair.right.callbacks[Channel.CONTROL](encode(BaseReady()))
    with pytest.raises(Corrupt):
        pair.b.poll()


@pytest.mark.parametrize(("most", "what"), [("MOST_WAITING", 5), ("MOST_WAITING_BYTES", 5 * len(encode(BaseReady())))])
@pytest.mark.parametrize("data", [encode(BaseReady()), b"\xc1nonsense!!"], ids=["right", "nonsense"])
def test_what_nobody_reads_is_bounded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, most: str, what: int, data: bytes
) -> None:
    monkeypatch.setattr(module, most, what)
    receive = pair.right.callbacks[Channel.CONTROL]
    for _ in range(20):
        receive(data)
        pair.b.tell("news of this side count for nothing")
        assert pair.b.next(0) is not None
        assert pair.b.next(0) is not None
    # An exception that leaves the callback ends the session, and with it what the peer can send.
    with pytest.raises(Corrupt, match=r"'oslo' sent .* that nobody waits for"):
        for _ in range(6):
            receive(data)


@pytest.mark.parametrize(("most", "what"), [("MOST_WAITING", 5), ("MOST_WAITING_BYTES", 5 * len(encode(BaseReady())))])
def test_what_is_kept_while_something_else_is_waited_for_is_bounded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, most: str, what: int
) -> None:
    monkeypatch.setattr(module, most, what)

    def wait_after(count: int) -> None:
        for _ in range(count):
            pair.a.send(BaseReady())
        pair.b.tell(Cancelled("all of them are kept"))
        with pytest.raises(Cancelled):
            pair.b.wait(MemoryReady, 5)

    for _ in range(3):
        wait_after(5)
        assert len(pair.b.poll()) == 5
    wait_after(5)
    with pytest.raises(Corrupt, match="nobody waits for"):
        wait_after(1)


def test_clocks_are_compared_by_the_fastest_answer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # The peer's clock is 100 s ahead; the way there takes as long as the way back, sometimes longer.
    now = [1000.0]
    delays = iter([0.5, 0.9, 0.05, 0.05, 0.7, 0.2, 0.3, 0.6])

    class Clocks:
        monotonic = staticmethod(module.time.monotonic)

        @staticmethod
        def time() -> float:
            return now[0]

    monkeypatch.setattr(module, "time", Clocks)

    def there(data: bytes) -> None:
        now[0] += next(delays)
        echo = module.decode(data)
        assert isinstance(echo, Clock)
        answer = encode(Clock(echo.sent, now[0] + 100))
        now[0] += next(delays)
        pair.left.callbacks[Channel.CONTROL](answer)

    pair.right.callbacks[Channel.CONTROL] = there
    pair.a.compare_clocks(4)
    assert pair.a.clock_offset == pytest.approx(100.0, abs=1e-6)


def test_a_clock_is_answered_without_anybody_looking(pair: Pair) -> None:
    pair.a.compare_clocks(2)
    assert abs(pair.a.clock_offset) < 5
    assert pair.b.next(0) is None


def test_a_session_that_the_peer_ended_is_noticed_after_its_last_words(pair: Pair) -> None:
    pair.b.send(MemoryReady())
    pair.left.over = True
    assert isinstance(pair.a.next(0), MemoryReady)
    with pytest.raises(PeerError, match="ended the session"):
        pair.a.next(0)
