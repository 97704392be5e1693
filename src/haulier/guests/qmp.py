"""A synchronous face of qemu.qmp, for threads.

All connections of a process share one asyncio loop in one daemon thread; a `Qmp` may be used by several threads at
once. Events are kept in order with QEMU's own time stamps, and are counted: `mark()` before a command and
`wait_event(..., since=mark)` after it cannot miss what the command caused.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from haulier.errors import GuestError

KEEP_EVENTS: Final = 4096
"""A guest can run for months and a guest can cause events: only the last of them are kept."""
CONNECT_S: Final = 10.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class Event:
    """What QEMU said by itself: `name`, its `data`, `at` in seconds since the epoch by QEMU's clock."""

    name: str
    data: dict[str, Any]
    at: float


class _Loop:
    """The one asyncio loop of this process for QMP, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
                self._thread.start()
            return self._loop

    def stop(self) -> None:
        """At exit: end what still runs, or asyncio complains about each task when the interpreter goes down."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(CONNECT_S)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(CONNECT_S)
        loop.close()


async def _cancel_all() -> None:
    # A cancelled task of qemu.qmp starts another one that hangs up.
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_LOOP = _Loop()
atexit.register(_LOOP.stop)
_WATCHERS: set[asyncio.Task[None]] = set()
"""asyncio holds tasks weakly: without this, a connection that nobody refers to would be collected at its work."""


class _Connection:
    """The part of a `Qmp` that lives on the loop. It must not refer to the `Qmp`, whose end is its own."""

    def __init__(self, name: str) -> None:
        self.cond = threading.Condition()
        self.events: deque[Event] = deque(maxlen=KEEP_EVENTS)
        self.seen = 0
        self.gone = False
        self._client = QMPClient(name)
        self._fd_lock = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def connect(self, address: str) -> None:
        await self._client.connect(address)
        self._watcher = asyncio.create_task(self._watch())
        _WATCHERS.add(self._watcher)
        self._watcher.add_done_callback(_WATCHERS.discard)

    async def execute(self, command: str, args: dict[str, Any] | None, oob: bool = False) -> Any:
        return await self._client.execute(command, args, oob)

    async def execute_fd(self, command: str, args: dict[str, Any] | None, fd: int) -> Any:
        # QEMU gives a descriptor to the next command that wants one: no second one may slip in between.
        async with self._fd_lock:
            self._client.send_fd_scm(fd)
            return await self._client.execute(command, args)

    async def disconnect(self) -> None:
        await self._hang_up()
        if self._watcher is not None:
            # It is told by the change of the run state.
            await asyncio.wait({self._watcher})

    def drop(self) -> None:
        """Disconnect some time soon, from any thread, without waiting: nobody can ask for the result any more."""
        loop = _LOOP.get()
        loop.call_soon_threadsafe(lambda: loop.create_task(self.disconnect()))

    async def _watch(self) -> None:
        # The listener ends by cancellation only; the run state says when QEMU has hung up.
        drain = asyncio.create_task(self._drain())
        try:
            while self._client.runstate.name == "RUNNING":
                await self._client.runstate_changed()
            # Collects what ended the connection, or asyncio reports it as never looked at.
            await self._hang_up()
        finally:
            drain.cancel()
            with self.cond:
                self.gone = True
                self.cond.notify_all()

    async def _drain(self) -> None:
        async for message in self._client.events:
            event = _event(dict(message))
            with self.cond:
                self.events.append(event)
                self.seen += 1
                self.cond.notify_all()

    async def _hang_up(self) -> None:
        # qemu.qmp cannot be told twice: both QEMU's end and ours may come, so the first to come does it.
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError):
            pass


