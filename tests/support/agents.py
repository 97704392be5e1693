"""Sites and agents for tests: in a thread of the test, or as processes that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from haulier.agent import authority, joining
from haulier.agent.client import Client
from haulier.agent.server import Agent, serve
from haulier.agent.site import Site
from haulier.errors import PeerError
from haulier.handoff.journal import Journal
from tests.support.waiting import wait_for

CLI = [sys.executable, "-c", "from haulier.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_site(root: Path, name: str) -> Site:
    """The first site of a new fleet."""
    return joining.init(root, name, f"127.0.0.1:{free_port()}")


@contextlib.contextmanager
def running(site: Site) -> Iterator[Agent]:
    """An agent in a thread of this process."""
    agent = Agent(site)
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            loop.run_until_complete(serve(agent, stop, ready.set))
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=work, name=f"agent {site.name}")
    thread.start()
    try:
        assert ready.wait(30)
        if failed:
            raise failed[0]
        yield agent
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        agent.close()
        loop.close()


def join(issuer: Site, root: Path, name: str) -> Site:
    """A second site of the fleet; the issuer's agent must run."""
    with Journal(issuer.journal) as journal:
        token = authority.new_token(issuer, journal)
    return joining.join(root, name, f"127.0.0.1:{free_port()}", (), issuer.control, token)


class AgentProcess:
    """A real `haulier agent`, which can be killed and started again."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.client = Client.local(site)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.site.root / "agent.err", "ab") as log:
            self._process = subprocess.Popen(
                [*CLI, "agent", "--root", str(self.site.root)], stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._answers, 30)

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.site.root
        try:
            self.client.site()
        except PeerError:
            return False
        return True

    def end(self, number: int = signal.SIGTERM) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        os.kill(process.pid, number)
        return process.wait(30)

    def __enter__(self) -> AgentProcess:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


class CoordinatorProcess:
    """A real `haulier coordinator run` with a site's identity, which can be killed and started again."""

    def __init__(self, site: Site, database: str = "", prefix: Sequence[str] = (), host: str = "127.0.0.1") -> None:
        self.site = site
        self.listen = f"{host}:{free_port()}"
        self.url = f"https://{site.name}@{self.listen}"
        self._prefix = list(prefix)
        self._database = ["--database", database] if database else []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["coordinator", "run", "--root", str(self.site.root), "--listen", self.listen, *self._database]
        with open(self.site.root / "coordinator.err", "ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *CLI, *words], stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._answers, 60)

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.site.root
        socket_path = self.site.run / "coordinator.sock"
        try:
            Client.unix(socket_path, "the coordinator").get("/v1/site", 5)
        except PeerError:
            return False
        return True

    def end(self, number: int = signal.SIGTERM) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        os.kill(process.pid, number)
        return process.wait(30)

    def __enter__(self) -> CoordinatorProcess:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
