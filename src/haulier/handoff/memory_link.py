"""The edges of the memory path: QEMU's migration sockets on one side, the session on the other.

At the source a pump reads QEMU's stream, has it encoded and sends it, no faster than its window allows. At the target
a sink decodes, gives the exact bytes to QEMU and reports what QEMU has taken. The return path is copied untouched.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt, HaulierError, PeerError
from haulier.handoff.adapting import Adapting
from haulier.handoff.convergence import Window
from haulier.handoff.messages import Channel
from haulier.handoff.page_requests import PostCopyPump, Waits
from haulier.handoff.standstill import Standstill
from haulier.handoff.urgent import UrgentPump, UrgentSink
from haulier.memory.ahead import AheadReader
from haulier.memory.proxy import AHEAD_PAGES, SourceProxy, WireBatch
from haulier.memory.references import Referring
from haulier.memory.target_proxy import Piece, TargetProxy

READ = 512 * 1024
"""Raw bytes in one batch at most."""
QEMU_SNDBUF = 65536
FIRST_PASS_SNDBUF = 1 << 20
NEARLY = 0.99
"""Of the first pass."""
PIECES = 8
"""Decoded batches that may wait for the target's QEMU."""
QUIET_S = 0.005
"""If the decoder has nothing for QEMU for so long, there is time for other things."""
SEAL_S = 5.0
"""How long QEMU may take for what came last, once it has said that its memory is whole."""
IDLE_S = 0.002
"""How long the pump waits for more before it closes a batch."""
_U64 = struct.Struct(">Q")


class Carrier(Protocol):
    """What the memory path needs of a session."""

    def send(self, channel: int, payload: bytes, *, urgent: bool = False) -> None: ...
    def on(self, channel: int, callback: Callable[[bytes], None]) -> None: ...
    def unacked(self, channel: int | None = None) -> int: ...
    def wait_below(self, limit: int, channel: int | None = None, timeout: float | None = None) -> bool: ...


