"""Real PostgreSQL servers from the distribution's packages, on loopback ports, in directories of their own.

PostgreSQL refuses to run as root: as root the servers run as the user ``postgres`` that its package makes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from tests.support.agents import free_port

_FAST = (
    "-c fsync=off -c full_page_writes=off -c max_connections=20 -c shared_buffers=32MB -c max_wal_senders=4"
    " -c dynamic_shared_memory_type=mmap"
)
"""A killed server loses nothing by fsync=off: only a power cut would. Nor does it leave anything in /dev/shm."""


@functools.cache
def programs() -> Path:
    """Directory of initdb, postgres and pg_basebackup; fails the test where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[4]))
    assert found, "no PostgreSQL server under /usr/lib/postgresql: run scripts/setup"
    return found[-1].parent


def _identity() -> dict[str, object]:
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


def run(*words: str) -> None:
    """A program of PostgreSQL, as the servers' user."""
    done = subprocess.run(
        [str(programs() / words[0]), *words[1:]],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        **_identity(),  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"


class Servers:
    """Makes servers, and takes them all away again."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="haulier-pg-"))
        if os.geteuid() == 0:
            shutil.chown(self.root, "postgres", "postgres")
        self._template: Path | None = None
        self._made: list[Server] = []

    def new(self, name: str) -> Server:
        """A running server with an empty cluster."""
        if self._template is None:
            self._template = self.root / "template"
            run("initdb", "-D", str(self._template), "-U", "haulier", "--auth=trust", "--no-sync", "--no-instructions")
        self._copy(self._template, self.root / name)
        return self._start(name)

    def standby(self, of: Server, name: str) -> Server:
        """A running server that streams from `of`."""
        url = f"host=127.0.0.1 port={of.port} user=haulier"
        run("pg_basebackup", "-D", str(self.root / name), "-d", url, "-R", "-X", "stream", "-c", "fast", "--no-sync")
        return self._start(name)

    def _copy(self, source: Path, target: Path) -> None:
        subprocess.run(["cp", "-a", str(source), str(target)], check=True)

    def _start(self, name: str) -> Server:
        server = Server(self.root / name)
        self._made.append(server)
        server.start()
        return server

    def close(self) -> None:
        for server in self._made:
            server.stop()
        shutil.rmtree(self.root, ignore_errors=True)


class Server:
    """One server; `port` stays the same over restarts."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://haulier@127.0.0.1:{self.port}/postgres"

    @property
    def socket_url(self) -> str:
        """As `url`, by a unix socket, which network namespaces do not divide."""
        return f"postgresql://haulier@/postgres?host={self.data.parent}&port={self.port}"

    def start(self) -> None:
        words = ["-D", str(self.data), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        words += ["-c", f"unix_socket_directories={self.data.parent}", *_FAST.split()]
        with open(self.data.parent / f"{self.data.name}.log", "ab") as log:
            self._process = subprocess.Popen(
                # ends with this process, even where that is killed
                ["setpriv", "--pdeathsig", "QUIT", str(programs() / "postgres"), *words],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
                **_identity(),  # type: ignore[call-overload]
            )
        end = time.monotonic() + 60
        while True:
            assert self._process.poll() is None, self.log()
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < end, self.log()
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to all its processes, as the kernel or a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def stop(self) -> None:
        """At once, and without leaving anything; a server that was killed is tidied up after."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            process.wait(30)
            return
        with contextlib.suppress(OSError, IndexError):
            # the system V segment by which a server sees that another one has its directory
            segment = (self.data / "postmaster.pid").read_text().splitlines()[6].split()[1]
            subprocess.run(["ipcrm", "-m", segment], capture_output=True, check=False)

    def promote(self) -> None:
        """Makes a standby take writes."""
        with psycopg.connect(self.url, autocommit=True) as db:
            assert db.execute("SELECT pg_promote()").fetchone() == (True,)

    def log(self) -> str:
        return (self.data.parent / f"{self.data.name}.log").read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def servers() -> Iterator[Servers]:
    made = Servers()
    try:
        yield made
    finally:
        made.close()
