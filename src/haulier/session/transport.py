"""The I/O thread: sockets, TLS and redialling around one SessionCore.

One thread owns every socket and every SSL object, so none is ever used by two. It holds the session's lock only
while it talks to the core, never while it encrypts, decrypts or waits.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from haulier.errors import Corrupt, HaulierError, NotTrusted, PeerError, UsageError
from haulier.session import listening, mptcp
from haulier.session.connection import Connection, PathAddress, Stage
from haulier.session.core import SessionCore, State
from haulier.session.frames import Frame
from haulier.session.handed import Handed
from haulier.session.handshake import (
    MAX_PATHS,
    NONCE,
    SESSION_ID,
    ConnectorHandshake,
    ListenerHandshake,
    Refusal,
    Refused,
    session_of,
)
from haulier.session.names import Lookup
from haulier.session.tls import TlsConfig

log = logging.getLogger("haulier.session")

_LEAVE_S = 1.0
_HANDED: int = MAX_PATHS
"""Key of the connection that was handed over; those of paths that are dialled are lower."""


@dataclass
class Totals:
    """What a path carried over all its connections."""

    name: str
    sent: int = 0
    acked: int = 0
    resent: int = 0


@dataclass
class _Dialled:
    """A path of the connector: its address and when to dial next."""

    address: PathAddress
    lookup: Lookup
    next_at: float
    backoff: float
    connection: Connection | None = None
    refused_since: float | None = None
    refusals: list[HaulierError] = field(default_factory=list)


class Transport:
    """Runs one session's sockets until it is over. Start `thread`; `wake()` after changing the core."""

    def __init__(
        self,
        core: SessionCore,
        lock: threading.Lock,
        tls: TlsConfig,
        secret: bytes,
        changed: Callable[[set[int]], None],
        over: Callable[[], None],
    ) -> None:
        self.thread = threading.Thread(target=self._run, name="haulier-session", daemon=True)
        self.core = core
        self.totals: dict[int, Totals] = {}
        self.tx = 0
        self.rx = 0
        self._lock = lock
        self._tls = tls
        self._secret = secret
        self._changed = changed
        self._over = over
        self._server_context: ssl.SSLContext | None = None
        self._client_context: ssl.SSLContext | None = None
        self._selector = selectors.DefaultSelector()
        self._registered: dict[int, tuple[Connection, int]] = {}
        self._wake_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._waking = False
        self._listeners: list[socket.socket] = []
        self._handing: tuple[socket.socket, Path] | None = None
        self._pending: list[Connection] = []
        self._open: dict[int, Connection] = {}
        self._leaving: list[Connection] = []
        self._dialled: list[_Dialled] = []
        self._session = b""
        self._mptcp = 0  # subflows that are wanted of the one connection
        self._verified = False
        self._verify_by = 0.0
        self.fallback = ""
        """Why there is no MPTCP although it was asked for."""
        self.subflows = 0
        """Of MPTCP, at the last look."""
        self._stopping = False
        self._clock = time.monotonic

    # -- set-up, before the thread runs

    def listen(self, bind: Sequence[str], port: int, with_mptcp: bool = False, handed_at: Path | None = None) -> int:
        """Listen on every address of `bind`; the port. Raises UsageError.

        `handed_at`: a unix socket, made here, at which one connection may be handed over as the first path.

        Listeners stay open as long as the session lives: with MPTCP a new subflow would be refused otherwise.
        """
        self._server_context = self._tls.context(server=True)
        self._listeners, chosen = listening.listen(bind, port, mptcp.protocol(with_mptcp))
        for sock in self._listeners:
            self._selector.register(sock, selectors.EVENT_READ)
        if handed_at is not None:
            self._await_handed(handed_at)
        return chosen

    def _await_handed(self, path: Path) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._handing = sock, path
        sock.setblocking(False)
        try:
            path.unlink(missing_ok=True)
            sock.bind(str(path))
            sock.listen(1)
        except OSError as e:
            # The session has other ways.
            log.warning("no connection can be handed over at %s: %s", path, e)
            self._stop_handing()
            return
        self._selector.register(sock, selectors.EVENT_READ)

    def connect(self, peers: Sequence[PathAddress], with_mptcp: bool = False, handed: Handed | None = None) -> None:
        """Dial every peer address, for ever. Raises UsageError.

        With `handed` not before the session has more to say than that connection is good for, or it is lost.

        With MPTCP only the first is dialled, and its connection is to spread over as many subflows as there are peers;
        when it does not, or breaks, all are dialled as without.
        """
        if not 0 < len(peers) <= MAX_PATHS:
            raise UsageError(f"{len(peers)} paths given: a session needs 1 to {MAX_PATHS}")
        self._client_context = self._tls.context(server=False)
        self._session = os.urandom(SESSION_ID)
        now = self._clock()
        for key, address in enumerate(peers):
            lookup = Lookup(address.host, address.port, self.wake)
            self._dialled.append(_Dialled(address, lookup, now, self.core.settings.redial_first_s))
            self.totals[key] = Totals(str(address))
        if handed is not None:
            self._adopt(handed.sock, f"{peers[0].host} (handed over)", handed.early)
        if with_mptcp:
            if mptcp.available():
                self._mptcp = len(peers)
            else:
                self.fallback = "this kernel has no MPTCP, or it is off (sysctl net.mptcp.enabled)"

    # -- from other threads

    def wake(self) -> None:
        """There is something to do; call after the core was changed under the lock."""
        if not self._waking:
            with self._wake_lock:
                # Closed is not enough: the number may be another file's by now, and that file would get these bytes.
                if self._wake_fd >= 0:
                    self._waking = True
                    os.eventfd_write(self._wake_fd, 1)

    def address(self, key: int) -> PathAddress | None:
        """Where the path of that key leads; None at the listener."""
        return self._dialled[key].address if key < len(self._dialled) else None

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes of TLS records sent and received so far."""
        live = list(self._open.values())
        return self.tx + sum(c.tx for c in live), self.rx + sum(c.rx for c in live)

    def stop(self) -> None:
        """Flush what the core still says, close everything and end the thread."""
        self._stopping = True
        self._waking = False
        self.wake()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._done():
                self._turn()
        except Exception as e:  # a bug of ours must not leave senders waiting for ever
            log.exception("session thread failed")
            with self._lock:
                self.core.fail(PeerError(f"the session failed inside ({e!r}): report this, then start again"))
        finally:
            self._close_all()
            self._over()

    def _done(self) -> bool:
        if not self._stopping and self.core.state not in (State.ENDED, State.FAILED):
            return False
        self._part()
        return True

    def _turn(self) -> None:
        self._let_handed_go()
        now = self._clock()
        with self._lock:
            before = self.core.progress
            dead = self.core.tick(now)
            timeout = self.core.deadline(now) - now
            moved = self.core.progress != before
        for path in dead:
            if (connection := self._open.get(path.key)) is not None:
                self._drop(connection, PeerError(path.why))
        if moved:
            self._changed(set())
        if self._mptcp:
            timeout = min(timeout, self._count_subflows(now))
        timeout = min(timeout, self._dial(now))
        timeout = min(timeout, self._expire(now))
        timeout = min([timeout, *(c.rests_until - now for c in self._open.values() if c.rests_until > now)])
        busy = False
        for key, connection in list(self._open.items()):
            busy |= self._write(key, connection)
            busy |= connection.more_to_read
        for connection in self._pending:
            busy |= connection.more_to_read
        self._register(now)
        ready: set[Connection] = set()
        for selected, events in self._selector.select(0 if busy else max(timeout, 0)):
            if selected.fileobj == self._wake_fd:
                # In this order: whoever wakes us in between has changed the core before we look at it.
                os.eventfd_read(self._wake_fd)
                self._waking = False
            elif selected.fd in self._registered:
                connection = self._registered[selected.fd][0]
                if events & selectors.EVENT_READ or connection.stage is not Stage.OPEN:
                    ready.add(connection)
            else:
                self._accept(selected.fileobj)  # type: ignore[arg-type]
        for connection in list(self._pending):
            if connection in ready or connection.more_to_read:
                self._advance(connection)
        for key, connection in list(self._open.items()):
            if connection in ready or connection.more_to_read:
                self._read(key, connection)

    def _register(self, now: float) -> None:
        wanted = {c.fileno(): (c, c.awaited(now)) for c in (*self._pending, *self._open.values()) if c.awaited(now)}
        for fd in [fd for fd, known in self._registered.items() if fd not in wanted or wanted[fd][0] is not known[0]]:
            self._unregister(fd)
        for fd, (connection, events) in wanted.items():
            known = self._registered.get(fd)
            if known is None:
                self._selector.register(fd, events)
            elif known[1] != events:
                self._selector.modify(fd, events)
            else:
                continue
            self._registered[fd] = connection, events

    def _unregister(self, fd: int) -> None:
        if self._registered.pop(fd, None) is not None:
            try:
                self._selector.unregister(fd)
            except (KeyError, ValueError, OSError):
                pass

    # -- open connections

    def _write(self, key: int, connection: Connection) -> bool:
        """One helping of output; True if there may be more at once."""
        try:
            if connection.blocked:
                connection.flush()
                if connection.blocked:
                    return False
            now = self._clock()
            tcp = connection.tcp_state()
            with self._lock:
                before = self.core.progress
                if tcp is not None:
                    self.core.path(key).on_tcp(tcp[0], tcp[1], now, tcp[2])
                out = self.core.output(key, now)
                moved = self.core.progress != before
            if moved:
                self._changed(set())
            if not out:
                return False
            connection.put(b"".join(out))
            connection.flush()
            return not connection.blocked and len(out) > 1
        except (HaulierError, OSError) as e:
            self._drop(connection, e)
            return False

    def _read(self, key: int, connection: Connection) -> None:
        frames: list[Frame] = []
        try:
            before_bytes = connection.rx
            frames, closed = connection.read()
            now, count = self._clock(), connection.rx - before_bytes
            channels: set[int] = set()
            with self._lock:
                core = self.core
                before = core.progress
                core.heard(key, now)
                for frame in frames:
                    if core.receive(key, frame, now):
                        channels.add(frame.channel)
                moved = core.progress != before
                flow = core.path(key)
                lowat = 2 * flow.frame_limit if flow.rate.peak else 0
                rtt = flow.rtt.least or 0.0
            connection.rests_until = now + connection.leisure.note(now, count, rtt)
            if channels or moved:
                self._changed(channels)
            if lowat:
                connection.shorten_queue(lowat)
            if closed:
                raise PeerError("closed by the peer")
        except Corrupt as e:
            # Nothing on the way can do this to TLS: the peer itself is wrong, and dialling again would not help.
            log.error("session with %s: %s", connection.peer, e)
            with self._lock:
                self.core.abort(str(e), broken=e)
            self._changed(set())
        except (HaulierError, OSError) as e:
            self._drop(connection, e)

    def _count_subflows(self, now: float) -> float:
        """Look whether MPTCP does what it should; seconds until the next look."""
        connection = self._open.get(0)
        if connection is None:
            return 60.0
        self.subflows = connection.subflows()
        if self._verified:
            return 1.0
        if self.subflows >= self._mptcp:
            self._verified = True
            log.info("MPTCP to %s has %d subflows", connection.peer, self.subflows)
        elif not self.subflows:
            self._no_mptcp("the peer, or something on the way, speaks plain TCP only")
        elif now >= self._verify_by:
            self._no_mptcp(f"only {self.subflows} of {self._mptcp} subflows came up")
        return 0.05

    def _no_mptcp(self, why: str) -> None:
        """Several connections instead of one."""
        log.warning("no MPTCP to %s: %s", self.core.peer, why)
        self._mptcp = self.subflows = 0
        self.fallback = why
        if (connection := self._open.get(0)) is not None:
            self._drop(connection, PeerError(why))
            self._dialled[0].next_at = self._clock()

    def _drop(self, connection: Connection, why: BaseException) -> None:
        """Close a connection that failed; dial again if it was ours."""
        now = self._clock()
        if self._mptcp and self._dialled and connection is self._dialled[0].connection:
            # Its first address may be the one that is gone, and MPTCP always begins with that.
            self._mptcp = self.subflows = 0
            self.fallback = f"its connection was lost ({why})"
        self._unregister(connection.fileno())
        self.tx += connection.tx
        self.rx += connection.rx
        connection.close()
        if connection in self._pending:
            self._pending.remove(connection)
        for key, known in list(self._open.items()):
            if known is connection:
                log.info("path %s lost: %s", connection.name, why)
                with self._lock:
                    self._count(key)
                    self.core.path_down(key, now, str(why))
                del self._open[key]
        for dialled in self._dialled:
            if dialled.connection is connection:
                dialled.connection = None
                self._redial_later(dialled, now, why)

    def _count(self, key: int) -> None:
        flow, totals = self.core.path(key), self.totals[key]
        totals.sent += flow.sent_bytes
        totals.acked += flow.acked_bytes
        totals.resent += flow.resent_bytes

    # -- connections on their way

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except OSError:
            return
        if self._handing is not None and listener is self._handing[0]:
            self._stop_handing()
            if self._admit(session_of(self._secret)) is None:
                self._adopt(sock, "handed over")
            else:
                sock.close()
            return
        if len(self._pending) >= listening.PENDING:
            sock.close()  # a flood; honest peers dial again
            return
        sock.setblocking(False)
        now = self._clock()
        assert self._server_context is not None
        s = self.core.settings
        name = f"{address[0]}"
        handshake = ListenerHandshake(self._secret, os.urandom(NONCE), f"{address[0]}:{address[1]}", self._admit)
        by = (now + s.handshake_s, now + s.handshake_s)
        connection = Connection(sock, name, self._tls, self._server_context, handshake, by, s.dead_s)
        connection.peer = handshake.peer
        self._pending.append(connection)
        connection.more_to_read = True

    def _adopt(self, sock: socket.socket, name: str, early: bytes = b"") -> None:
        """A connection whose peer has proved itself to whoever hands it over, and knows the secret from there."""
        self._session = session_of(self._secret)
        sock.setblocking(False)
        by = (0.0, 0.0)  # nothing more has to happen before it is open
        connection = Connection(sock, name, self._tls, None, None, by, self.core.settings.dead_s, early)
        self._open[_HANDED] = connection
        self.totals[_HANDED] = Totals(name)
        log.info("path %s up, %s", name, connection.peer)
        with self._lock:
            self.core.path_up(_HANDED, name, self._clock(), connection.least_rtt(), ping=False)
        self._changed(set())

    def _let_handed_go(self) -> None:
        """Closes the connection that was handed over, once a path of our own does its work."""
        connection = self._open.get(_HANDED)
        if connection is None or not self._dialled or len(self._open) == 1 or connection.blocked:
            return
        if not self.core.path(_HANDED).in_flight:
            self._drop(connection, PeerError("the session has paths of its own"))

    def _worth_dialling(self) -> bool:
        """Not while the connection that was handed over is enough."""
        said = sum(self.core.payload)
        return _HANDED not in self._open or len(self._open) > 1 or said > self.core.settings.handed_bytes

    def _admit(self, session: bytes) -> tuple[Refusal, str] | None:
        if self.core.state in (State.ENDED, State.FAILED):
            return Refusal.ENDED, "it is over"
        if self._session and session != self._session:
            return Refusal.OTHER_SESSION, "one is under way"
        self._session = session
        return None

    def _advance(self, connection: Connection) -> None:
        try:
            connection.more_to_read = False
            if not connection.advance(self._clock()):
                return
        except (HaulierError, OSError) as e:
            if not self._dialled:
                log.warning("connection from %s refused: %s", connection.name, e)
            self._drop(connection, e)
            return
        self._pending.remove(connection)
        assert connection.handshake is not None
        key = connection.handshake.path
        if (old := self._open.pop(key, None)) is not None:
            self._unregister(old.fileno())
            self.tx += old.tx
            self.rx += old.rx
            old.close()
            with self._lock:
                self._count(key)
        self._open[key] = connection
        self.totals.setdefault(key, Totals(connection.name)).name = connection.name
        if self._dialled:
            dialled = self._dialled[key]
            dialled.backoff, dialled.refused_since = self.core.settings.redial_first_s, None
        log.info("path %s up, %s", connection.name, connection.peer)
        with self._lock:
            self.core.peer = connection.peer
            cost = self._dialled[key].address.cost if self._dialled else 0
            self.core.path_up(key, connection.name, self._clock(), connection.rtt, cost)
            if self._dialled and _HANDED in self._open:
                self.core.retire(_HANDED, self._clock())
        if self._mptcp:
            self._verify_by = self._clock() + self.core.settings.subflows_s
        self._changed(set())
        # What came in with the hello goes first: the peer's state may spare us sending again what it has.
        self._read(key, connection)

    def _dial(self, now: float) -> float:
        """Dial what is due; seconds until the next is."""
        soonest = 60.0
        if not self._worth_dialling():
            return soonest
        s = self.core.settings
        for key, dialled in enumerate(self._dialled):
            if dialled.connection is not None or (self._mptcp and key):
                continue
            if now < dialled.next_at:
                soonest = min(soonest, dialled.next_at - now)
                continue
            assert self._client_context is not None
            try:
                where = dialled.lookup.where()
                if where is None:
                    continue  # the answer will wake us
                sock = Connection.dial(dialled.address, where, with_mptcp=bool(self._mptcp))
            except (HaulierError, OSError) as e:
                self._redial_later(dialled, now, e)
                continue
            name = str(dialled.address)
            handshake = ConnectorHandshake(self._secret, self._session, key, os.urandom(NONCE), self._tls.peer)
            by = (now + s.dial_s, now + s.handshake_s)
            connection = Connection(sock, name, self._tls, self._client_context, handshake, by, s.dead_s)
            dialled.connection = connection
            dialled.next_at = now + dialled.backoff
            self._pending.append(connection)
        return soonest

    def _redial_later(self, dialled: _Dialled, now: float, why: BaseException) -> None:
        s = self.core.settings
        # A time-out has taken its time already; next_at was set when that dial began.
        dialled.next_at = max(dialled.next_at, now) if isinstance(why, TimeoutError) else now + dialled.backoff
        dialled.backoff = min(dialled.backoff * 2, s.redial_most_s)
        error = why.error if isinstance(why, Refused) else why
        with self._lock:
            self.core.why_no_path = f"{dialled.address}: {error}"
            ever = self.core.ever_up
            parting = self.core.state is State.PARTING
        if isinstance(why, ConnectionRefusedError):
            dialled.refused_since = dialled.refused_since or now
        else:
            dialled.refused_since = None
        fatal: HaulierError | None = None
        if isinstance(why, Refused) and why.fatal:
            fatal = why.error
        elif not ever and isinstance(error, NotTrusted):
            fatal = error
        elif not self._open and all(
            d.refused_since is not None and now - d.refused_since >= s.refused_limit_s for d in self._dialled
        ):
            fatal = PeerError(
                f"nobody listens at {', '.join(str(d.address) for d in self._dialled)} any more: "
                f"the worker at {self.core.peer} is gone; see its log and start the handoff again"
            )
        if fatal is not None:
            with self._lock:
                if parting:
                    self.core.end()  # it has said goodbye in its own way: all that was sent is acknowledged
                elif not self._open:
                    self.core.fail(fatal)
            self._changed(set())

    def _expire(self, now: float) -> float:
        """Give up connections that take too long to open; seconds until the next one does."""
        soonest = 60.0
        for connection in list(self._pending):
            by = connection.dial_by if connection.stage is Stage.DIALLING else connection.open_by
            if now >= by:
                what = "connect" if connection.stage is Stage.DIALLING else "finish the TLS handshake and hello"
                self._drop(connection, TimeoutError(f"took too long to {what}"))
            else:
                soonest = min(soonest, by - now)
        return soonest

    # -- the end

    def _part(self) -> None:
        """Let the last frames reach the peer: flush, say no more, wait for it to close."""
        end = self._clock() + _LEAVE_S
        for key, connection in list(self._open.items()):
            self._write(key, connection)
        while self._open and self._clock() < end:
            for key, connection in list(self._open.items()):
                try:
                    connection.flush()
                    connection.leave()
                    finished = connection.stage is Stage.CLOSED or connection.drained()
                except (HaulierError, OSError):
                    finished = True
                if finished:
                    self._unregister(connection.fileno())
                    self.tx += connection.tx
                    self.rx += connection.rx
                    with self._lock:
                        self._count(key)
                        self.core.path_down(key, self._clock(), "closed")
                    connection.close()
                    del self._open[key]
            if self._open:
                for connection in self._open.values():
                    connection.events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.blocked else 0)
                self._register(math.inf)
                self._selector.select(0.05)

    def _close_listeners(self) -> None:
        for sock in self._listeners:
            sock.close()
        self._listeners.clear()

    def _stop_handing(self) -> None:
        if self._handing is not None:
            sock, path = self._handing
            self._handing = None
            with contextlib.suppress(KeyError):
                self._selector.unregister(sock)
            sock.close()
            path.unlink(missing_ok=True)

    def _close_all(self) -> None:
        for connection in (*self._pending, *self._open.values()):
            connection.close()
        self._pending.clear()
        self._stop_handing()
        self._close_listeners()
        self._selector.close()
        with self._wake_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
