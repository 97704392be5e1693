"""The guest's own service: answers, changes memory and writes files, and knows whether any of it is wrong.

It is copied into the guest alone, so it uses the standard library only. It listens on port 7000 for JSON lines, one
object a line, one answer each: ``{"cmd": "ask", "n": 7}``. Every answer has "ok"; when that is false, "error" says why.

- ``start`` {memory_mib, pages_per_s, hot_pages, files_per_s, file_kib, random_share, read_mib,
  seed}: reads that much of the system's own files (a guest that has been up has its memory full of them), fills the
  working set,
  answers when it is full, then goes on rewriting it and writing files. Starting again starts over.
- ``ask`` {n}: the guest's name, a counter that only ever grows, SHA-256 of n, the working set's version.
- ``check`` {drop_caches}: verifies all memory and all files; answers how many were looked at and how many are bad.
- ``stop``: no more changes; what is there stays and can be checked. ``stats``: what it did so far.

Until told to start it sleeps: an idle guest stays idle. It does its work in small steps between requests, because it
is meant for guests under emulation, where Python is some twenty times slower than on the host.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import hashlib
import json
import mmap
import os
import random
import selectors
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

PORT = 7000
DIRECTORY = Path("/var/lib/haulier-workload")
PAGE = 4096
MAX_LINE = 65536
MAX_CLIENTS = 128
FILE_SLOTS = 32
SYNC_EVERY = 8
STEP_S = 0.01
"""How long the work may keep a request waiting, seconds."""
TICK_S = 0.1

Task = Generator[None, None, dict[str, Any]]

_HEADER = struct.Struct("<QIIII")
"""Of a page: seed, page number, version, zero, CRC-32 of the page with this field zero."""
_RECORD = 96
_NOTE = 46
_RECORDS = (PAGE - _HEADER.size) // _RECORD
_LETTERS = b"".join(
    letter * count
    for letter, count in zip(
        (b"e", b"t", b"a", b"o", b"i", b"n", b" ", b"s", b"r", b"h"), (96, 48, 32, 24, 16, 12, 12, 8, 4, 4), strict=True
    )
)
"""Byte to letter, with 2.7 bits of entropy a letter: what a compressor needs for a letter of English prose."""
_KEYS = ("user", "order", "device", "sensor", "invoice", "session", "route", "parcel")


class Content:
    """What pages and files are filled with: records like those of an application, and a share of random bytes."""

    def __init__(self, seed: int, random_share: float) -> None:
        self._random = random.Random(seed)
        self._share = random_share
        self._number = 0

    def page(self) -> bytes:
        """PAGE minus header bytes: with probability `random_share` incompressible, else records."""
        size = PAGE - _HEADER.size
        if self._random.random() < self._share:
            return self._random.randbytes(size)
        return self.records(_RECORDS).ljust(size, b"\n")

    def records(self, count: int) -> bytes:
        """`count` records of 96 bytes: keys that repeat, numbers that grow, text that nobody has said before."""
        text = self._random.randbytes(_NOTE * count).translate(_LETTERS)
        key, number = _KEYS[self._number // 97 % len(_KEYS)], self._number
        self._number += count
        return b"".join(
            b'{"%-8b":%010d,"state":"open","note":"%b"}\n\n'
            % (key.encode(), number + i, text[_NOTE * i : _NOTE * (i + 1)])
            for i in range(count)
        )


class WorkingSet:
    """Pages that know what they should contain: each has its seed, number, version and checksum.

    Versions are kept aside too: a page that fell back to an older state has a good checksum and still is bad.
    """

    def __init__(self, pages: int, content: Content, seed: int, hot_pages: int) -> None:
        self.pages = pages
        self.seed = seed
        self.version = 0
        self.hot_pages = max(1, min(hot_pages, pages))
        self.rewritten = 0
        self._content = content
        self._random = random.Random(seed + 1)
        self._memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._versions = array.array("I", bytes(4 * pages))

    def fill(self) -> Task:
        for number in range(self.pages):
            self._memory[number * PAGE + _HEADER.size : (number + 1) * PAGE] = self._content.page()
            self._seal(number)
            yield
        return {"pages": self.pages}

    def rewrite(self) -> None:
        """Change one page, nine times in ten one of the hot ones: half the time a few records, else all of it."""
        below = self.hot_pages if self._random.random() < 0.9 else self.pages
        number = self._random.randrange(below)
        if self._random.random() < 0.5:
            count = self._random.randrange(1, 6)
            start = number * PAGE + _HEADER.size + _RECORD * self._random.randrange(_RECORDS - count)
            self._memory[start : start + _RECORD * count] = self._content.records(count)
        else:
            self._memory[number * PAGE + _HEADER.size : (number + 1) * PAGE] = self._content.page()
        self._seal(number)
        self.rewritten += 1

    def check(self) -> Task:
        bad = []
        for number in range(self.pages):
            if not self._good(number):
                bad.append(number)
            yield
        return {"pages": self.pages, "bad_pages": len(bad), "first_bad_pages": bad[:8]}

    def close(self) -> None:
        self._memory.close()

    def _seal(self, number: int) -> None:
        self.version = (self.version + 1) & 0xFFFFFFFF
        start = number * PAGE
        _HEADER.pack_into(self._memory, start, self.seed, number, self.version, 0, 0)
        crc = zlib.crc32(self._memory[start : start + PAGE])
        _HEADER.pack_into(self._memory, start, self.seed, number, self.version, 0, crc)
        self._versions[number] = self.version

    def _good(self, number: int) -> bool:
        page = self._memory[number * PAGE : (number + 1) * PAGE]
        seed, found, version, _zero, crc = _HEADER.unpack_from(page)
        rest = zlib.crc32(page[_HEADER.size :], zlib.crc32(_HEADER.pack(seed, found, version, 0, 0)))
        return (seed, found, version, crc) == (self.seed, number, self._versions[number], rest)


class Files:
    """Files in a rotation of FILE_SLOTS; the checksum of each is remembered, and is in its name too."""

    def __init__(self, directory: Path, content: Content, kib: int) -> None:
        self.directory = directory
        self.written = 0
        self._content = content
        self._pages = max(1, kib // 4)
        self._known: dict[Path, bytes] = {}
        self._slots: list[Path | None] = [None] * FILE_SLOTS
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("*.dat"):
            old.unlink()

    def write(self) -> Task:
        slot = self.written % FILE_SLOTS
        unfinished, digest = self.directory / f"{slot:03d}.part", hashlib.sha256()
        with unfinished.open("wb") as file:
            for _ in range(self._pages):
                data = self._content.page()
                digest.update(data)
                file.write(data)
                yield
            file.flush()
            if self.written % SYNC_EVERY == 0:
                os.fsync(file.fileno())
        old, path = self._slots[slot], self.directory / f"{slot:03d}-{digest.hexdigest()}.dat"
        if old is not None:
            self._known.pop(old, None)
            old.unlink(missing_ok=True)
        unfinished.rename(path)
        self._slots[slot], self._known[path] = path, digest.digest()
        self.written += 1
        return {}

    def check(self) -> Task:
        bad = []
        checked = 0
        for path, wanted in list(self._known.items()):
            if path not in self._known:
                continue
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while data := file.read(16384):
                        digest.update(data)
                        yield
                right = digest.digest() == wanted
            except OSError:
                right = False
            # It may have had its turn in the rotation while it was read.
            if path in self._known:
                checked += 1
                if not right:
                    bad.append(path.name)
        return {"files": checked, "bad_files": len(bad), "first_bad_files": bad[:8]}


class Workload:
    """The commands. `handle` gives an answer, or a task that gives one when it is done; `work` does what is due."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self.system = Path("/usr/lib")
        self.running = False
        self.answers = 0
        self._clock = clock
        self._memory: WorkingSet | None = None
        self._files: Files | None = None
        self._writing: Task | None = None
        self._pages_per_s = self._files_per_s = 0.0
        self._pages_due = self._files_due = 0.0
        self._last = 0.0

    def handle(self, request: dict[str, Any]) -> dict[str, Any] | Task:
        """Answer to one request, or the task that will return it. Raises ValueError for a request that is off."""
        command = request.get("cmd")
        if command == "ask":
            return self._ask(request)
        if command == "start":
            return self._start(request)
        if command == "check":
            return self._check(bool(request.get("drop_caches")))
        if command == "stop":
            self.running = False
            return self._stats()
        if command == "stats":
            return self._stats()
        raise ValueError(f"unknown command {command!r}: say ask, start, check, stop or stats")

    def work(self) -> None:
        """Do what is due by the clock, for STEP_S at most. What it could not do in a second is not made up for."""
        if not self.running or self._memory is None or self._files is None:
            return
        now = self._clock()
        passed = min(1.0, max(0.0, now - self._last))
        self._last = now
        self._pages_due = min(self._pages_due + passed * self._pages_per_s, self._pages_per_s)
        self._files_due = min(self._files_due + passed * self._files_per_s, 1.0)
        if self._writing is None and self._files_due >= 1.0:
            self._files_due -= 1.0
            self._writing = self._files.write()
        # Half of each step is the file's: pages that outrun the CPU are always due and would leave it nothing, ever.
        end = now + STEP_S
        pages_end = end if self._writing is None else now + STEP_S / 2
        while self._pages_due >= 1.0 and self._clock() < pages_end:
            self._memory.rewrite()
            self._pages_due -= 1.0
        while self._writing is not None and self._clock() < end:
            try:
                next(self._writing)
            except StopIteration:
                self._writing = None

    def pause(self) -> float | None:
        """Seconds until there is something to do; None = nothing until a request comes."""
        if not self.running:
            return None
        return 0.0 if self._pages_due >= 1.0 else STEP_S if self._writing is not None else TICK_S

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        n = request.get("n")
        if not isinstance(n, int) or abs(n) >= 1 << 64:
            raise ValueError("ask needs n, a whole number of at most 64 bits")
        self.answers += 1
        return {
            "guest": os.uname().nodename,
            "counter": self.answers,
            "sha256": hashlib.sha256(str(n).encode()).hexdigest(),
            "version": self._memory.version if self._memory else 0,
        }

    def _start(self, request: dict[str, Any]) -> Task:
        pages = int(_number(request, "memory_mib", 64, 1, 1 << 20) * (1 << 20)) // PAGE
        pages_per_s = _number(request, "pages_per_s", 150, 0, 1e6)
        hot_pages = int(_number(request, "hot_pages", 2000, 1, 1e9))
        files_per_s = _number(request, "files_per_s", 0.25, 0, 1000)
        kib = int(_number(request, "file_kib", 256, 4, 1 << 20))
        share = _number(request, "random_share", 0.25, 0, 1)
        read_mib = _number(request, "read_mib", 0, 0, 1 << 20)
        seed = int(_number(request, "seed", 1, 0, 2**63))
        room = _available_memory()
        if pages * PAGE > room * 0.9:
            raise ValueError(
                f"{pages * PAGE >> 20} MiB do not fit: {room >> 20} MiB of memory are available; ask for less"
            )
        self.running, self._writing = False, None
        if self._memory is not None:
            self._memory.close()
        content = Content(seed, share)
        memory = self._memory = WorkingSet(pages, content, seed, hot_pages)
        self._files = Files(self.directory, content, kib)
        self._pages_per_s, self._files_per_s = pages_per_s, files_per_s
        return self._filled(memory, int(read_mib * (1 << 20)))

    def _filled(self, memory: WorkingSet, to_read: int) -> Task:
        began = self._clock()
        read = 0
        for path in system_files(self.system):
            if read >= to_read:
                break
            with contextlib.suppress(OSError):
                read += len(path.read_bytes())
            yield
        found = yield from memory.fill()
        if memory is not self._memory:
            raise ValueError("another start came in between")
        self.running, self._last = True, self._clock()
        self._pages_due = self._files_due = 0.0
        return {**found, "read_bytes": read, "fill_s": round(self._clock() - began, 2)}

    def _check(self, drop_caches: bool) -> Task:
        if drop_caches:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
        memory, files = self._memory, self._files
        found: dict[str, Any] = {"pages": 0, "bad_pages": 0, "files": 0, "bad_files": 0}
        if memory is not None and files is not None:
            found |= yield from memory.check()
            found |= yield from files.check()
        return {**found, "good": not found["bad_pages"] and not found["bad_files"]}

    def _stats(self) -> dict[str, Any]:
        memory, files = self._memory, self._files
        return {
            "running": self.running,
            "answers": self.answers,
            "pages": memory.pages if memory else 0,
            "version": memory.version if memory else 0,
            "rewritten": memory.rewritten if memory else 0,
            "files_written": files.written if files else 0,
            "cpu_s": round(time.process_time(), 3),
        }


