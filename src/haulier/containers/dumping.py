"""One dump by CRIU, asked for over its own protocol: it can be got ready while the processes run, and held there.

Half of a short dump is CRIU's start: it looks what the kernel can do before it touches a process. So it is started
early and waits at its first notification; and its notification that the network is to be locked is the last moment at
which the processes' connections may still change. Format: CRIU's images/rpc.proto; messages are packets of a socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from haulier.containers.criu import find_criu, last_error
from haulier.containers.protobuf import field, fields
from haulier.errors import GuestError
from haulier.process import ProcessId, hurry

STEP_S: Final = 60.0
LOG: Final = "dump.log"
NOTE: Final = "dump.json"
"""Which process CRIU is, and where it writes: there as long as it may hold the processes."""
_DUMP: Final = 1
_NOTIFY: Final = 6
_POLL_S: Final = 0.05
_LOG_LEVEL: Final = 2
"""Errors and warnings: thousands of lines of a dump's progress take their time."""
_MAX_PACKET: Final = 1 << 16


@dataclass(frozen=True)
class DumpRequest:
    """What is dumped, and what of it lies outside: told to CRIU at both sites alike.

    `masked` are paths in it that the host's /dev/null is mounted on; `external` are CRIU's words for what the target
    gives it anew, such as its network namespace; `options` is a file of CRIU's options.
    """

    pid: int
    root: Path
    options: Path
    freezer: Path
    external: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    mounts: tuple[tuple[str, str], ...] = ()

    def encode(self, images: int, work: int) -> bytes:
        """The message, for directories that are open under these numbers at CRIU."""
        options = field(1, images) + field(2, self.pid) + field(3, 1) + field(9, _LOG_LEVEL) + field(10, LOG)
        options += field(12, 1) + field(13, str(self.root)) + field(17, work) + field(24, 1)
        options += field(44, str(self.freezer)) + field(50, 1) + field(51, str(self.options))
        for path in self.masked:
            options += field(23, field(1, path) + field(2, "/dev/null"))
        for key, value in self.mounts:
            options += field(23, field(1, key) + field(2, value))
        for word in self.external:
            options += field(37, word)
        return field(1, _DUMP) + field(2, options)


class Dumping:
    """A dump from its preparation to its end; the processes are left as they were, running or frozen.

    `ready`, then `finish`, by one thread at a time; or `abort` by any.
    """

    def __init__(self, request: DumpRequest, images: Path, work: Path) -> None:
        self._work = work
        (work / LOG).unlink(missing_ok=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # CRIU opens them by way of this process, so they stay open until it has.
        self._folders = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (images, work)]
        try:
            self._process = subprocess.Popen(
                [str(find_criu().path), "swrk", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._socket = ours
        ours.settimeout(STEP_S)
        self._held = False
        try:
            # Before it is told what to dump.
            if (process := ProcessId.of(self._process.pid)) is not None:
                (work / NOTE).write_text(json.dumps(asdict(process) | {"images": str(images)}))
        except BaseException:
            self.abort()
            raise
        with contextlib.suppress(OSError):
            ours.send(request.encode(*self._folders))

    def ready(self) -> None:
        """Waits until CRIU would begin. GuestError with its words when it cannot."""
        while not self._held:
            self._held = self._heard() == "pre-dump"
            if not self._held:
                self._go_on()

    def finish(self, lock: Callable[[], None] = lambda: None) -> None:
        """Lets it begin, and waits for its end; `lock` is called when all processes stand still."""
        self.ready()
        hurry(self._process.pid)
        self._go_on()
        try:
            while (said := self._heard()) is not None:
                if said == "network-lock":
                    lock()
                self._go_on()
        finally:
            self.abort()

    def abort(self) -> None:
        """Ends CRIU, whatever it does; it lets go of the processes."""
        self._socket.close()
        while self._folders:
            os.close(self._folders.pop())
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Without its caller it gives up by itself, and undoes what it did to the processes.
            self._process.wait(STEP_S)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        (self._work / NOTE).unlink(missing_ok=True)

    def _go_on(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self._socket.send(field(1, _NOTIFY) + field(3, 1))

    def _heard(self) -> str | None:
        """The name of its next notification; None when it has dumped all. GuestError when it has not."""
        try:
            packet = self._socket.recv(_MAX_PACKET)
        except TimeoutError:
            raise GuestError(f"CRIU did not answer within {STEP_S:g} s: see {self._work / LOG}") from None
        except OSError:
            packet = b""
        said = fields(packet)
        if int(said.get(1, 0)) == _NOTIFY:
            return bytes(fields(bytes(said.get(5, b""))).get(1, b"")).decode(errors="replace")
        if packet and said.get(2):
            return None
        words = bytes(said.get(9, b"")).decode(errors="replace").strip()
        raise GuestError(last_error(self._work / LOG, 3) or words or "it ended without a word")


def end_left(work: Path) -> None:
    """Waits for the end of a dump with its log in `work` whose caller was killed; kills it if it does not end.

    The last that CRIU does is to have the freezer as it found it: whoever thaws before that thaws in vain.
    """
    try:
        note = json.loads((work / NOTE).read_bytes())
        process, images = ProcessId.from_dict(note), Path(note["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    deadline = time.monotonic() + STEP_S
    while not process.wait_gone(_POLL_S) and time.monotonic() < deadline:
        # It would wait for ever for somebody who takes its pages.
        for pipe in images.glob("pages-*.img"):
            with contextlib.suppress(OSError):
                if pipe.is_fifo():
                    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
    process.kill()
    (work / NOTE).unlink(missing_ok=True)