class MemoryPump:
    """Source side. Starts with `start`; `ended` is set when QEMU closes its stream or something fails (`error`)."""

    def __init__(
        self,
        stream: socket.socket,
        proxy: SourceProxy,
        carrier: Carrier,
        window: Callable[[], Window],
        ahead: AheadReader | None = None,
        adapting: Adapting | None = None,
    ) -> None:
        """`ahead` reads the guest's RAM where this process may; it is closed when it has nothing more to give."""
        self.proxy = proxy
        self._ahead = ahead
        self._adapting = adapting
        self.raw = 0
        self.wire = 0
        self.sent = 0
        """Of `raw`, what went in batches: up to a record stays here until QEMU goes on."""
        self.delivered = 0
        self.stalled_s = 0.0
        self.device_state_at = 0.0
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._stream = stream
        self._carrier = carrier
        self._window = window
        self._progress = threading.Condition()
        self._standstill = Standstill()
        self._closing = False
        self.first_pass = True
        """QEMU has not come to the end of its first pass yet, nor near it."""
        self.may_end = False
        """It has come near it, which may be the end of all."""
        self._ahead_over = False
        self._qemus: socket.socket | None = None
        self._kept: tuple[NDArray[np.int64], NDArray[np.uint8]] | None = None
        self.post_copy: PostCopyPump | None = None
        self.urgent: UrgentPump | None = None
        self._referred = False
        carrier.on(Channel.RETURN_PATH, self._returned)
        carrier.on(Channel.DELIVERED, self._delivered)
        self._thread = threading.Thread(target=self._run, name="memory-pump", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hang_up(self) -> None:
        """QEMU sees its stream closed; what was read of it may still be on its way. Waits for nothing."""
        with self._progress:
            self._closing = True
            self._progress.notify_all()
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Stops the pump; QEMU sees its stream closed. Waits for the thread."""
        self.hang_up()
        if self._thread.is_alive():
            self._thread.join(10)
        self._stream.close()
        if self.urgent is not None:
            self.urgent.close()
        if self._ahead is not None:
            self._ahead.close()

    def serve(self, block: str, urgent: UrgentPump) -> None:
        """Before memory begins: it may end by post-copy, in which the target asks for pages (`post_copy` tells).

        `urgent` carries those, and is closed with the pump.
        """
        self.urgent = urgent
        urgent.on_failure(self._lost)
        self.proxy.count()
        self.post_copy = PostCopyPump(self.proxy, self._stream, block)

    def _lost(self, error: Exception) -> None:
        """QEMU pauses its post-copy when it sees its stream closed, and whoever looks at `error` has it go on."""
        self.error = self.error or error
        self.hang_up()

    def _returned(self, data: bytes) -> None:
        if self.post_copy is not None:
            try:
                self.post_copy.returned(data)
            except Corrupt as error:
                self._lost(error)
            return
        try:
            self._stream.sendall(data)
        except OSError:
            pass  # QEMU has hung up: the pump's reader sees the same and says so

    def _delivered(self, data: bytes) -> None:
        if len(data) != _U64.size:
            raise Corrupt("the other site reported delivered bytes in a wrong form: run the same haulier at both")
        (total,) = _U64.unpack(data)
        with self._progress:
            if not self.delivered <= total <= self.raw:
                raise Corrupt(f"the other site reports {total} delivered bytes of {self.raw}: same haulier there?")
            self.delivered = total
            self._progress.notify_all()

    def still_s(self, now: float, connected: bool) -> float:
        """Seconds for which the target's QEMU has taken nothing of what was sent, and not for want of a link.

        As long as bytes are acknowledged it is the link that takes its time, however long a batch is under way.
        """
        acked = self.wire - self._carrier.unacked(Channel.MEMORY)
        return self._standstill.note(now, connected and self.delivered < self.sent, (self.delivered, acked))

    def _wait_for_room(self) -> Window:
        began = time.monotonic()
        while True:
            window = self._window()
            waits = self.raw - self.delivered >= window.raw or self._carrier.unacked(Channel.MEMORY) >= window.wire
            if waits and not self._closing and self._tidy():
                continue
            with self._progress:
                if self._closing:
                    return window
                if self.raw - self.delivered >= window.raw:
                    self._progress.wait(0.05)
                    continue
            if not self._carrier.wait_below(window.wire, Channel.MEMORY, timeout=0.05):
                continue
            self.stalled_s += time.monotonic() - began
            return window

    def _tidy(self) -> bool:
        """Does a little of what can wait for such a moment; False if there is nothing to do."""
        mirror = self.proxy.mirror
        return mirror is not None and mirror.pack()

    def _feed_ahead(self, window: Window) -> bool:
        """Gives a hungry link pages that the stream has not come to yet; False if there is nothing to do."""
        ahead, mirror = self._ahead, self.proxy.mirror
        # Behind device state the target takes nothing: it may have voted.
        over = self._ahead_over or self.proxy.device_state
        if ahead is not None and (over or (ahead.done and self._kept is None)):
            ahead.close()
            self._ahead = ahead = self._kept = None
        if ahead is None or mirror is None or self._carrier.unacked(Channel.MEMORY) >= window.hungry:
            return False
        if self._kept is None:
            if not ahead.planned:
                ahead.plan(mirror, self.proxy.finder)
            self._kept = ahead.take(mirror)
        numbers, pages = self._kept
        with self._working(window):
            batches = self.proxy.ahead(ahead.block, numbers[:AHEAD_PAGES], pages[:AHEAD_PAGES])
        for batch in batches:
            self._send(batch)
        self._kept = (numbers[AHEAD_PAGES:], pages[AHEAD_PAGES:]) if len(numbers) > AHEAD_PAGES else None
        return True

    @contextlib.contextmanager
    def _working(self, window: Window) -> Iterator[None]:
        """Around the encoding of batches: the level is the controller's, who sees what they cost."""
        if self._adapting is None:
            yield
            return
        waiting = self._carrier.unacked(Channel.MEMORY)
        self._adapting.step(
            self.proxy,
            window.rate_bps,
            waiting >= window.hungry,
            waiting,
            left_s=(waiting - window.flying) / max(1.0, window.rate_bps / 8),
            ending=window.ending,
        )
        with self._adapting.working():
            yield

    def widen(self, qemus: socket.socket) -> None:
        """Lets QEMU write on, while a batch is being encoded, into its end of the stream: until the first pass is over.

        What lies there is neither dirty any more nor sent yet; near the end it would be downtime.
        """
        force = getattr(socket, "SO_SNDBUFFORCE", 32)
        try:
            qemus.setsockopt(socket.SOL_SOCKET, force, FIRST_PASS_SNDBUF)
        except PermissionError:
            qemus.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, FIRST_PASS_SNDBUF)
        self._qemus = qemus.dup()

    def first_pass_over(self) -> None:
        """QEMU has come to every page once: from now on only its stream knows what is still to be sent."""
        self.first_pass = self.may_end = False
        self._ahead_over = True
        self._narrow()

    def _narrow(self) -> None:
        # Held open for this only: as long as we have it, QEMU's end of the stream cannot be seen to close.
        with self._progress:
            qemus, self._qemus = self._qemus, None
        if qemus is not None:
            qemus.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QEMU_SNDBUF)
            qemus.close()

    def _refer(self) -> None:
        """Pre-copy is over, and all of it is in batches: urgent pages may refer to what it brought."""
        if not self._referred and self.urgent is not None:
            self._referred = True
            self.urgent.refer(Referring(self.proxy), self.proxy.counters.batches)

    def _send(self, batch: WireBatch) -> None:
        self.wire += len(batch.data)
        self.sent += batch.raw_bytes
        self._carrier.send(Channel.MEMORY, batch.data)

    def _run(self) -> None:
        buffer = bytearray(READ)
        view = memoryview(buffer)
        more_now = select.poll()
        more_now.register(self._stream, select.POLLIN)
        try:
            while not self._closing:
                if self.first_pass and self.proxy.first_pass_share > NEARLY:
                    # Where the guest has changed nothing meanwhile, QEMU stops it at the end of this very pass: what
                    # is queued then is downtime. So the queue drains before that end is read.
                    self.first_pass, self.may_end = False, True
                    self._narrow()
                window = self._window()
                # The link first; as soon as it has enough, the stream, with which the target has to keep up.
                if self._feed_ahead(window):
                    continue
                window = self._wait_for_room()
                while not more_now.poll(0) and self._tidy():
                    pass
                limit = max(4096, min(READ, window.raw - (self.raw - self.delivered)))
                got = self._stream.recv_into(view[:limit])
                if not got:
                    break
                while got < limit and more_now.poll(IDLE_S * 1000):
                    more = self._stream.recv_into(view[got:limit])
                    if not more:
                        break
                    got += more
                with self._progress:
                    self.raw += got
                with self._working(window):
                    batches = [*self.proxy.feed(bytes(view[:got])), *self.proxy.flush()]
                for batch in batches:
                    self._send(batch)
                if self.proxy.device_state and not self.device_state_at:
                    self.device_state_at = time.time()
                if self.post_copy is not None and self.proxy.parser.packaged:
                    self._refer()
                    self.post_copy.push()
        except (OSError, HaulierError) as error:
            if not self._closing:
                self.error = error
        except Exception as error:
            self.error = error
        finally:
            self._narrow()
            self.ended.set()


