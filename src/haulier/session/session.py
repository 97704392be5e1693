"""`Session`: what the rest of haulier sees. Locks, waiting and callbacks around core and transport."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from haulier.errors import HaulierError, PeerError, UsageError
from haulier.session.connection import PathAddress
from haulier.session.core import SessionCore, State
from haulier.session.frames import CHANNELS
from haulier.session.handed import Handed
from haulier.session.handshake import check_secret
from haulier.session.settings import Settings
from haulier.session.tls import TlsConfig
from haulier.session.transport import Transport

log = logging.getLogger("haulier.session")


@dataclass(frozen=True)
class PathStats:
    """One path: bytes are of data frames over all its connections, `rate_bps` bits per second, `rtt_s` the shortest.

    `loss`: share of TCP's segments that were sent again. `cap_bps`, `cost`: as configured. `held`: in reserve now.
    """

    name: str
    up: bool
    rate_bps: float
    rtt_s: float
    sent: int
    acked: int
    resent: int
    loss: float = 0.0
    cap_bps: float = 0.0
    cost: int = 0
    held: bool = False


class Session:
    """Numbered messages between two sites over all the paths there are; in order per channel, exactly once.

    Make one with `listen` or `connect`; set callbacks with `on` at any time (messages wait, within bounds). A
    session that is lost sets `error`, raises it from every call that waits or sends, and calls `on_lost` once. One that
    the peer closed in good order is `over` without `error`.
    """

    port: int = 0
    """The port that the listener got."""

    def __init__(self, tls: TlsConfig, secret: bytes, settings: Settings | None = None) -> None:
        check_secret(secret)
        self.on_lost: Callable[[HaulierError], None] | None = None
        """Called once, on a thread of the session's, when it is lost."""
        self._lock = threading.Lock()
        self._arrived = [threading.Condition(self._lock) for _ in range(CHANNELS)]
        self._waiters: list[tuple[Callable[[], bool], threading.Condition]] = []
        self._closing = False
        self._callbacks: dict[int, threading.Thread] = {}
        self._core = SessionCore(settings or Settings(), tls.peer, time.monotonic())
        self._transport = Transport(self._core, self._lock, tls, secret, self._on_change, self._on_over)

    @classmethod
    def listen(
        cls,
        tls: TlsConfig,
        secret: bytes,
        bind: Sequence[str] = ("0.0.0.0",),
        port: int = 0,
        settings: Settings | None = None,
        mptcp: bool = False,
        handed_at: Path | None = None,
    ) -> Session:
        """Wait for the peer on `bind` at `port` (0: any; see `.port`). Raises UsageError.

        The first session that proves the secret is ours; any other is refused. `handed_at`: where to make a unix socket
        at which a process that has spoken with the peer may hand its connection over, as bytes in the clear.
        """
        session = cls(tls, secret, settings)
        session.port = session._transport.listen(bind, port, mptcp, handed_at)
        session._transport.thread.start()
        return session

    @classmethod
    def connect(
        cls,
        tls: TlsConfig,
        secret: bytes,
        peers: Sequence[PathAddress],
        settings: Settings | None = None,
        mptcp: bool = False,
        handed: Handed | None = None,
    ) -> Session:
        """Dial the peer on every path, again and again while the session lives. Raises UsageError.

        With `mptcp` one connection is made that is to spread over all paths; where it does not, there are several.
        With `handed` that connection is the first path, and others are dialled when it is not enough.
        """
        session = cls(tls, secret, settings)
        session._transport.connect(peers, mptcp, handed)
        session._transport.thread.start()
        return session

    # -- messages

    def send(
        self,
        channel: int,
        payload: bytes | bytearray | memoryview | Sequence[bytes],
        *,
        urgent: bool = False,
        more: bool = False,
    ) -> None:
        """Queue a message (a sequence is joined); returns at once unless much of the channel is unsent already.

        `urgent` goes ahead of everything that is not, with what its own channel holds before it. `more`: another one
        follows at once, with which this one may share a packet. Raises `error`, PeerError when the session is over,
        UsageError for a bad channel or more than 16 MiB.
        """
        if isinstance(payload, bytes):
            data = payload
        elif isinstance(payload, bytearray | memoryview):
            data = bytes(payload)
        else:
            data = b"".join(payload)
        with self._lock:
            core = self._core
            if not core.room(channel):
                # Some slack, so that a sender is not woken for every frame that leaves.
                self._wait_for(lambda: core.room(channel, 0.75) or core.state is not State.OPEN, None)
            core.send(channel, data, urgent)
        if not more:
            self._transport.wake()

    def on(self, channel: int, callback: Callable[[bytes], None]) -> None:
        """Have `callback` called with each message of `channel`, in order, on a thread of its own.

        While it blocks, the peer can send a bounded amount more on this channel; others are not held up. An exception
        that leaves it ends the session at both sides.
        """
        if not 0 <= channel < CHANNELS:
            raise UsageError(f"there is no channel {channel}: use 0 to {CHANNELS - 1}")
        if channel in self._callbacks:
            raise UsageError(f"channel {channel} has a callback already: use another channel")
        thread = threading.Thread(
            target=self._deliver, args=(channel, callback), name=f"haulier-channel-{channel}", daemon=True
        )
        self._callbacks[channel] = thread
        thread.start()

    def unacked(self, channel: int | None = None) -> int:
        """Payload bytes sent or queued that the peer's session has not acknowledged."""
        with self._lock:
            return self._core.unacked(channel)

    def wait_below(self, limit: int, channel: int | None = None, timeout: float | None = None) -> bool:
        """Wait until `unacked(channel) < limit` (or is 0); False after `timeout` seconds. Raises `error`."""
        return self._wait_until(lambda: self._core.unacked(channel) < max(limit, 1), timeout)

    # -- how it goes

    def wait_connected(self, timeout: float | None = None) -> bool:
        """Wait for the first path; False after `timeout` seconds. Raises `error`."""
        return self._wait_until(lambda: self._core.up, timeout)

    def wait_over(self, timeout: float | None = None) -> bool:
        """Wait until the session has ended, in good order or not; False after `timeout` seconds. Never raises."""
        with self._lock:
            return self._wait_for(lambda: self.over, timeout)

    @property
    def over(self) -> bool:
        """Ended, by either side or by failure; see `error`."""
        return self._core.state in (State.ENDED, State.FAILED)

    @property
    def connected(self) -> bool:
        """There is a path now."""
        return self._core.up and not self.over

    @property
    def error(self) -> HaulierError | None:
        """Why the session was lost; None while it lives or when it ended in good order."""
        return self._core.error

    def rate_bps(self) -> float:
        """Bits per second that the paths carry together, from acknowledged bytes while busy; 0 until known."""
        with self._lock:
            return 8 * sum(path.rate.steady for path in self._core.paths())

    def rtt_s(self) -> float:
        """The shortest round trip of the best path, in seconds; 0 until known."""
        with self._lock:
            return min((path.rtt.least for path in self._core.paths() if path.rtt.least is not None), default=0.0)

    def may_spend(self, cost: int) -> None:
        """From now on paths of up to this cost carry data (at first those of cost 0); others are kept in reserve."""
        with self._lock:
            self._core.may_spend(cost, time.monotonic())
        self._transport.wake()

    def transport(self) -> str:
        """How the bytes travel now, in words, and why not as was asked for."""
        transport = self._transport
        if transport.subflows:
            return f"MPTCP, {transport.subflows} subflows" if transport.subflows > 1 else "MPTCP, 1 subflow"
        with self._lock:
            count = sum(1 for _ in self._core.paths())
        said = "one TCP connection" if count == 1 else f"striping over {count} paths"
        return f"{said} ({transport.fallback})" if transport.fallback else said

    def paths(self) -> list[PathStats]:
        """Every path there is or was."""
        with self._lock:
            flows = {flow.key: flow for flow in self._core.paths()}
            found = []
            for key, totals in sorted(self._transport.totals.items()):
                flow = flows.get(key)
                address = self._transport.address(key)
                found.append(
                    PathStats(
                        name=totals.name,
                        up=flow is not None,
                        rate_bps=8 * flow.rate.steady if flow else 0.0,
                        rtt_s=(flow.rtt.least or 0.0) if flow else 0.0,
                        sent=totals.sent + (flow.sent_bytes if flow else 0),
                        acked=totals.acked + (flow.acked_bytes if flow else 0),
                        resent=totals.resent + (flow.resent_bytes if flow else 0),
                        loss=flow.loss if flow else 0.0,
                        cap_bps=address.cap_bps if address else 0.0,
                        cost=address.cost if address else 0,
                        held=flow is not None and self._core.held(flow, time.monotonic()),
                    )
                )
            return found

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes of TLS records sent and received (without TLS handshakes and the headers of TCP and IP)."""
        return self._transport.wire_bytes()

    def payload_bytes(self) -> list[int]:
        """Bytes of messages by channel, sent and received together."""
        with self._lock:
            return list(self._core.payload)

    # -- the end

    def close(self, linger_s: float = 10.0) -> None:
        """Send what is queued and say goodbye, for `linger_s` seconds at most; then stop. Safe to call again.

        Does not raise: look at `error` and `unacked()` when it matters whether all arrived.
        """
        with self._lock:
            self._core.finish()
            self._transport.wake()
            self._wait_for(lambda: self.over, linger_s)
            left = self._core.unacked()
            if not self.over:
                if self._core.state is State.PARTING:
                    self._core.end()
                else:
                    self._core.abort(f"closed with {left} bytes unsent or unacknowledged")
            self._closing = True
            self._notify_all()
        self._transport.stop()
        for thread in (self._transport.thread, *self._callbacks.values()):
            if thread is not threading.current_thread():
                thread.join(2.0)

    def abort(self, why: str) -> None:
        """End the session now; the peer's `error` says `why`."""
        with self._lock:
            self._core.abort(why)
        self.close(0)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort(f"failed there: {error}")

    # -- threads

    def _deliver(self, channel: int, callback: Callable[[bytes], None]) -> None:
        core, arrived = self._core, self._arrived[channel]
        while True:
            with self._lock:
                while not (item := core.pop(channel)):
                    if self._closing or self.over:
                        return
                    arrived.wait()
                if self._closing:
                    return
            try:
                callback(item[0])
            except Exception as e:
                log.exception("the callback of channel %d failed", channel)
                with self._lock:
                    core.abort(f"what takes channel {channel} failed: {e}", broken=_as_error(e, channel))
                    self._notify_all()
                self._transport.wake()
                return
            with self._lock:
                granted = core.consumed(channel, item[1])
            if granted:
                self._transport.wake()

    def _on_change(self, channels: set[int]) -> None:
        """Called by the transport without the lock."""
        with self._lock:
            for channel in channels:
                self._arrived[channel].notify()
            self._wake_waiters()

    def _on_over(self) -> None:
        """Called by the transport when its thread ends."""
        with self._lock:
            self._notify_all()
        error = self.error
        if error is not None and self.on_lost is not None:
            try:
                self.on_lost(error)
            except Exception:
                log.exception("on_lost failed")

    def _wake_waiters(self) -> None:
        """Wake whose condition has come true; anyone else would only take the interpreter from the I/O thread."""
        for condition, waiter in self._waiters:
            if condition():
                waiter.notify()

    def _notify_all(self) -> None:
        for _, waiter in self._waiters:
            waiter.notify()
        for channel in self._arrived:
            channel.notify_all()

    def _wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait, with the lock held, until `condition` is true; False after `timeout` seconds."""
        if condition():
            return True
        waiter = threading.Condition(self._lock)
        entry = condition, waiter
        self._waiters.append(entry)
        try:
            return waiter.wait_for(condition, timeout)
        finally:
            self._waiters.remove(entry)

    def _wait_until(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        with self._lock:
            found = self._wait_for(lambda: condition() or self.over, timeout)
            if found and not condition():
                raise self.error or PeerError(f"the session with {self._core.peer} has ended")
            return found


def _as_error(e: Exception, channel: int) -> HaulierError:
    return e if isinstance(e, HaulierError) else PeerError(f"what takes channel {channel} failed: {e!r}")
