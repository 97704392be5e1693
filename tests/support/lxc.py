"""A container that LXC runs: one process that sleeps, on a root file system of just that program."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from haulier.containers import lxc

_PROGRAMS = ("/bin/sleep", "/bin/echo")


def call(*words: str) -> tuple[int, str]:
    """(exit code, what it said)."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip()


@dataclass
class OfLxc:
    """LXC's container `name` in `folder`."""

    folder: Path
    name: str

    @property
    def config(self) -> Path:
        return self.folder / self.name / "config"

    def _tool(self, tool: str, *words: str) -> tuple[int, str]:
        return call(tool, "-P", str(self.folder), "-n", self.name, *words)

    def start(self) -> bool:
        return self._tool("lxc-start", "-d")[0] == 0

    def stop(self) -> None:
        self._tool("lxc-stop", "-k")

    def says(self) -> tuple[str, str]:
        """What one of its programs says that LXC starts in it, and its state."""
        return self._tool("lxc-attach", "--", "/bin/echo", "here")[1], self._tool("lxc-info", "-s", "-H")[1]

    def pid(self) -> int:
        """Of its first process; 0 if LXC does not run it."""
        text = self._tool("lxc-info", "-p", "-H")[1]
        return int(text) if text.isdigit() else 0


@contextlib.contextmanager
def of_lxc(folder: Path, name: str) -> Iterator[OfLxc]:
    """One that runs; skips where LXC can run none."""
    if not lxc.installed() or os.geteuid():
        pytest.skip("LXC's tools are not here, or may not run containers")
    root = folder / name / "rootfs"
    for place in ("proc", "sys", "dev"):
        (root / place).mkdir(parents=True)
    needed = {word for program in _PROGRAMS for word in call("ldd", program)[1].split() if word.startswith("/")}
    for file in (*_PROGRAMS, *needed):
        place = root / file.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    made = OfLxc(folder, name)
    made.config.write_text(
        f"lxc.rootfs.path = dir:{root}\nlxc.uts.name = {name}\nlxc.net.0.type = empty\nlxc.start.auto = 1\n"
        "lxc.init.cmd = /bin/sleep 1000000\nlxc.console.path = none\nlxc.tty.max = 0\nlxc.pty.max = 16\n"
    )
    if not made.start():
        pytest.skip("LXC cannot run a container on this machine")
    try:
        yield made
    finally:
        made.stop()