def system_files(root: Path) -> Iterator[Path]:
    """Regular files below `root`, in an order that is the same in every guest of an image."""
    for directory, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield path


class _Client:
    """One connection: what came and was not a whole line yet, what could not be sent yet, the task it waits for."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.unsent = bytearray()
        self.task: Task | None = None
        self.used = time.monotonic()


class Server:
    """Requests first, then a step of each waiting task, then the work that is due; one thread, no more."""

    def __init__(self, workload: Workload, listener: socket.socket) -> None:
        self._workload = workload
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._clients: dict[socket.socket, _Client] = {}
        # What stop() writes to, so that a sleeping server notices.
        self._wake, self._woken = socket.socketpair()
        self._stopping = False
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until `stop`; closes all connections then."""
        try:
            while not self._stopping:
                self._turn()
        finally:
            for client in list(self._clients.values()):
                self._drop(client)
            self._selector.close()
            self._listener.close()
            self._wake.close()
            self._woken.close()

    def stop(self) -> None:
        """End `run`; from any thread, or a signal handler."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _turn(self) -> None:
        busy = any(client.task for client in self._clients.values())
        for key, events in self._selector.select(0.0 if busy else self._workload.pause()):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is not self._woken:
                client = self._clients.get(key.fileobj)  # type: ignore[call-overload]
                if client is not None:
                    self._serve(client, events)
        end = time.monotonic() + STEP_S
        for client in list(self._clients.values()):
            while client.task is not None and time.monotonic() < end:
                self._step(client, client.task)
        self._workload.work()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _address = self._listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self._clients) >= MAX_CLIENTS:
                # Connections whose other end went away without a word: the one that was silent longest goes.
                self._drop(min(self._clients.values(), key=lambda client: client.used))
            self._clients[sock] = _Client(sock)
            self._selector.register(sock, selectors.EVENT_READ)

    def _serve(self, client: _Client, events: int) -> None:
        client.used = time.monotonic()
        try:
            if events & selectors.EVENT_READ:
                data = client.sock.recv(MAX_LINE)
                if not data:
                    self._drop(client)
                    return
                client.received += data
                self._read_lines(client)
            self._flush(client)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)

    def _read_lines(self, client: _Client) -> None:
        # One request at a time: the next waits until the task of this one is done.
        while client.task is None and b"\n" in client.received:
            line, _, rest = bytes(client.received).partition(b"\n")
            client.received[:] = rest
            try:
                request = json.loads(line)
                if not isinstance(request, dict):
                    raise ValueError("a request is a JSON object on one line")
                found = self._workload.handle(request)
            except (ValueError, OSError, RecursionError) as error:
                self._answer(client, {"ok": False, "error": str(error)})
                continue
            if isinstance(found, dict):
                self._answer(client, {"ok": True, **found})
            else:
                client.task = found
        if len(client.received) > MAX_LINE or len(client.unsent) > 16 * MAX_LINE:
            raise ConnectionError("a client that does not keep to the protocol")

    def _step(self, client: _Client, task: Task) -> None:
        try:
            next(task)
            return
        except StopIteration as done:
            answer = {"ok": True, **done.value}
        except (ValueError, OSError) as error:
            answer = {"ok": False, "error": str(error)}
        client.task = None
        self._answer(client, answer)
        try:
            self._read_lines(client)
            self._flush(client)
        except OSError:
            self._drop(client)

    def _answer(self, client: _Client, answer: dict[str, Any]) -> None:
        client.unsent += json.dumps(answer).encode() + b"\n"

    def _flush(self, client: _Client) -> None:
        with contextlib.suppress(BlockingIOError):
            while client.unsent:
                del client.unsent[: client.sock.send(client.unsent)]
        waiting = selectors.EVENT_WRITE if client.unsent else 0
        self._selector.modify(client.sock, selectors.EVENT_READ | waiting)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.sock, None) is not None:
            self._selector.unregister(client.sock)
            client.sock.close()
            if client.task is not None:
                client.task.close()


def listen(host: str = "0.0.0.0", port: int = PORT) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)
    return listener


def _number(request: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = request.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} = {value!r}: give a number from {low:g} to {high:g}")
    return value


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def main() -> int:
    parser = argparse.ArgumentParser(description="Workload of a guest in the lab.")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    args = parser.parse_args()
    server = Server(Workload(args.directory), listen(port=args.port))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
