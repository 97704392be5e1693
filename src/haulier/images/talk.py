"""One side's end of a push: messages of the other side, in order, with a deadline and a way to stop."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Final, TypeVar

from haulier.errors import HaulierError, PeerError, by_code
from haulier.images import messages
from haulier.images.messages import AnyMessage, Failed
from haulier.session import Session

M = TypeVar("M")
ANSWER_S: Final = 300.0
"""Longer than the longest outage that a session survives."""


class Talk:
    """Sends and waits for control messages. `check` raises what stands against going on (a cancel)."""

    def __init__(self, session: Session, peer: str, check: Callable[[], None]) -> None:
        self.session = session
        self.peer = peer
        self._check = check
        self._news: queue.Queue[AnyMessage | HaulierError] = queue.Queue()
        session.on(messages.CONTROL, self._take)

    def _take(self, data: bytes) -> None:
        try:
            self._news.put(messages.decode(data))
        except HaulierError as error:
            self._news.put(error)

    def send(self, message: AnyMessage) -> None:
        self.session.send(messages.CONTROL, messages.encode(message))

    def fail(self, error: HaulierError) -> None:
        """Has whoever waits here raise `error`."""
        self._news.put(error)

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
            try:
                news = self._news.get(timeout=0.1)
            except queue.Empty:
                if self.session.error is not None:
                    raise self.session.error from None
                if self.session.over:
                    raise PeerError(f"site {self.peer!r} ended the push: see the log of its agent") from None
                if time.monotonic() > end:
                    raise PeerError(f"site {self.peer!r} has not answered for {deadline_s:.0f} s") from None
                continue
            if isinstance(news, HaulierError):
                raise news
            if isinstance(news, Failed):
                raise by_code(news.code)(f"at site {self.peer!r}: {news.text[:2000]}")
            if isinstance(news, kinds):
                return news
            raise PeerError(f"site {self.peer!r} said {type(news).__name__} out of turn: run the same haulier there")