class MemorySink:
    """Target side: connects to the incoming QEMU at once. `error` says what went wrong, if anything did."""

    def __init__(
        self,
        stream: socket.socket,
        proxy: TargetProxy,
        carrier: Carrier,
        failed: Callable[[Exception], None],
        connect: Callable[[], socket.socket] | None = None,
    ) -> None:
        """`connect` makes QEMU's second connection, for urgent pages, where post-copy may come."""
        self.proxy = proxy
        self.error: Exception | None = None
        self._stream = stream
        self._carrier = carrier
        self._failed = failed
        self._closing = False
        self._pieces: queue.Queue[Piece | None] = queue.Queue(PIECES)
        self._given = 0
        self._moved = threading.Condition()
        self._taking = threading.Lock()
        self._sealed = False
        self.waits = Waits()
        """What the guest waited for, once it runs before its memory is whole."""
        self._threads = [
            threading.Thread(target=self._return_path, name="return-path", daemon=True),
            threading.Thread(target=self._give, name="memory-sink", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._urgent = None
        if connect is not None:
            self._urgent = UrgentSink(connect, carrier, self._overtaken, proxy)
            self._urgent.on_failure(self._fail_open)
        carrier.on(Channel.MEMORY, self._batch)

    def _overtaken(self, data: bytes) -> None:
        if self.proxy.mirror is not None:
            self.waits.urgent(time.monotonic(), data, self.proxy.mirror)

    def _fail_open(self, error: Exception) -> None:
        if not self._closing:
            self._fail(error)

    def seal(self) -> None:
        """The stream is over: what came is in QEMU and its memory when this returns, and nothing more gets there.

        Whatever comes later fails the sink as Corrupt. Corrupt if QEMU does not take what came, though it was whole.
        """
        with self._taking:
            self._sealed = True
        with self._moved:
            if not self._moved.wait_for(lambda: self._given == self.proxy.raw_bytes, SEAL_S):
                raise Corrupt(
                    f"QEMU says that its memory is whole, and has taken {self._given} of {self.proxy.raw_bytes} bytes "
                    "of the stream: run the same haulier at both sites"
                )

    def close(self) -> None:
        self._closing = True
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        with contextlib.suppress(queue.Full):
            self._pieces.put_nowait(None)
        for thread in self._threads:
            thread.join(10)
        self._stream.close()
        if self._urgent is not None:
            self._urgent.close()

    def _batch(self, data: bytes) -> None:
        if self.error is not None or self._closing:
            return
        try:
            with self._taking:
                if self._sealed:
                    raise Corrupt("more memory came after all of it was there: run the same haulier at both sites")
                piece = self.proxy.take(data)
            while piece is not None and not self._closing:
                try:
                    self._pieces.put(piece, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._urgent is not None:
                self._urgent.go_on()
        except (OSError, HaulierError) as error:
            if not self._closing:
                self._fail(error)

    def _next(self) -> Piece | None:
        """What QEMU is to be given next. While nothing comes the mirror is made smaller."""
        while True:
            try:
                return self._pieces.get(timeout=QUIET_S)
            except queue.Empty:
                mirror = self.proxy.mirror
                if mirror is None or not mirror.pack():
                    return self._pieces.get()

    def _give(self) -> None:
        """Beside the decoder: QEMU takes what was decoded while the next batch is being decoded."""
        try:
            while (piece := self._next()) is not None and not self._closing:
                piece.load()
                self._stream.sendall(piece.data)
                if not piece.raw_bytes:
                    continue
                with self._moved:
                    self._given += piece.raw_bytes
                    self._moved.notify_all()
                self.waits.came(time.monotonic(), piece.gidx)
                self._carrier.send(Channel.DELIVERED, _U64.pack(self._given), urgent=True)
        except (OSError, HaulierError) as error:
            if not self._closing:
                self._fail(error)

    def _return_path(self) -> None:
        try:
            while data := self._stream.recv(65536):
                self._carrier.send(Channel.RETURN_PATH, data, urgent=True)
                if self.proxy.mirror is not None:
                    self.waits.said(time.monotonic(), data, self.proxy.mirror)
        except (OSError, PeerError) as error:
            if not self._closing:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self._failed(error)
