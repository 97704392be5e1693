"""Keeps one QMP connection to a guest that runs before its memory is whole, for whoever has to go on with it.

Such a QEMU may wait, in its main loop, for a page: when a device needs one that is not there. While it waits nobody
can begin to talk to it, for QMP's greeting is answered by the main loop; but over a connection that was made before
``migrate-recover`` can be said, out of band. The worker that has such a connection is what may die. So this process,
which does nothing else, holds another: ``python rescue.py MONITOR CONTROL``. On its control socket it takes one line,
an address to listen at, and answers with one line of QEMU's. It ends with its QEMU, or when all of the memory is there.

Only the standard library, and nothing of haulier: it starts in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ANSWER_S = 20.0
MAX_LINE = 1 << 20
_OVER = frozenset({"completed", "failed", "cancelled"})


class Over(Exception):
    """QEMU is gone, or needs nobody any more."""


class Monitor:
    """A QMP connection that reads as little as it can."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self._buffer = b""
        self._next(time.monotonic() + ANSWER_S)
        self.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer; events that come before it are looked at."""
        self.socket.sendall(json.dumps(command).encode() + b"\n")
        deadline = time.monotonic() + ANSWER_S
        while True:
            message = self._next(deadline)
            if "return" in message or "error" in message:
                return message

    def events(self) -> None:
        """Takes what QEMU says by itself. Over when memory is whole."""
        with contextlib.suppress(TimeoutError):
            while True:
                self._next(time.monotonic())

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            if not select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            data = self.socket.recv(65536)
            if not data or len(self._buffer) > MAX_LINE:
                raise Over
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "MIGRATION" and message.get("data", {}).get("status") in _OVER:
            raise Over
        return message


def serve(monitor: Monitor, control: socket.socket) -> None:
    """Until it is over."""
    while True:
        ready, _, _ = select.select([monitor.socket, control], [], [])
        if monitor.socket in ready:
            monitor.events()
        if control in ready:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                _recover(monitor, control.accept()[0])


def _recover(monitor: Monitor, client: socket.socket) -> None:
    with client:
        client.settimeout(ANSWER_S)
        uri = client.makefile("rb").readline(4096).decode().strip()
        # It may not have seen yet that its connection is gone.
        monitor.ask({"exec-oob": "migrate-pause"})
        deadline = time.monotonic() + ANSWER_S
        while True:
            answer = monitor.ask({"exec-oob": "migrate-recover", "arguments": {"uri": uri}})
            if "error" not in answer or "already" in str(answer) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        client.sendall(json.dumps(answer).encode() + b"\n")


def start(monitor: Path, control: Path) -> subprocess.Popen[bytes]:
    """A process that outlives its parent; it holds its connection when this returns."""
    control.unlink(missing_ok=True)
    words = [sys.executable, "-I", __file__, str(monitor), str(control)]
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    deadline = time.monotonic() + ANSWER_S
    while not control.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def recover(control: Path, uri: str) -> str | None:
    """Has QEMU listen at `uri` for the rest of its memory: None if it does, or why not. OSError if nobody is there."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(3 * ANSWER_S)
        client.connect(str(control))
        client.sendall(uri.encode() + b"\n")
        answer = json.loads(client.makefile("rb").readline(MAX_LINE) or b"{}")
    if "return" in answer or "already" in str(answer):
        return None
    return str(answer.get("error", {}).get("desc", "it did not answer"))


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as control:
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        control.bind(str(fresh))
        fresh.chmod(0o600)
        control.listen(4)
        fresh.rename(path)
        try:
            yield control
        finally:
            path.unlink(missing_ok=True)


def main(monitor: str, control: str) -> None:
    with contextlib.suppress(Over, OSError):
        held = Monitor(monitor)
        with _listening(Path(control)) as listener:
            serve(held, listener)


if __name__ == "__main__":
    main(*sys.argv[1:3])
