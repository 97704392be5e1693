"""The edges of the memory path: QEMU's migration sockets on one side, the session on the other.

At the source a pump reads QEMU's stream, has it encoded and sends it, no faster than its window allows. At the target
a sink decodes, gives the exact bytes to QEMU and reports what QEMU has taken. The return path is copied untouched.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Protocol

from haulier.errors import Corrupt, HaulierError, PeerError
from haulier.handoff.convergence import Window
from haulier.handoff.messages import Channel
from haulier.memory.proxy import SourceProxy, TargetProxy

READ = 512 * 1024
"""Raw bytes in one batch at most."""
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
        self, stream: socket.socket, proxy: SourceProxy, carrier: Carrier, window: Callable[[], Window]
    ) -> None:
        self.proxy = proxy
        self.raw = 0
        self.wire = 0
        self.delivered = 0
        self.stalled_s = 0.0
        self.device_state_at = 0.0
        self.error: Exception | None = None
        self.ended = threading.Event()
        self._stream = stream
        self._carrier = carrier
        self._window = window
        self._progress = threading.Condition()
        self._closing = False
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

    def _returned(self, data: bytes) -> None:
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

    def _wait_for_room(self) -> Window:
        began = time.monotonic()
        while True:
            window = self._window()
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

    def _run(self) -> None:
        buffer = bytearray(READ)
        view = memoryview(buffer)
        try:
            while not self._closing:
                window = self._wait_for_room()
                limit = max(4096, min(READ, window.raw - (self.raw - self.delivered)))
                got = self._stream.recv_into(view[:limit])
                if not got:
                    break
                while got < limit and select.select([self._stream], [], [], IDLE_S)[0]:
                    more = self._stream.recv_into(view[got:limit])
                    if not more:
                        break
                    got += more
                with self._progress:
                    self.raw += got
                for batch in [*self.proxy.feed(bytes(view[:got])), *self.proxy.flush()]:
                    self.wire += len(batch.data)
                    self._carrier.send(Channel.MEMORY, batch.data)
                if self.proxy.device_state and not self.device_state_at:
                    self.device_state_at = time.time()
        except (OSError, HaulierError) as error:
            if not self._closing:
                self.error = error
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


class MemorySink:
    """Target side: connects to the incoming QEMU at once. `error` says what went wrong, if anything did."""

    def __init__(
        self, stream: socket.socket, proxy: TargetProxy, carrier: Carrier, failed: Callable[[Exception], None]
    ) -> None:
        self.proxy = proxy
        self.error: Exception | None = None
        self._stream = stream
        self._carrier = carrier
        self._failed = failed
        self._closing = False
        self._thread = threading.Thread(target=self._return_path, name="return-path", daemon=True)
        self._thread.start()
        carrier.on(Channel.MEMORY, self._batch)

    def close(self) -> None:
        self._closing = True
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._thread.join(10)
        self._stream.close()

    def _batch(self, data: bytes) -> None:
        if self.error is not None or self._closing:
            return
        try:
            for piece in self.proxy.feed(data):
                self._stream.sendall(piece)
            self._carrier.send(Channel.DELIVERED, _U64.pack(self.proxy.raw_bytes), urgent=True)
        except (OSError, HaulierError) as error:
            if not self._closing:
                self._fail(error)

    def _return_path(self) -> None:
        try:
            while data := self._stream.recv(65536):
                self._carrier.send(Channel.RETURN_PATH, data, urgent=True)
        except (OSError, PeerError) as error:
            if not self._closing:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self._failed(error)
