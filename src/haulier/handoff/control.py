"""The control channel of a handoff: messages of the peer, and news of this side, in one queue."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from haulier.errors import Corrupt, HandoffFailed, HaulierError, PeerError, by_code
from haulier.handoff.messages import MAX_CONTROL, AnyMessage, Channel, Clock, Failed, Own, decode, encode
from haulier.handoff.ownership import Event
from haulier.session import Session

MOST_WAITING = 4096
"""Messages of the peer that may wait to be read: an hour of its asking again every second, and ..."""
MOST_WAITING_BYTES = 4 * MAX_CONTROL
"""... bytes of them."""
M = TypeVar("M")
News = AnyMessage | Exception | str


class Control:
    """Sends and collects control messages. `news` also takes exceptions and words of other threads of this side."""

    def __init__(self, session: Session, peer: str, check: Callable[[], None]) -> None:
        self.session = session
        self.peer = peer
        self.failed: HaulierError | None = None
        """What the peer said went wrong, as soon as it said so (it is also raised in turn)."""
        self.clock_offset = 0.0
        """The peer's clock minus ours, in seconds."""
        self._check = check
        self._news: queue.Queue[tuple[News, int]] = queue.Queue()
        """With the bytes that count as waiting: of what the peer sent, its size."""
        self._lock = threading.Lock()
        self._waiting = self._waiting_bytes = 0
        self._kept: list[AnyMessage] = []
        self._kept_bytes = 0
        self._best_rtt = float("inf")
        session.on(Channel.CONTROL, self._receive)

    def wait_connected(self, timeout: float) -> None:
        """Waits for the session's first path. PeerError when there is none in time."""
        deadline = time.monotonic() + timeout
        while not self.session.wait_connected(0.1):
            self._check()
            if time.monotonic() > deadline:
                raise PeerError(
                    f"no connection between the workers here and at site {self.peer!r} within {timeout:g} s: "
                    "see that its bulk addresses can be reached from here ('haulier doctor')"
                )

    def send(self, message: AnyMessage, *, more: bool = False) -> None:
        """`more`: something follows at once, with which it may share a packet."""
        self.session.send(Channel.CONTROL, encode(message), urgent=True, more=more)

    def own(self, event: Event, epoch: int) -> None:
        """Sends a message of the ownership table."""
        self.send(Own(event.value, epoch))

    def tell(self, news: News) -> None:
        """Puts something of this side into the queue."""
        self._news.put((news, 0))

    def next(self, timeout: float) -> News | None:
        """The next piece of news, or None after `timeout` seconds. Raises what the check or the session says."""
        self._check()
        if self.session.error is not None:
            raise self.session.error
        over = self.session.over
        try:
            news, size = self._news.get(timeout=timeout) if timeout > 0 else self._news.get_nowait()
        except queue.Empty:
            if over:
                raise PeerError(f"site {self.peer!r} ended the session: look at the log of its worker") from None
            return None
        if size:
            with self._lock:
                self._waiting -= 1
                self._waiting_bytes -= size
        return news

    def poll(self) -> list[AnyMessage]:
        """All messages that are there; raises the first failure among the news."""
        found = self._kept
        self._kept, self._kept_bytes = [], 0
        while (news := self.next(0)) is not None:
            if (sifted := self._sift(news)) is not None:
                found.append(sifted)
        return found

    def drop(self, message: AnyMessage) -> None:
        """Of what has come, `message` need not be heard any more. Raises what the check or the session says."""
        self._kept = [kept for kept in self._kept if kept != message]
        others: list[News] = []
        while (news := self.next(0)) is not None:
            if news != message:
                others.append(news)
        for news in others:
            self._news.put((news, 0))

    def wait(self, kind: type[M], timeout: float) -> M:
        """The next message of `kind`; others are kept for `poll`. PeerError when none comes in time."""
        deadline = time.monotonic() + timeout
        for message in self._kept:
            if isinstance(message, kind):
                self._kept.remove(message)
                return message
        while (left := deadline - time.monotonic()) > 0:
            news = self.next(min(left, 0.1))
            if news is None:
                continue
            sifted = self._sift(news)
            if isinstance(sifted, kind):
                return sifted
            if sifted is not None:
                self._kept.append(sifted)
                self._kept_bytes += len(encode(sifted))
                self._bound(len(self._kept), self._kept_bytes)
        raise PeerError(
            f"site {self.peer!r} did not answer within {timeout:g} s (waiting for {kind.__name__}): "
            "look at the log of its worker"
        )

    def compare_clocks(self, times: int = 4) -> None:
        """Asks for the peer's clock a few times; answers are used as they come, the fastest round trip decides."""
        for _ in range(times):
            self.send(Clock(time.time()))

    def _compare(self, answer: Clock) -> None:
        now = time.time()
        rtt = now - answer.sent
        if 0 <= rtt < self._best_rtt:
            self._best_rtt = rtt
            self.clock_offset = answer.seen - (answer.sent + now) / 2

    def _sift(self, news: News) -> AnyMessage | None:
        if isinstance(news, Exception):
            raise news
        if isinstance(news, str):
            return None
        if isinstance(news, Failed):
            raise self._error(news)
        return news

    def _bound(self, count: int, size: int) -> None:
        if count > MOST_WAITING or size > MOST_WAITING_BYTES:
            raise Corrupt(
                f"site {self.peer!r} sent {count} control messages of {size} bytes that nobody waits for: "
                "run the same haulier at both sites"
            )

    def _receive(self, data: bytes) -> None:
        try:
            message = decode(data)
        except HaulierError as error:
            self._queue(error, len(data))
            return
        if isinstance(message, Clock):
            if message.seen:
                self._compare(message)
            else:
                self.send(Clock(message.sent, time.time()))
            return
        if isinstance(message, Failed):
            self.failed = self._error(message)
        self._queue(message, len(data))

    def _queue(self, news: News, size: int) -> None:
        """Of the peer. Raises Corrupt, which ends the session: it lets the peer send on as soon as this returns."""
        size = max(size, 1)
        with self._lock:
            self._waiting += 1
            self._waiting_bytes += size
            count, total = self._waiting, self._waiting_bytes
        self._bound(count, total)
        self._news.put((news, size))

    def _error(self, message: Failed) -> HaulierError:
        return by_code(message.code)(f"site {self.peer!r}: {message.text[:2000]}")


def failure(error: BaseException) -> Failed:
    """What to tell the peer about `error`."""
    if isinstance(error, HaulierError):
        return Failed(str(error), error.exit_code)
    return Failed(f"{type(error).__name__}: {error}", HandoffFailed.exit_code)
