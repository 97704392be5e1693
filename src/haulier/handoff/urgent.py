"""Pages that a guest waits for, on a connection that QEMU has for them alone (its postcopy-preempt).

They overtake everything that is on its way on the main stream, in QEMU and in the session. They go compressed, and as
differences to what the target has by then (`haulier.memory.references`): the mirrors follow the main stream and not
these pages, so of a page that is still to come they both hold what pre-copy brought.

A message is u64 xxh3-64 of the bytes, u32 their number, u32 how many batches of the main stream the target must have
taken before, u16 number of entries of the table, all little-endian; the table; and the bytes, with differences in them,
through zstd. The first message is empty, and says that QEMU has made its connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import xxhash

from haulier.compress import zstd
from haulier.errors import Corrupt, GuestError, HaulierError
from haulier.handoff.messages import Channel
from haulier.memory.references import PLACE, Referring, resolve
from haulier.memory.target_proxy import TargetProxy
from haulier.units import PAGE

log = logging.getLogger(__name__)

READ: Final = 64 << 10
LEVEL: Final = 1
ACCEPT_S: Final = 30.0
MOST_WAITING: Final = 4096
"""Messages that may wait at the target for what they refer to: many times what a guest's processors ask for, and ..."""
MOST_WAITING_BYTES: Final = 16 << 20
"""... bytes."""
MOST_AHEAD: Final = 1 << 16
"""Batches that a message may be ahead of the main stream: far more than its window holds."""
_HEAD: Final = struct.Struct("<QIIH")


class Carrier(Protocol):
    """What is needed of a session."""

    def send(self, channel: int, payload: bytes, *, urgent: bool = False) -> None: ...
    def on(self, channel: int, callback: Callable[[bytes], None]) -> None: ...


