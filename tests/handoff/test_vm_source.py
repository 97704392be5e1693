"""What a VM's source does not wait for without end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from haulier.errors import HandoffFailed
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Job, Options
from haulier.handoff.ownership import State
from haulier.handoff.vm_source import STOPPED_STALL_S, VmSource
from tests.handoff.hosts import GUEST, HANDOFF, SPEC
from tests.support.agents import make_site
from tests.support.processes import set_clock

JOB = Job(handoff=HANDOFF, role="source", guest=GUEST, peer="oslo", options=Options(stall_s=40))


class Pump:
    """One whose target has taken nothing for `seconds`, as long as the link is up."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.seconds = 0.0

    def still_s(self, now: float, connected: bool) -> float:
        return self.seconds if connected else 0.0


@pytest.fixture
def source(tmp_path: Path) -> Iterator[VmSource]:
    site = make_site(tmp_path / "l", "lisbon")
    site.handoff_root(HANDOFF).mkdir(parents=True)
    with Journal(site.journal) as journal:
        journal.advance(GUEST, "absent", State.OFFERED.value, epoch=3, pending=4, spec=msgspec.to_builtins(SPEC))
        journal.add_handoff(HandoffRow(HANDOFF, GUEST, "source", "oslo", epoch=4))
        made = VmSource(site, journal, JOB, SimpleNamespace(), threading.Event())  # type: ignore[arg-type]
        made._pump = Pump()  # type: ignore[assignment]
        made._session = SimpleNamespace(connected=True)  # type: ignore[assignment]
        made._taking = True
        yield made


@pytest.mark.parametrize("stopped", [False, True])
def test_a_target_that_takes_no_more_memory_ends_the_handoff(source: VmSource, stopped: bool) -> None:
    pump: Pump = source._pump  # type: ignore[assignment]
    source._stop_event = SimpleNamespace(at=1.0) if stopped else None  # type: ignore[assignment]
    limit = STOPPED_STALL_S if stopped else JOB.options.stall_s
    pump.seconds = limit
    source._check()
    pump.seconds += 0.1
    with pytest.raises(HandoffFailed, match=rf"'oslo' has taken nothing .* for {limit:.0f} s.*runs on at 'lisbon'"):
        source._check()


@pytest.mark.parametrize("why", ["the link is down", "the token is granted", "its QEMU is being started"])
def test_it_is_waited_for_as_long_as_it_takes(source: VmSource, why: str) -> None:
    source._pump.seconds = 1e6  # type: ignore[union-attr]
    source._session.connected = why != "the link is down"  # type: ignore[union-attr,misc]
    source._token.granted = why == "the token is granted"
    source._taking = why != "its QEMU is being started"
    source._check()


def test_a_deadline_does_not_come_because_the_clock_is_set(source: VmSource, monkeypatch: pytest.MonkeyPatch) -> None:
    source.job = msgspec.structs.replace(JOB, options=Options(deadline_s=60))
    source._marks["begin"] = time.time()
    set_clock(monkeypatch, 3600)
    source._check()
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 61)
    with pytest.raises(HandoffFailed, match=r"not at site 'oslo' within 60 s; it runs on at 'lisbon'"):
        source._check()
