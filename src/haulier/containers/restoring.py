"""One restore by runc and CRIU that is begun before the dump is there, and held until it is.

The first file that CRIU reads, its inventory, is a pipe with a name: CRIU has started, looked what the kernel can do,
and waits in it. What opens the inventory later finds the file itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Final

from haulier.errors import GuestError
from haulier.process import ProcessId, hurry

INVENTORY: Final = "inventory.img"
HELD: Final = "inventory.held"
"""Where the inventory of a dump lies until its restore may begin."""
DESCRIPTORS: Final = "descriptors.json"
STEP_S: Final = 60.0
_POLL_S: Final = 0.0005


def prepare(images: Path) -> None:
    """Makes `images` a directory that a restore can be begun from; what it holds of a dump stays."""
    images.mkdir(mode=0o700, parents=True, exist_ok=True)
    # What runc asks for when it restores: nothing of the host's was given to the first process.
    (images / DESCRIPTORS).write_text(json.dumps(["/dev/null"] * 3))


class Restoring:
    """A restore that waits for its inventory. `command` is the program that restores, in a session of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], images: Path, said: Path) -> None:
        self._images, self._said = images, said
        if not (images / HELD).exists() and (images / INVENTORY).exists():
            (images / INVENTORY).rename(images / HELD)
        os.mkfifo(images / INVENTORY, 0o600)
        with said.open("wb") as file:
            # Not through a pipe: what it starts would hold the other end.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                env=environment,
            )
        self.process = ProcessId.of(self._process.pid)
        self.pipe = images / INVENTORY

    def hurry(self) -> None:
        """Has it go before others of this host."""
        hurry(self._process.pid, group=True)

    def finish(self) -> str:
        """Lets it begin and waits for its end; "" if it worked, else what it said."""
        pipe, held = self._images / INVENTORY, self._images / HELD
        deadline = time.monotonic() + STEP_S
        opened = -1
        while opened < 0 and self._process.poll() is None and time.monotonic() < deadline:
            try:
                opened = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise GuestError(f"the restore lost its inventory: {error}") from error
                time.sleep(_POLL_S)
        if opened >= 0:
            try:
                data = held.read_bytes()
                held.rename(pipe)
                os.write(opened, data)
            except OSError as error:
                raise GuestError(f"the inventory of the dump cannot be used: {error}") from error
            finally:
                os.close(opened)
        try:
            code = self._process.wait(STEP_S)
        except subprocess.TimeoutExpired:
            self.abort()
            return f"it did not end within {STEP_S:g} s"
        return "" if code == 0 else self._said.read_text(errors="replace").strip()[-4000:] or f"it ended with {code}"

    def abort(self) -> None:
        """Ends it, wherever it is; what it made so far is for the caller to clear away."""
        end_helper(self.process, self.pipe)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)


def end_helper(process: ProcessId | None, pipe: Path | None) -> None:
    """Ends a restore by the id of its first process, with all that it started; nothing if it is gone.

    What no longer belongs to it waits for the inventory at `pipe`, gets an empty one or none, and gives up by itself.
    """
    if process is not None and process.pid and process.alive():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait_gone(10)
    if pipe is not None:
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(pipe.lstat().st_mode):
                # Whoever waits goes on and reads nothing, whoever comes later finds nothing.
                opened = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
                pipe.unlink()
                os.close(opened)
