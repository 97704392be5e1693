from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from haulier.agent.client import Client
from haulier.agent.server import Agent
from haulier.agent.site import Site
from tests.support.agents import join, make_site, running


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="hag-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@dataclass
class Fleet:
    """Two sites of one fleet whose agents run in this process."""

    oslo: Site
    lisbon: Site
    at_oslo: Agent
    at_lisbon: Agent

    @property
    def client(self) -> Client:
        return Client.local(self.oslo)

    def to_lisbon(self) -> Client:
        return Client.peer(self.oslo, self.at_oslo.journal.site("lisbon"))


@pytest.fixture
def fleet(short: Path) -> Iterator[Fleet]:
    oslo = make_site(short / "o", "oslo")
    with running(oslo) as at_oslo:
        lisbon = join(oslo, short / "l", "lisbon")
        with running(lisbon) as at_lisbon:
            yield Fleet(oslo, lisbon, at_oslo, at_lisbon)
