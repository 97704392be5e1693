"""Clients of the lab's containers: they keep their connections, and note every answer, gap and error."""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

from haulier.errors import GuestError
from haulier.lab.lab import Lab
from haulier.lab.services import PORT

CONNECT_S = 60.0
ANSWER_S = 120.0


def connect(lab: Lab, site: str, host: str, port: int, timeout: float = ANSWER_S) -> socket.socket:
    """A TCP connection from a site of the lab; waits until the service listens."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            made = lab.call(site, lambda: socket.create_connection((host, port), timeout=2))
            made.settimeout(timeout)
            return made
        except OSError as error:
            if time.monotonic() > deadline:
                raise GuestError(f"nobody listens at {host}:{port}: {error}") from error
            time.sleep(0.05)


class Talk:
    """One connection to a service of `services`, kept for all questions."""

    def __init__(self, lab: Lab, site: str, host: str, port: int = PORT) -> None:
        self._sock = connect(lab, site, host, port)
        self._file = self._sock.makefile("rb")

    def ask(self, cmd: str, **more: Any) -> dict[str, Any]:
        """Raises OSError when the connection is lost, GuestError for an answer that is none."""
        self._sock.sendall(json.dumps({"cmd": cmd, **more}).encode() + b"\n")
        line = self._file.readline(1 << 20)
        if not line:
            raise ConnectionError("the service hung up")
        answer: dict[str, Any] = json.loads(line)
        if not answer.get("ok"):
            raise GuestError(f"the service says {answer.get('error')}")
        return answer

    def close(self) -> None:
        self._file.close()
        self._sock.close()


class Player:
    """Hears every tick of a game over TCP, and asks for it over UDP five times a second."""

    def __init__(self, lab: Lab, site: str, host: str) -> None:
        self.ticks: list[tuple[int, float]] = []
        self.udp: list[tuple[int, float]] = []
        self.errors: list[str] = []
        self._host = host
        self._tcp = connect(lab, site, host, PORT + 1, timeout=60)
        self._datagrams = lab.call(site, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._datagrams.settimeout(0.2)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._ask)]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        file = self._tcp.makefile("rb")
        try:
            while not self._over.is_set():
                line = file.readline(65536)
                if not line:
                    raise ConnectionError("hung up")
                self.ticks.append((int(json.loads(line)["tick"]), time.monotonic()))
        except (OSError, ValueError) as error:
            if not self._over.is_set():
                self.errors.append(repr(error))

    def _ask(self) -> None:
        while not self._over.wait(0.2):
            try:
                self._datagrams.sendto(b"where", (self._host, PORT + 2))
                answer = json.loads(self._datagrams.recv(2048))
                self.udp.append((int(answer["tick"]), time.monotonic()))
            except TimeoutError:
                continue
            except (OSError, ValueError) as error:
                self.errors.append(repr(error))

    def gap(self, since: float = 0.0) -> float:
        """The longest time without a tick since a moment of the monotonic clock, in seconds."""
        times = [at for _, at in self.ticks if at >= since]
        return max((b - a for a, b in itertools.pairwise(times)), default=float("inf"))

    def wrong(self) -> list[str]:
        """What must not be: errors, ticks that are missing or come twice, a world that went back."""
        found = list(self.errors)
        numbers = [tick for tick, _ in self.ticks]
        found += [f"tick {b} after {a}" for a, b in itertools.pairwise(numbers) if b != a + 1]
        heard = [tick for tick, _ in self.udp]
        found += [f"over UDP {b} after {a}" for a, b in itertools.pairwise(heard) if b < a]
        return found

    def close(self) -> None:
        self._over.set()
        for sock in (self._tcp, self._datagrams):
            with_shutdown(sock)
        for thread in self._threads:
            thread.join(5)


def with_shutdown(sock: socket.socket) -> None:
    """Closes a socket that another thread may wait on."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()


class Download:
    """Fetches a file over HTTP in the background and hashes it."""

    def __init__(self, lab: Lab, site: str, host: str, path: str) -> None:
        self.received = 0
        self.longest_gap = 0.0
        self.error = ""
        self.digest = ""
        self._sock = connect(lab, site, host, 80, timeout=60)
        self._sock.sendall(f"GET {path} HTTP/1.0\r\nHost: lab\r\n\r\n".encode())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        hasher = hashlib.sha256()
        try:
            with self._sock.makefile("rb") as file:
                while file.readline(65536) not in (b"\r\n", b""):
                    pass
                last = time.monotonic()
                while data := file.read1(1 << 18):
                    hasher.update(data)
                    self.received += len(data)
                    now = time.monotonic()
                    self.longest_gap, last = max(self.longest_gap, now - last), now
            self.digest = hasher.hexdigest()
        except OSError as error:
            self.error = repr(error)

    def wait(self, timeout: float) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.error = "not done in time"

    def close(self) -> None:
        with_shutdown(self._sock)


class Redis:
    """As much of Redis' protocol as is needed, over one connection; a writer that notes what was acknowledged."""

    def __init__(self, lab: Lab, site: str, host: str) -> None:
        self._sock = connect(lab, site, host, 6379)
        self._file = self._sock.makefile("rb")
        self.acknowledged = 0
        self.errors: list[str] = []
        self.longest_gap = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def call(self, *words: str | int) -> Any:
        """One command; GuestError for an error of Redis."""
        plain = [str(word).encode() for word in words]
        self._sock.sendall(b"*%d\r\n" % len(plain) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in plain))
        return self._answer()

    def _answer(self) -> Any:
        line = self._file.readline(65536)
        if not line:
            raise ConnectionError("redis hung up")
        kind, rest = line[:1], line[1:].strip()
        if kind == b"-":
            raise GuestError(f"redis says {rest.decode()}")
        if kind == b":":
            return int(rest)
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._file.read(size + 2)[:-2].decode()
        return rest.decode()

    def fill(self, count: int) -> None:
        """Sets key:0 to key:COUNT-1, by a script of its own."""
        self.call("EVAL", f"for i=0,{count - 1} do redis.call('SET','key:'..i,'value:'..i) end return 1", 0)

    def set_many(self, pairs: Iterable[tuple[str, str]]) -> None:
        """SETs all of them in one go, and reads all answers; keep it to a few hundred kilobytes of keys."""
        words = [(b"SET", key.encode(), value.encode()) for key, value in pairs]
        lines = (b"*3\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in some) for some in words)
        self._sock.sendall(b"".join(lines))
        for _ in words:
            self._answer()

    def write_on(self) -> None:
        """Sets w:0, w:1, ... one after the other from now on, each acknowledged before the next."""
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        last = time.monotonic()
        while not self._over.is_set():
            try:
                answer = self.call("SET", f"w:{self.acknowledged}", f"value {self.acknowledged}")
                if answer != "OK":
                    raise GuestError(f"redis answers {answer!r}")
                self.acknowledged += 1
            except (OSError, GuestError) as error:
                self.errors.append(repr(error))
                return
            now = time.monotonic()
            self.longest_gap, last = max(self.longest_gap, now - last), now
            self._over.wait(0.002)

    def stop_writing(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(60)
            self._thread = None
        self._over.clear()

    def lost(self) -> list[int]:
        """Acknowledged writes that are not there."""
        return [n for n in range(self.acknowledged) if self.call("GET", f"w:{n}") != f"value {n}"]

    def close(self) -> None:
        self.stop_writing()
        self._file.close()
        self._sock.close()
