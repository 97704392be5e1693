"""Which CRIU works on this machine: found, or brought by scripts/setup, and tried out.

`criu check` says that all is well where no process with a socket can be dumped, so nothing but a dump and a restore of
such a process counts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from haulier.errors import Unsupported

PRIVATE: Final = Path("/opt/haulier/criu/bin")
"""Where scripts/setup unpacks a CRIU of a newer suite, with its own libraries."""
_LISTENER: Final = (
    "import socket,sys,time\n"
    "s=socket.socket();s.bind(('127.0.0.1',0));s.listen(4)\n"
    "open(sys.argv[1],'w').write(str(s.getsockname()[1]))\n"
    "while True:\n c=s.accept()[0];c.sendall(b'alive');c.close()\n"
)
_STEP_S: Final = 30.0


@dataclass(frozen=True)
class Criu:
    """A CRIU program: its version as it says itself, and whether it is the private one."""

    path: Path
    version: str
    private: bool


def candidates() -> list[Path]:
    """Programs to try, best first: one that is named by HAULIER_CRIU, the private one, the system's."""
    named = os.environ.get("HAULIER_CRIU", "")
    if named:
        return [Path(named)]
    found = [PRIVATE / "criu"]
    system = shutil.which("criu", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin")
    if system:
        found.append(Path(system))
    return [path for path in found if path.exists()]


def version_of(path: Path) -> str:
    """What `criu --version` says; "" if it cannot even say that."""
    try:
        done = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=_STEP_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"Version: *(\S+)", done.stdout)
    return match[1] if match else ""


@functools.cache
def find_criu() -> Criu:
    """The CRIU to use. Unsupported when there is none; whether it works is for `self_test` to say."""
    for path in candidates():
        version = version_of(path)
        if version:
            return Criu(path, version, path.parent == PRIVATE)
    raise Unsupported("no CRIU on this host: run scripts/setup, or install Debian's criu (>= 4.2 from Linux 6.16 on)")


def self_test(path: Path) -> str:
    """Dumps and restores a process with a TCP listener; "" if that works, else what went wrong."""
    if os.geteuid() != 0:
        return "only root can dump and restore processes"
    with tempfile.TemporaryDirectory(prefix="haulier-criu-") as folder:
        work = Path(folder)
        images = work / "images"
        images.mkdir()
        said = work / "port"
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", _LISTENER, str(said)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        restored = 0
        try:
            port = _wait_port(said)
            problem = _criu(path, images, "dump", "--tree", str(child.pid))
            if problem:
                return problem
            child.wait(_STEP_S)
            problem = _criu(path, images, "restore", "--restore-detached", "--pidfile", str(work / "pid"))
            if problem:
                return problem
            restored = int((work / "pid").read_text())
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                answer = client.recv(16)
            return "" if answer == b"alive" else "the restored process does not answer"
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            return str(error)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            if restored:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(restored, signal.SIGKILL)


def _wait_port(said: Path) -> int:
    deadline = time.monotonic() + _STEP_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return int(said.read_text())
        time.sleep(0.01)
    raise OSError("the process to be dumped did not start")


def _criu(path: Path, images: Path, verb: str, *words: str) -> str:
    """ "" if it worked, else the last error in its log."""
    command = [str(path), verb, "--images-dir", str(images), "--log-file", f"{verb}.log", "--network-lock", "skip"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=_STEP_S, check=False)
    if done.returncode == 0:
        return ""
    return f"{verb}: {last_error(images / f'{verb}.log') or done.stderr.strip()[-200:] or done.returncode}"


def last_error(log: Path, most: int = 2) -> str:
    """The first errors of a CRIU log, which are the ones that tell; "" if there are none."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()
        errors = [re.sub(r"^\([^)]*\)\s*(\d+:)?\s*", "", line) for line in lines if "Error" in line]
        return "; ".join(errors[:most])[:400]
    return ""


def main(arguments: list[str] | None = None) -> int:
    """For scripts/setup: says as JSON what there is; exit code 0 if it works."""
    parser = argparse.ArgumentParser(prog="haulier.containers.criu")
    parser.add_argument("--path", type=Path)
    chosen = parser.parse_args(arguments).path
    if chosen is None:
        try:
            chosen = find_criu().path
        except Unsupported as error:
            print(json.dumps({"works": False, "problem": str(error)}))
            return 1
    version = version_of(chosen)
    problem = self_test(chosen) if version else "it does not start"
    print(json.dumps({"path": str(chosen), "version": version, "works": not problem, "problem": problem}))
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
