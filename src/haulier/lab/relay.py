"""The relay of one link: a process between two TUN interfaces, one in each site's namespace.

    python -m haulier.lab.relay LAB LINK INSTANCE < config.json

It opens both interfaces, goes back to the namespace it came from, listens on a control socket, forks, and the child
carries packets until SIGTERM while the first process prints {"pid", "started"} and ends. LAB, LINK and INSTANCE
are there to be found in the process table when nothing else is left.

Control: a unix stream socket; one JSON `Request` a line and connection, one JSON `Reply` back.
"""

from __future__ import annotations

import fcntl
import gc
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import msgspec

from haulier.errors import UNDECODABLE, HaulierError, Unsupported
from haulier.lab import namespaces, processes
from haulier.lab.shaper import Counts, Shape, Shaper

_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_BATCH: Final = 64
"""Packets read from one interface before the other gets its turn."""
_EARLY: Final = 0.0005
"""epoll wakes on whole milliseconds: half of one too early or too late is right on average."""
_MAX_REQUEST: Final = 65536
_MAX_CLIENTS: Final = 16


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a relay needs to start. `a`, `b`: namespaces; `seed`: of jitter and loss."""

    a: str
    b: str
    interface: str
    mtu: int
    socket: str
    log: str
    seed: int
    a_to_b: Shape
    b_to_a: Shape


class Started(msgspec.Struct, frozen=True):
    """What the launched relay prints."""

    pid: int
    started: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """New shapes for the given directions (None: unchanged); an empty request only asks."""

    a_to_b: Shape | None = None
    b_to_a: Shape | None = None


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One direction as it is now."""

    shape: Shape
    counts: Counts
    queued_bytes: int


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Both directions and the relay's CPU seconds; or an error, and nothing was changed."""

    a_to_b: Way | None = None
    b_to_a: Way | None = None
    cpu_s: float = 0.0
    error: str = ""


def open_tun(namespace: str, name: str) -> int:
    """Opens (and so makes) a TUN interface in a namespace. The calling thread stays in that namespace."""
    namespaces.enter(str(namespaces.RUN_NETNS / namespace))
    try:
        handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unsupported(f"cannot open /dev/net/tun ({error.strerror}): load the module tun (modprobe tun)") from None
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return handle


class Relay:
    """The loop: two interfaces, two shapers, one control socket, one epoll."""

    def __init__(self, ends: tuple[int, int], shapers: tuple[Shaper, Shaper], control: socket.socket, mtu: int) -> None:
        self._shapers = shapers
        self._control = control
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        self._read_size = mtu + 64
        # An interface's packets go into one shaper; what comes out is written to the other interface.
        self._by_end = {ends[0]: shapers[0], ends[1]: shapers[1]}
        self._outlets = ((shapers[0], ends[1]), (shapers[1], ends[0]))
        self._poll = select.epoll()
        for handle in (*ends, control.fileno()):
            self._poll.register(handle, select.EPOLLIN)

    def run(self) -> NoReturn:
        """Carries packets until the process is ended."""
        clock = time.monotonic
        by_end = self._by_end
        while True:
            timeout = -1.0
            dues = [due for shaper in self._shapers if (due := shaper.due()) is not None]
            if dues:
                timeout = max(0.0, min(dues) - _EARLY - clock())
            for handle, _ in self._poll.poll(timeout):
                shaper = by_end.get(handle)
                if shaper is not None:
                    self._take(handle, shaper)
                elif handle == self._control.fileno():
                    self._accept()
                else:
                    self._serve(handle)
            self._give(clock() + _EARLY)

    def _take(self, handle: int, shaper: Shaper) -> None:
        now = time.monotonic()
        size = self._read_size
        for _ in range(_BATCH):
            try:
                packet = os.read(handle, size)
            except BlockingIOError:
                return
            shaper.push(now, packet)

    def _give(self, now: float) -> None:
        for shaper, handle in self._outlets:
            for packet in shaper.ready(now):
                try:
                    os.write(handle, packet)
                except OSError:
                    # The interface is down or has no room: to the sender it is a lost packet, as it would be there.
                    continue

    def _accept(self) -> None:
        try:
            client, _ = self._control.accept()
        except OSError:
            return
        if len(self._clients) >= _MAX_CLIENTS:
            client.close()
            return
        client.setblocking(False)
        self._clients[client.fileno()] = (client, bytearray())
        self._poll.register(client.fileno(), select.EPOLLIN)

    def _serve(self, handle: int) -> None:
        client, buffer = self._clients[handle]
        try:
            data = client.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        buffer += data
        if data and b"\n" not in buffer and len(buffer) <= _MAX_REQUEST:
            return
        if b"\n" in buffer:
            reply = self.answer(bytes(buffer.partition(b"\n")[0]))
            try:
                client.sendall(msgspec.json.encode(reply) + b"\n")
            except OSError:
                pass
        self._poll.unregister(handle)
        del self._clients[handle]
        client.close()

    def answer(self, line: bytes) -> Reply:
        """Does what a request line asks."""
        try:
            request = msgspec.json.decode(line, type=Request)
        except UNDECODABLE as error:
            return Reply(error=f"a request that cannot be read: {error}")
        now = time.monotonic()
        ways: list[Way] = []
        for shaper, shape in zip(self._shapers, (request.a_to_b, request.b_to_a), strict=True):
            if shape is not None:
                shaper.reshape(now, shape)
            ways.append(Way(shape=shaper.shape, counts=shaper.counts, queued_bytes=shaper.queued_bytes))
        return Reply(a_to_b=ways[0], b_to_a=ways[1], cpu_s=time.process_time())


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    """Entry of `python -m haulier.lab.relay`."""
    config = msgspec.json.decode(sys.stdin.buffer.read(_MAX_REQUEST), type=Config)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        end_a = open_tun(config.a, config.interface)
        end_b = open_tun(config.b, config.interface)
        namespaces.enter(home)
    except (HaulierError, OSError) as error:
        sys.exit(str(error))
    os.close(home)
    shapers = (
        Shaper(config.a_to_b, random.Random(config.seed * 2)),
        Shaper(config.b_to_a, random.Random(config.seed * 2 + 1)),
    )
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    Path(config.socket).unlink(missing_ok=True)
    control.bind(config.socket)
    Path(config.socket).chmod(0o600)
    control.listen(_MAX_CLIENTS)
    control.setblocking(False)

    sys.stdout.flush()
    # Forked by init's leave: whoever brought the lab up may end, and need not wait for us when we end.
    child = os.fork()
    if child:
        start = processes.started(child)
        if start is None:
            sys.exit("the relay ended at once")
        print(msgspec.json.encode(Started(child, start)).decode(), flush=True)
        os._exit(0)
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(config.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (null, 1), (log, 2)):
        os.dup2(source, target)
    signal.signal(signal.SIGTERM, _stop)
    try:
        # A link's timing must not depend on how busy the guests are.
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    except OSError:
        pass
    gc.freeze()
    gc.disable()
    Relay((end_a, end_b), shapers, control, config.mtu).run()


if __name__ == "__main__":
    main()