class Qmp:
    """One connection to a QMP socket, which serves one at a time: close it after use (being forgotten closes it, too).

    Raises `GuestError` when nothing answers there within `timeout` seconds.
    """

    def __init__(self, socket: Path | str, *, timeout: float = CONNECT_S) -> None:
        self.socket = Path(socket)
        self._who = f"QEMU at {self.socket}"
        self._connection = _Connection(str(self.socket))
        self._run(self._connection.connect(str(self.socket)), timeout, "connect")
        self._forget = weakref.finalize(self, self._connection.drop)
        # At exit the loop is stopped anyway.
        self._forget.atexit = False

    # -- commands ------------------------------------------------------------------------------------------------

    def execute(self, command: str, args: dict[str, Any] | None = None, timeout: float = 30) -> Any:
        """QEMU's answer to one command. Raises `GuestError` with QEMU's own words, or when it does not answer."""
        return self._run(self._connection.execute(command, args), timeout, command)

    def execute_oob(self, command: str, args: dict[str, Any] | None = None, timeout: float = 30) -> Any:
        """Like `execute`, past whatever QEMU's main loop waits for (only some commands can)."""
        return self._run(self._connection.execute(command, args, True), timeout, command)

    def execute_fd(self, command: str, args: dict[str, Any] | None, fd: int, timeout: float = 30) -> Any:
        """Like `execute`, with a file descriptor passed along (SCM_RIGHTS). The caller's descriptor stays open."""
        return self._run(self._connection.execute_fd(command, args, fd), timeout, command)

    # -- events --------------------------------------------------------------------------------------------------

    def mark(self) -> int:
        """The number of events seen so far: the `since` that excludes them."""
        with self._connection.cond:
            return self._connection.seen

    def events(self, since: int = 0) -> list[Event]:
        """Events since a mark, oldest first (at most the last 4096)."""
        there = self._connection
        with there.cond:
            skip = max(0, len(there.events) - (there.seen - since))
            return list(there.events)[skip:]

    def wait_event(self, pred: Callable[[Event], bool] | str, timeout: float = 30, since: int | None = None) -> Event:
        """The first event since `since` (default: now) that `pred` accepts; a string stands for the event's name.

        Raises `GuestError` when none comes in time or the connection is lost before.
        """
        wanted = _by_name(pred) if isinstance(pred, str) else pred
        name = pred if isinstance(pred, str) else "the awaited event"
        deadline = time.monotonic() + timeout
        there = self._connection
        with there.cond:
            at = there.seen if since is None else since
            while True:
                for event in self.events(at):
                    if wanted(event):
                        return event
                at = there.seen
                if there.gone:
                    raise GuestError(f"{self._who} closed the connection before {name} came")
                left = deadline - time.monotonic()
                if left <= 0:
                    last = ", ".join(e.name for e in list(there.events)[-3:]) or "nothing"
                    raise GuestError(f"{self._who} did not send {name} within {timeout:g} s (last: {last})")
                there.cond.wait(left)

    # -- end -----------------------------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether the connection has ended."""
        with self._connection.cond:
            return self._connection.gone

    def close(self) -> None:
        """Leave. QEMU and the guest go on."""
        if self._forget.detach() is None:
            return
        try:
            self._run(self._connection.disconnect(), CONNECT_S, "disconnect")
        except GuestError:
            pass

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, _T], timeout: float, what: str) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, _LOOP.get())
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            hint = ": does another connection hold the socket?" if what == "connect" else ""
            raise GuestError(f"{self._who} did not answer {what} within {timeout:g} s{hint}") from None
        except concurrent.futures.CancelledError:
            raise GuestError(f"{self._who} went away during {what}") from None
        except ExecuteError as err:
            raise GuestError(f"{self._who} refused {what}: {err}") from err
        except (QMPError, OSError, EOFError) as err:
            raise GuestError(f"{self._who} went away during {what}: {err}") from err


def _event(message: dict[str, Any]) -> Event:
    stamp = message.get("timestamp") or {}
    at = float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
    return Event(str(message["event"]), dict(message.get("data") or {}), at)


def _by_name(name: str) -> Callable[[Event], bool]:
    return lambda event: event.name == name