def pack(data: bytes, needs: int = 0, differences: bytes | None = None, table: bytes = b"") -> bytes:
    """The message that carries these bytes, READ at most; `differences` and `table` as Referring gives them."""
    head = _HEAD.pack(xxhash.xxh3_64_intdigest(data), len(data), needs, len(table) // PLACE.itemsize)
    return head + table + zstd.compress(data if differences is None else differences, LEVEL)


def needs(message: bytes) -> int:
    """How many batches of the main stream must have been taken before this message. Corrupt if it is none."""
    return _head(message)[2]


def _head(message: bytes) -> tuple[int, int, int, int]:
    if len(message) < _HEAD.size:
        raise Corrupt("a message with urgent pages is shorter than its head")
    checksum, length, before, places = _HEAD.unpack_from(message)
    return checksum, length, before, places


def unpack(message: bytes, proxy: TargetProxy | None = None) -> bytes:
    """The bytes of a message. Corrupt if it is none, or they are others. `proxy` has what it may refer to."""
    checksum, length, _, places = _head(message)
    if length > READ or places > READ // PAGE:
        raise Corrupt(f"a message with urgent pages announces {length} bytes, {places} pages, which is too much")
    table = message[_HEAD.size : _HEAD.size + places * PLACE.itemsize]
    decompressor = zstd.ZstdDecompressor()
    try:
        data = decompressor.decompress(message[_HEAD.size + places * PLACE.itemsize :], length + 1)
    except zstd.ZstdError as error:
        raise Corrupt(f"a message with urgent pages cannot be decompressed: {error}") from None
    if len(data) == length and decompressor.eof:
        data = resolve(data, table, proxy.mirror if proxy else None, proxy.reader if proxy else None)
        if xxhash.xxh3_64_intdigest(data) == checksum:
            return data
    raise Corrupt("a message with urgent pages does not match its checksum")


class UrgentPump:
    """At the source: QEMU connects first with its stream (`stream`), then, once it needs it, with urgent pages."""

    def __init__(self, path: Path, carrier: Carrier) -> None:
        """Listens at `path` from now on."""
        self.raw = self.wire = 0
        self._referring: Referring | None = None
        self._needs = 0
        self._path, self._carrier = path, carrier
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(2)
        self._connection: socket.socket | None = None
        self._closing = False
        self._plain = False
        """Nothing is referred to any more."""
        self._failed: Callable[[Exception], None] = lambda _: None
        self._thread = threading.Thread(target=self._run, name="urgent-pages", daemon=True)

    def stream(self) -> socket.socket:
        """QEMU's main connection, once it was told to migrate. GuestError if it makes none in time."""
        self._listener.settimeout(ACCEPT_S)
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            raise GuestError(f"QEMU does not send its memory to {self._path}: {error}") from error
        self._listener.settimeout(None)
        self._thread.start()
        return connection

    def refer(self, referring: Referring, needs: int) -> None:
        """Pre-copy is over: from now on pages may be differences to what `needs` batches of the stream brought."""
        self._needs, self._referring = needs, referring

    def on_failure(self, failed: Callable[[Exception], None]) -> None:
        """Have it told, on a thread of its own, that no more urgent pages go; QEMU has seen its connection closed."""
        self._failed = failed

    @property
    def referred(self) -> int:
        """Pages that went as differences."""
        return self._referring.pages if self._referring is not None else 0

    def close(self) -> None:
        """QEMU sees its second connection closed. Waits for the thread."""
        self._closing = True
        self._hang_up()
        if self._thread.is_alive():
            self._thread.join(10)
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        self._path.unlink(missing_ok=True)

    def _hang_up(self) -> None:
        for end in (self._listener, self._connection):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _message(self, data: bytes) -> bytes:
        referring = self._referring
        # Once some went without, it does not know where a record begins.
        if self._plain or referring is None or not (self.raw == 0 or referring.begun):
            return pack(data)
        try:
            differences, table = referring.refer(data)
        except Exception as error:
            # The guest waits for these pages, and they need no help: the store, for one, may be of none.
            log.warning("urgent pages go as they are from now on: %r", error)
            self._plain = True
            return pack(data)
        return pack(data, self._needs if table else 0, differences, table)

    def _run(self) -> None:
        try:
            self._connection, _ = self._listener.accept()
            self._carrier.send(Channel.URGENT, pack(b""), urgent=True)
            while data := self._connection.recv(READ):
                message = self._message(data)
                self.raw += len(data)
                self.wire += len(message)
                self._carrier.send(Channel.URGENT, message, urgent=True)
        except Exception as error:
            if self._closing:
                return
            log.warning("urgent pages: %r", error)
            # Left open, QEMU would write into it until it is full, and the guest wait for pages that never go.
            self._hang_up()
            self._failed(error)


class UrgentSink:
    """At the target: gives QEMU what comes for its second connection, which is made when the source's is."""

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        carrier: Carrier,
        came: Callable[[bytes], None],
        proxy: TargetProxy | None = None,
    ) -> None:
        """`came` takes the bytes that QEMU was given; `proxy` has what pages may refer to, see `go_on`."""
        self._connect, self._came, self._proxy = connect, came, proxy
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._broken = False
        """After what went wrong QEMU gets nothing: it would take what follows for something else."""
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._failed: Callable[[Exception], None] = lambda _: None
        carrier.on(Channel.URGENT, self._take)

    def on_failure(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def go_on(self) -> None:
        """The proxy has taken a batch: what overtook what it refers to is given to QEMU now."""
        with self._lock:
            while self._waiting and not self._broken:
                try:
                    if self._proxy is not None and self._ahead(self._waiting[0], self._proxy) > 0:
                        return
                    message = self._waiting.popleft()
                    self._waiting_bytes -= len(message)
                    data = unpack(message, self._proxy)
                    if self._socket is None:
                        self._socket = self._connect()
                    self._socket.sendall(data)
                except (OSError, HaulierError) as error:
                    self._break(error)
                    return
                self._came(data)

    def _ahead(self, message: bytes, proxy: TargetProxy) -> int:
        """How many batches have to come before it. Corrupt for more than can be on their way."""
        ahead = needs(message) - proxy.batches
        if ahead > MOST_AHEAD:
            raise Corrupt(f"urgent pages wait for {ahead} batches of memory to come, which is too much")
        return ahead

    def _take(self, message: bytes) -> None:
        # The session lets the peer send on as soon as this returns: what waits here is bounded here.
        with self._lock:
            if self._broken:
                return
            self._waiting.append(message)
            self._waiting_bytes += len(message)
            if len(self._waiting) > MOST_WAITING or self._waiting_bytes > MOST_WAITING_BYTES:
                count, size = len(self._waiting), self._waiting_bytes
                self._break(Corrupt(f"{count} messages with urgent pages, of {size} bytes, wait, which is too much"))
                return
        self.go_on()

    def _break(self, error: Exception) -> None:
        self._broken = True
        self._waiting.clear()
        self._failed(error)
