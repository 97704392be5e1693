"""Pages that a guest asks for while it runs before its memory is whole: seen at both ends of the return path."""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt, HaulierError
from haulier.memory import sparse
from haulier.memory.mirror import Mirror
from haulier.memory.proxy import SourceProxy
from haulier.memory.returnpath import Received, Request, ReturnPathParser, request
from haulier.memory.stream import Pages, StreamParser, Zeros
from haulier.units import PAGE

log = logging.getLogger(__name__)

PUSH: Final = 16
"""Pages that are put before the others at a time: what the guest asks for itself has to wait behind them."""
PUSH_S: Final = 0.1
"""If so many did not come, some were not needed: the next are put before the others."""
MOST_PUSHED: Final = 65536


class PostCopyPump:
    """At the source: checks and counts what the target asks for, and has the pages that were dirtied most sent first.

    QEMU sends what is asked for ahead of its scan over memory. So we ask as well, in the target's name, for pages that
    pre-copy had to send again and again: they are those that the guest will touch next.
    """

    def __init__(self, proxy: SourceProxy, stream: socket.socket, block: str) -> None:
        """`block`: the guest's main memory; others are left to QEMU's scan."""
        self.requests = 0
        self.pushed = 0
        self._proxy, self._stream, self._block = proxy, stream, block
        self._parser = ReturnPathParser({})
        self._lock = threading.Lock()
        self._hot: NDArray[np.int64] | None = None
        self._next = 0.0

    def returned(self, data: bytes) -> None:
        """Carries what the target's QEMU says to the source's. Corrupt for what no QEMU says; it is not carried on."""
        with self._lock:
            self._parser.blocks = self._proxy.parser.blocks
            for message in self._parser.feed(data):
                if isinstance(message, Request):
                    self.requests += message.length // PAGE
                elif isinstance(message, Received):
                    log.info("%d pages of %s had arrived", message.pages, message.block)
            self._write(data)

    def push(self) -> None:
        """Asks for the next few hot pages, if the last ones have gone by."""
        now = time.monotonic()
        if now < self._next:
            return
        with self._lock:
            if self._hot is None:
                self._hot = self._proxy.often(self._block)[:MOST_PUSHED]
                log.info("%d pages were sent again and again: they go first", len(self._hot))
            # In the middle of another message nothing can be said; and who asks without a name means the last named.
            if not len(self._hot) or not self._parser.idle or self._parser.block not in (None, self._block):
                return
            pages = np.sort(self._hot[:PUSH])
            self._hot = self._hot[PUSH:]
            for position, count in sparse.runs(pages):
                self._write(request(self._block, int(pages[position]) * PAGE, count * PAGE))
            self.pushed += len(pages)
            self._next = now + PUSH_S

    def _write(self, data: bytes) -> None:
        try:
            self._stream.sendall(data)
        except OSError:
            pass  # QEMU has hung up: whoever reads its stream sees the same and says so


class Waits:
    """At the target: which pages the guest's QEMU asks for, and how long they take to come. Times in seconds."""

    def __init__(self) -> None:
        self.requests = 0
        self.answered = 0
        self.overtook = 0
        """Pages that came on the connection for urgent ones."""
        self.worst_s = 0.0
        self.total_s = 0.0
        self._parser: ReturnPathParser | None = ReturnPathParser({})
        self._records: StreamParser | None = None
        self._lock = threading.Lock()
        self._open: dict[int, float] = {}

    def said(self, now: float, data: bytes, mirror: Mirror) -> None:
        """Takes what the target's QEMU says."""
        parser = self._parser
        if parser is None:
            return
        parser.blocks = mirror.blocks
        try:
            found = [message for message in parser.feed(data) if isinstance(message, Request)]
        except Corrupt as error:
            # Nothing but figures depends on it here; the source refuses what is wrong.
            log.warning("what QEMU asks for is not counted any more: %s", error)
            self._parser = None
            return
        with self._lock:
            for message in found:
                first = mirror.first[message.block] + message.start // PAGE
                self.requests += message.length // PAGE
                for page in range(first, first + message.length // PAGE):
                    self._open.setdefault(page, now)

    def urgent(self, now: float, data: bytes, mirror: Mirror) -> None:
        """QEMU has been given these bytes on its connection for urgent pages."""
        if self._records is None:
            self._records = StreamParser(blocks=mirror.blocks, bare=True)
        if self._records.error is not None:
            return
        try:
            tokens = self._records.feed(data)
        except HaulierError as error:
            log.warning("urgent pages are not counted any more: %s", error)
            return
        for token in tokens:
            if isinstance(token, Pages | Zeros):
                self.overtook += len(token.addresses)
                self.came(now, token.addresses.view(np.int64) // PAGE + mirror.first[token.block])

    def came(self, now: float, pages: NDArray[np.int64]) -> None:
        """QEMU has been given these pages, by their index in the mirror."""
        if not self._open:
            return
        with self._lock:
            waiting = np.fromiter(self._open, np.int64, len(self._open))
            for page in waiting[np.isin(waiting, pages)].tolist():
                took = now - self._open.pop(page)
                self.answered += 1
                self.total_s += took
                self.worst_s = max(self.worst_s, took)

    @property
    def mean_s(self) -> float:
        return self.total_s / self.answered if self.answered else 0.0
