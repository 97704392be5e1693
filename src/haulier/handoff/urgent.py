"""Pages that a guest waits for, on a connection that QEMU has for them alone (its postcopy-preempt).

They overtake everything that is on its way on the main stream, in QEMU and in the session. They go compressed, but
without references to what both sites have: the mirrors follow the main stream, and these pages come at no certain place
of it.

A message is u64 xxh3-64 of the bytes, u32 their number, both little-endian, and the bytes through zstd; the first one
is empty, and says that QEMU has made its connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import xxhash

from haulier.compress import zstd
from haulier.errors import Corrupt, GuestError, HaulierError
from haulier.handoff.messages import Channel

log = logging.getLogger(__name__)

READ: Final = 64 << 10
LEVEL: Final = 1
ACCEPT_S: Final = 30.0
_HEAD: Final = struct.Struct("<QI")


class Carrier(Protocol):
    """What is needed of a session."""

    def send(self, channel: int, payload: bytes, *, urgent: bool = False) -> None: ...
    def on(self, channel: int, callback: Callable[[bytes], None]) -> None: ...


def pack(data: bytes) -> bytes:
    """The message that carries these bytes, READ at most."""
    return _HEAD.pack(xxhash.xxh3_64_intdigest(data), len(data)) + zstd.compress(data, LEVEL)


def unpack(message: bytes) -> bytes:
    """The bytes of a message. Corrupt if it is none, or they are others."""
    if len(message) < _HEAD.size:
        raise Corrupt("a message with urgent pages is shorter than its head")
    checksum, length = _HEAD.unpack_from(message)
    if length > READ:
        raise Corrupt(f"a message with urgent pages announces {length} bytes, which is too much")
    decompressor = zstd.ZstdDecompressor()
    try:
        data = decompressor.decompress(message[_HEAD.size :], length + 1)
    except zstd.ZstdError as error:
        raise Corrupt(f"a message with urgent pages cannot be decompressed: {error}") from None
    if len(data) != length or not decompressor.eof or xxhash.xxh3_64_intdigest(data) != checksum:
        raise Corrupt("a message with urgent pages does not match its checksum")
    return data


class UrgentPump:
    """At the source: QEMU connects first with its stream (`stream`), then, once it needs it, with urgent pages."""

    def __init__(self, path: Path, carrier: Carrier) -> None:
        """Listens at `path` from now on."""
        self.raw = 0
        self._path, self._carrier = path, carrier
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(2)
        self._connection: socket.socket | None = None
        self._closing = False
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

    def close(self) -> None:
        """QEMU sees its second connection closed. Waits for the thread."""
        self._closing = True
        for end in (self._listener, self._connection):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(10)
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            self._connection, _ = self._listener.accept()
            self._carrier.send(Channel.URGENT, pack(b""), urgent=True)
            while data := self._connection.recv(READ):
                self.raw += len(data)
                self._carrier.send(Channel.URGENT, pack(data), urgent=True)
        except (OSError, HaulierError) as error:
            if not self._closing:
                log.warning("urgent pages: %s", error)


class UrgentSink:
    """At the target: gives QEMU what comes for its second connection, which is made when the source's is."""

    def __init__(self, connect: Callable[[], socket.socket], carrier: Carrier, came: Callable[[bytes], None]) -> None:
        """`came` takes the bytes that QEMU was given."""
        self._connect, self._came = connect, came
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

    def _take(self, message: bytes) -> None:
        try:
            data = unpack(message)
            if self._socket is None:
                self._socket = self._connect()
            self._socket.sendall(data)
        except (OSError, HaulierError) as error:
            self._failed(error)
            return
        self._came(data)
