"""The runc program: one call, one process. Knows nothing of guests."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from haulier import tools
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
    done = tools.run([runc_binary(), "--version"], timeout_s=STEP_S)
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
        tools.run(self._command(["delete", "--force", name]), timeout_s=STEP_S, env=_environment())

    def _begin(self, words: list[str], pid_file: Path) -> int:
        pid_file.unlink(missing_ok=True)
        # Not through a pipe: what it starts would hold the other end.
        with tempfile.TemporaryFile() as said:
            command, env = self._command(words), _environment()
            done = tools.run(command, timeout_s=STEP_S, env=env, stdout=subprocess.DEVNULL, stderr=said)
            said.seek(0)
            text = said.read().decode(errors="replace")
        if done.returncode:
            raise GuestError(f"runc {words[0]} failed: {words_of(text)}")
        return int(pid_file.read_text())

    def _command(self, words: list[str]) -> list[str]:
        return [runc_binary(), "--root", str(self.root), *words]


def words_of(text: str) -> str:
    """What runc complained of, out of its log lines."""
    match = re.findall(r'msg="((?:[^"\\]|\\.)*)"', text)
    return (match[-1] if match else text.strip())[-400:]


def _environment() -> dict[str, str]:
    found = tools.environment()
    with contextlib.suppress(Unsupported):  # containers can be run without
        found["PATH"] = f"{find_criu().path.parent}:{found['PATH']}"
    return found
