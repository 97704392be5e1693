"""A waypoint: carries bytes between another two sites, of a session that it can neither read nor change.

The session's TLS is between the two, so what is carried needs no trust, and whoever comes without the right
certificate is turned away at the other end. A waypoint that dies is a path that dies: the session sends again, by
other paths, whatever was on its way through it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final

from haulier.session.listening import listen

log = logging.getLogger(__name__)

IDLE_S: Final = 120.0
"""Without a connection for so long it closes: nobody may come to say that it is not needed any more."""
MOST: Final = 4
"""Connections at once: one, and others that replace it while its end has not been noticed."""
DEAD_S: Final = 10.0
"""An end that answers nothing for so long is hung up on: what it said at its end may have been lost, and was said once.
Longer than a session's own patience, so that a way that is only slow is the session's to judge."""
DIAL_S: Final = 10.0
_PIECE: Final = 256 << 10
_LOOK_S: Final = 0.5
_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", 18)


class Waypoint:
    """One, from its making on. Any thread may call."""

    def __init__(
        self,
        bind: Sequence[str],
        there: Sequence[str],
        port: int,
        idle_s: float = IDLE_S,
        dead_s: float = DEAD_S,
    ) -> None:
        """Listens on a port of `bind`, and leads to `port` at the first address of `there` that answers.

        Raises UsageError, NoRoom.
        """
        self.carried = 0
        """Bytes, both ways together."""
        self._there, self._to = tuple(there), port
        self._idle_s = idle_s
        self._dead_s = dead_s
        self._listeners, self.port = listen(bind)
        self._ends: dict[socket.socket, socket.socket | None] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waypoint", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Hangs up on both sides. Waits for its threads; may be called again."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        carriers: list[threading.Thread] = []
        used = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            while not self._closing.is_set() and time.monotonic() - used < self._idle_s:
                for key, _ in selector.select(_LOOK_S):
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):
                        carrier = threading.Thread(
                            target=self._lead, args=(key.fileobj.accept()[0],), name="waypoint-way", daemon=True
                        )
                        carriers.append(carrier)
                        carrier.start()
                carriers = [carrier for carrier in carriers if carrier.is_alive()]
                if carriers:
                    used = time.monotonic()
        self._closing.set()
        for listener in self._listeners:
            listener.close()
        with self._lock:
            for came, there in self._ends.items():
                _hang_up(came, there)
        for carrier in carriers:
            carrier.join()

    def _lead(self, came: socket.socket) -> None:
        """One connection, until both of its directions have ended."""
        with came, contextlib.ExitStack() as stack:
            if not self._enter(came):
                return
            stack.callback(self._leave, came)
            there = self._dial()
            if there is None:
                return
            stack.enter_context(there)
            with self._lock:
                if self._closing.is_set():
                    return
                self._ends[came] = there
            for end in (came, there):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _notice_death(end, self._dead_s)
            back = threading.Thread(target=self._carry, args=(there, came), name="waypoint-back", daemon=True)
            back.start()
            self._carry(came, there)
            back.join()

    def _enter(self, came: socket.socket) -> bool:
        """Makes room for it: whoever dials again knows before we do that the oldest connection is of no use."""
        with self._lock:
            if self._closing.is_set():
                return False
            if len(self._ends) >= MOST:
                oldest = next((ends for ends in self._ends.items() if ends[1] is not None), None)
                if oldest is None:
                    return False
                del self._ends[oldest[0]]
                _hang_up(*oldest)
            self._ends[came] = None
            return True

    def _leave(self, came: socket.socket) -> None:
        with self._lock:
            self._ends.pop(came, None)

    def _dial(self) -> socket.socket | None:
        for host in self._there:
            try:
                return socket.create_connection((host, self._to), DIAL_S)
            except OSError as error:
                log.info("%s port %d does not answer: %s", host, self._to, error)
        return None

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        """One direction, in the kernel; its end is passed on, a break ends the other direction, too."""
        reading, writing = os.pipe()
        try:
            while count := os.splice(source.fileno(), writing, _PIECE):
                self.carried += count
                while count:
                    count -= os.splice(reading, target.fileno(), count)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            _hang_up(source, target)
        finally:
            os.close(reading)
            os.close(writing)


def _notice_death(end: socket.socket, dead_s: float) -> None:
    """Reading and writing fail once the other side has answered nothing for `dead_s`, even if nothing is said to it."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(dead_s / 2)))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(dead_s / 5)))
    # Where it is set it counts in place of the number of probes.
    end.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, int(dead_s * 1000))


def _hang_up(*ends: socket.socket | None) -> None:
    for end in ends:
        if end is not None:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
