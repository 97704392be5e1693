"""One side's end of a push: messages of the other side, in order, with a deadline and a way to stop."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Final, TypeVar

from haulier.errors import Corrupt, HaulierError, PeerError, by_code
from haulier.images import messages
from haulier.images.messages import AnyMessage, Failed
from haulier.session import Session

M = TypeVar("M")
ANSWER_S: Final = 300.0
"""Longer than the longest outage that a session survives."""
MOST_WAITING: Final = 4096
MOST_WAITING_BYTES: Final = 64 * messages.PART
"""What may have come that nobody has asked for yet: all items are named, with their manifests, before an answer."""


class Talk:
    """Sends and waits for control messages. `check` raises what stands against going on (a cancel)."""

    def __init__(self, session: Session, peer: str, check: Callable[[], None]) -> None:
        self.session = session
        self.peer = peer
        self._check = check
        self._news: queue.Queue[tuple[AnyMessage | HaulierError, int]] = queue.Queue()
        self._came = self._gone = 0
        """Bytes; each is written by one thread alone."""
        self._flooded = False
        session.on(messages.CONTROL, self._take)

    def _take(self, data: bytes) -> None:
        waiting = self._came - self._gone
        if self._flooded or self._news.qsize() >= MOST_WAITING or waiting + len(data) > MOST_WAITING_BYTES:
            self._flooded = True
            return
        self._came += len(data)
        news: AnyMessage | HaulierError
        try:
            news = messages.decode(data)
        except HaulierError as error:
            news = error
        self._news.put((news, len(data)))

    def send(self, message: AnyMessage) -> None:
        self.session.send(messages.CONTROL, messages.encode(message))

    def fail(self, error: HaulierError) -> None:
        """Has whoever waits here raise `error`."""
        self._news.put((error, 0))

    def connect(self, deadline_s: float = 60.0) -> None:
        """Waits for the first path. PeerError when there is none in time."""
        end = time.monotonic() + deadline_s
        while not self.session.wait_connected(0.1):
            self._check()
            if time.monotonic() > end:
                raise PeerError(
                    f"no connection to site {self.peer!r} within {deadline_s:g} s: see that its bulk addresses can be "
                    "reached from here ('haulier doctor')"
                )

    def next(self, *kinds: type[M], deadline_s: float = ANSWER_S) -> M:
        """The next message, which has to be one of `kinds`. Raises what the other side says went wrong."""
        end = time.monotonic() + deadline_s
        while True:
            self._check()
            if self._flooded:
                raise Corrupt(f"site {self.peer!r} says more than was asked: run the same haulier there")
            try:
                news, size = self._news.get(timeout=0.1)
            except queue.Empty:
                if self.session.error is not None:
                    raise self.session.error from None
                if self.session.over:
                    raise PeerError(f"site {self.peer!r} ended the push: see the log of its agent") from None
                if time.monotonic() > end:
                    raise PeerError(f"site {self.peer!r} has not answered for {deadline_s:.0f} s") from None
                continue
            self._gone += size
            if isinstance(news, HaulierError):
                raise news
            if isinstance(news, Failed):
                raise by_code(news.code)(f"at site {self.peer!r}: {news.text[:2000]}")
            if isinstance(news, kinds):
                return news
            raise PeerError(f"site {self.peer!r} said {type(news).__name__} out of turn: run the same haulier there")
