"""One thing at a time with a guest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.agent import core as module
from haulier.agent.core import Core
from haulier.errors import Conflict
from tests.support.waiting import wait_for


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    made = Core(module.Site(tmp_path, "oslo", "127.0.0.1:1"))
    yield made
    made.close()


class Beside:
    """Another thread that wants the guest."""

    def __init__(self, core: Core, brief: bool = False) -> None:
        self.core, self.brief = core, brief
        self.found: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.core.alone("web1", "beginning a handoff", brief=self.brief):
                self.found.append("had it")
        except Conflict as error:
            self.found.append(str(error))

    def end(self) -> str:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.found[0]


def test_what_somebody_asked_for_is_in_the_way_of_others(core: Core) -> None:
    with core.alone("web1", "being stopped"):
        for brief in (False, True):
            assert Beside(core, brief).end().startswith("'web1' is busy (being stopped)")
        with core.alone("web2", "being stopped"):
            pass
    assert Beside(core).end() == "had it"


def test_what_nobody_asked_for_is_waited_for(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = threading.Event()
    monkeypatch.setattr(module.time, "sleep", lambda s: waited.set())
    with core.alone("web1", "being given an address", brief=True):
        other = Beside(core)
        assert waited.wait(30) and other.found == []
        assert "being given an address" in Beside(core, brief=True).end(), "it has no need to wait"
    assert other.end() == "had it"
    assert not core.is_busy("web1")


def test_but_not_for_ever(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BRIEF_S", 0.05)
    with core.alone("web1", "being given an address", brief=True):
        assert "being given an address" in Beside(core).end()
        # What comes after it is not taken for it.
    with core.alone("web1", "being stopped"):
        monkeypatch.setattr(module, "BRIEF_S", 600.0)
        assert "being stopped" in Beside(core).end()
    wait_for(lambda: not core.is_busy("web1"))
