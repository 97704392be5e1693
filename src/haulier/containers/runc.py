"""The runc program: one call, one process. Knows nothing of guests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from haulier.containers.criu import find_criu
from haulier.errors import GuestError, Unsupported

STEP_S: Final = 60.0


def runc_binary() -> str:
    """Unsupported when there is none."""
    found = shutil.which("runc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin")
    if found is None:
        raise Unsupported("no runc on this host: run scripts/setup, or install Debian's runc")
    return found


def runc_version() -> str:
    done = subprocess.run([runc_binary(), "--version"], capture_output=True, text=True, timeout=STEP_S, check=False)
    match = re.search(r"version (\S+)", done.stdout)
    return match[1] if match else ""


class Runc:
    """runc with its own directory of states, `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, name: str, bundle: Path, pid_file: Path) -> int:
        """Starts a container; its first process' id. GuestError with runc's words."""
        return self._begin(["run", "--detach", "--bundle", str(bundle), "--pid-file", str(pid_file), name], pid_file)

    def restore_command(
        self, name: str, bundle: Path, images: Path, work: Path, pid_file: Path
    ) -> tuple[list[str], dict[str, str]]:
        """Restores a container from `images`, its first process' id to `pid_file`, CRIU's log to `work`: words and
        environment."""
        words = ["restore", "--detach", "--bundle", str(bundle), "--image-path", str(images), "--work-path", str(work)]
        return self._command([*words, "--pid-file", str(pid_file), name]), _environment()

    def delete(self, name: str) -> None:
        """Ends it by force and forgets it; no error if there is none."""
        self._call(["delete", "--force", name])

    def _begin(self, words: list[str], pid_file: Path) -> int:
        pid_file.unlink(missing_ok=True)
        # Not through a pipe: what it starts would hold the other end.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                self._command(words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                timeout=STEP_S,
                check=False,
                env=_environment(),
            )
            said.seek(0)
            text = said.read().decode(errors="replace")
        if done.returncode:
            raise GuestError(f"runc {words[0]} failed: {words_of(text)}")
        return int(pid_file.read_text())

    def _call(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                self._command(words),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=STEP_S,
                check=False,
                env=_environment(),
            )
        except subprocess.TimeoutExpired:
            raise GuestError(f"runc {words[0]} did not end within {STEP_S:g} s") from None

    def _command(self, words: list[str]) -> list[str]:
        return [runc_binary(), "--root", str(self.root), *words]


def words_of(text: str) -> str:
    """What runc complained of, out of its log lines."""
    match = re.findall(r'msg="((?:[^"\\]|\\.)*)"', text)
    return (match[-1] if match else text.strip())[-400:]


def _environment() -> dict[str, str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        path = f"{find_criu().path.parent}:{path}"
    except Unsupported:
        pass  # containers can be run without
    return {**os.environ, "PATH": path}
