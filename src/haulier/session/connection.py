"""One TLS connection, non-blocking: dial or accept, TLS, hello, then frames. Only the I/O thread touches it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import selectors
import socket
import ssl
import struct
import termios
from dataclasses import dataclass
from enum import Enum
from typing import Final

from haulier.errors import HaulierError, PeerError
from haulier.session import mptcp
from haulier.session.frames import Frame, FrameReader
from haulier.session.handshake import ConnectorHandshake, ListenerHandshake, Refused
from haulier.session.leisure import Leisure
from haulier.session.names import Where
from haulier.session.tls import TlsConfig, explain

_READS: Final = 32
"""TLS records taken from one connection before the others get their turn."""
_RECORD: Final = 22
"""What TLS 1.3 adds to a record: header 5, type 1, tag 16."""
_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", 18)
_NOTSENT_LOWAT: Final = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
_LEAST_LOWAT: Final = 16 * 1024

_TCP_INFO: Final = 160
"""struct tcp_info of linux/tcp.h up to tcpi_data_segs_out (Linux 4.6)."""
_MAX_PACING_RATE: Final = getattr(socket, "SO_MAX_PACING_RATE", 47)
_U32: Final = struct.Struct("=I")
_COUNTS: Final = struct.Struct("=IIII")


@dataclass(frozen=True)
class PathAddress:
    """Where a path leads: the listener's host and port; `source` is the own address or interface to leave by.

    `local`: the own address on that interface. `cap_bps`: bits per second that it may carry, 0 = no limit. `cost`: a
    path that costs more than the session may spend is kept in reserve. `through`: the site that carries it on from
    there, "" for none.
    """

    host: str
    port: int
    source: str | None = None
    local: str | None = None
    cap_bps: float = 0.0
    cost: int = 0
    through: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        there = f"{host}:{self.port} through {self.through}" if self.through else f"{host}:{self.port}"
        return f"{self.source}>{there}" if self.source else there


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class Stage(Enum):
    """How far a connection is."""

    DIALLING = 1
    TLS = 2
    HELLO = 3
    OPEN = 4
    LEAVING = 5
    CLOSED = 6


class Connection:
    """`work()` takes it as far as it gets without waiting; `events` says what to wait for then."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        tls: TlsConfig,
        context: ssl.SSLContext | None,
        handshake: ConnectorHandshake | ListenerHandshake | None,
        deadlines: tuple[float, float],
        dead_s: float,
        early: bytes = b"",
    ) -> None:
        """Without `handshake` it is open: it was handed over, after `early` had been read from it."""
        self.name = name
        self.peer = tls.peer
        self.stage = Stage.TLS if isinstance(handshake, ListenerHandshake) else Stage.DIALLING
        if handshake is None:
            self.stage = Stage.OPEN
        self.handshake = handshake
        self.dial_by, self.open_by = deadlines
        self.hello_at = 0.0
        self.rtt: float | None = None
        self.leisure = Leisure()
        self.rests_until = 0.0
        """What comes is left in the kernel until then."""
        self.tx = 0
        self.rx = 0
        self.events = selectors.EVENT_READ if handshake is None else selectors.EVENT_WRITE
        self.more_to_read = handshake is None  # TLS may have decrypted more than was read
        self._tls = tls
        self._context = context
        self._reader = FrameReader()
        self._early = early
        self._out = memoryview(b"")
        self._lowat = 0
        self.mptcp = sock.proto == mptcp.IPPROTO_MPTCP
        """Made to speak MPTCP; whether it does, `subflows` tells."""
        self._tcp = sock.family != socket.AF_UNIX
        self._raw: socket.socket = sock
        if self._tcp:
            self._set_up(dead_s)
        self.shorten_queue(4 * _LEAST_LOWAT)

    def _set_up(self, dead_s: float) -> None:
        sock = self._raw
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # An answer follows nearly everything that is said here until data flows, and takes the ack with it.
        with contextlib.suppress(OSError):  # Multipath TCP has no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, int(dead_s * 2000))
        except OSError:
            if not self.mptcp:
                raise
            # MPTCP has none; silence is noticed by our own pings.

    @classmethod
    def dial(cls, address: PathAddress, where: Where, *, with_mptcp: bool = False) -> socket.socket:
        """A socket on its way to `address`, which is found at `where`. Raises OSError."""
        sock = socket.socket(where.family, socket.SOCK_STREAM, mptcp.protocol(with_mptcp))
        try:
            sock.setblocking(False)
            local = address.local
            if address.source and _is_address(address.source):
                local = address.source
            elif address.source and not with_mptcp:
                # All subflows of MPTCP would be bound to it.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, address.source.encode())
            if address.cap_bps:
                # TCP paces itself; no queueing discipline has to help. It counts IP packets.
                sock.setsockopt(socket.SOL_SOCKET, _MAX_PACING_RATE, max(1, int(address.cap_bps / 8)))
            if local:
                sock.bind((local, 0))
            code = sock.connect_ex(where.address)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        return sock

    def fileno(self) -> int:
        """For the selector."""
        return self._raw.fileno()

    def awaited(self, now: float) -> int:
        """What to wait for, as `events`; 0 while it rests."""
        return self.events & ~selectors.EVENT_READ if self.rests_until > now else self.events

    @property
    def blocked(self) -> bool:
        """Bytes wait for the kernel to take them."""
        return bool(self._out)

    def shorten_queue(self, most: int) -> None:
        """Keep no more than about `most` bytes in the kernel that TCP has not sent: they could not be overtaken."""
        most = max(_LEAST_LOWAT, min(most, 1 << 20))
        if not self._tcp or (self._lowat and self._lowat / 2 < most < self._lowat * 2):
            return
        self._lowat = most
        self._raw.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, most)

    def subflows(self) -> int:
        """Subflows of MPTCP; 0 where it is plain TCP."""
        return mptcp.subflows(self._raw) if self.mptcp else 0

    def least_rtt(self) -> float | None:
        """The shortest round trip that TCP has seen, in seconds; None where there is no such thing."""
        if self.mptcp or not self._tcp:
            return None
        info = self._raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO)
        (least_us,) = _U32.unpack_from(info, 148)
        return least_us / 1e6 if 0 < least_us < 1 << 31 else None

    def tcp_state(self) -> tuple[int, float, float] | None:
        """What TCP says of itself; None where it is none, or MPTCP, which would tell of its first subflow alone.

        Bytes in flight or not sent yet, the smoothed round trip in seconds, and the share of segments sent again.
        """
        if self.mptcp or not self._tcp:
            return None
        info = self._raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO)
        (mss,) = _U32.unpack_from(info, 16)
        unacked, sacked, lost, again = _COUNTS.unpack_from(info, 24)
        (rtt_us,) = _U32.unpack_from(info, 68)
        (not_sent,) = _U32.unpack_from(info, 144)
        (resent,) = _U32.unpack_from(info, 100)
        (segments,) = _U32.unpack_from(info, 156)
        # Packets of acks are small: never more than what is in the socket altogether.
        (held,) = _U32.unpack(fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, bytes(4)))
        flight = min(max(unacked - sacked - lost + again, 0) * mss + not_sent, held)
        return flight, rtt_us / 1e6, min(1.0, resent / segments) if segments else 0.0

    # -- before it is open

    def advance(self, now: float) -> bool:
        """Go on with dialling, TLS and hello; True once open. Raises HaulierError, Refused, OSError."""
        if self.stage is Stage.DIALLING:
            code = self._raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            try:
                self._raw.getpeername()
            except OSError:
                return False  # woken for nothing: not connected yet
            self.stage = Stage.TLS
        if self.stage is Stage.TLS and not self._shake_hands(now):
            return False
        if self.stage is Stage.HELLO:
            self.flush()
            if not self._out:
                self._hello(now)
        return self.stage is Stage.OPEN

    def _shake_hands(self, now: float) -> bool:
        server = isinstance(self.handshake, ListenerHandshake)
        try:
            if not isinstance(self._raw, ssl.SSLSocket):
                assert self._context is not None
                self._raw = self._context.wrap_socket(
                    self._raw, server_side=server, do_handshake_on_connect=False, suppress_ragged_eofs=True
                )
            self._raw.do_handshake()
        except ssl.SSLWantReadError:
            self.events = selectors.EVENT_READ
            return False
        except ssl.SSLWantWriteError:
            self.events = selectors.EVENT_WRITE
            return False
        except ssl.SSLError as e:
            raise explain(e, self.peer) from e
        assert isinstance(self._raw, ssl.SSLSocket) and self.handshake is not None
        self.peer = f"site {self._tls.check_peer(self._raw)}"
        self.handshake.peer = self.peer
        self.stage = Stage.HELLO
        self.hello_at = now
        self.put(self.handshake.start())
        self.events = selectors.EVENT_READ
        return True

    def _hello(self, now: float) -> None:
        assert self.handshake is not None
        frames, closed = self._read(one=True)
        for frame in frames:
            try:
                answer = self.handshake.receive(frame)
            except Refused:
                if isinstance(self.handshake, ListenerHandshake):
                    self.put(self.handshake.answer)
                    self.flush()
                raise
            if answer and not self.handshake.done:
                self.hello_at = now  # the connector's answer: the welcome comes one round trip later
            self.put(answer)
            if self.handshake.done:
                self.rtt = now - self.hello_at
                self.stage = Stage.OPEN
                self.flush()
                return
        if closed:
            raise PeerError(f"{self.peer} closed the connection before it said hello: see its log")
        self.flush()

    # -- reading and writing

    def read(self) -> tuple[list[Frame], bool]:
        """Frames that have come in, and whether the peer closed. Raises Corrupt, OSError."""
        return self._read(one=False)

    def _read(self, *, one: bool) -> tuple[list[Frame], bool]:
        reader = self._reader
        frames = list(reader) if not one else []
        if self._early:
            early, self._early = self._early, b""
            self.rx += len(early) + _RECORD
            frames += reader.feed(early)
        self.more_to_read = False
        if one and (frame := next(reader, None)) is not None:
            return [frame], False
        try:
            for _ in range(_READS):
                count = self._raw.recv_into(reader.space())
                if not count:
                    return frames, True
                self.rx += count + _RECORD
                reader.filled(count)
                if one:
                    if (frame := next(reader, None)) is not None:
                        self.more_to_read = True
                        return [frame], False
                else:
                    frames.extend(reader)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return frames, False
        except ssl.SSLError as e:
            raise explain(e, self.peer) from e
        self.more_to_read = True
        return frames, False

    def put(self, data: bytes) -> None:
        """Queue bytes; call `flush` next."""
        if data:
            self._out = memoryview(bytes(self._out) + data if self._out else data)

    def flush(self) -> None:
        """Write what is queued as far as the kernel takes it; sets `events`. Raises OSError."""
        out = self._out
        try:
            while out:
                count = self._raw.send(out)
                self.tx += count + _RECORD
                out = out[count:]
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError, BlockingIOError):
            pass
        except ssl.SSLError as e:
            raise explain(e, self.peer) from e
        self._out = out
        self.events = selectors.EVENT_READ | (selectors.EVENT_WRITE if out else 0)

    def leave(self) -> None:
        """No more output: lets the peer read what was sent. Wait for `drained()`, then close."""
        if self.stage is not Stage.OPEN or self._out:
            return
        self.stage = Stage.LEAVING
        try:
            self._raw.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def drained(self) -> bool:
        """After `leave`: the peer has closed as well."""
        try:
            while True:
                if not self._raw.recv(65536):
                    return True
        except BlockingIOError:
            return False
        except (OSError, HaulierError):
            return True

    def close(self) -> None:
        """Close the socket."""
        self.stage = Stage.CLOSED
        self._raw.close()
