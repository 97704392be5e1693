"""Post-copy between two real QEMUs, through pump and sink, and again through new ones after both were cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.guests import rescue
from haulier.handoff import agreeing, served
from haulier.handoff.agreeing import TargetComparison
from haulier.handoff.attempts import picture_id
from haulier.handoff.convergence import serving_window
from haulier.handoff.memory_link import MemoryPump, MemorySink
from haulier.handoff.messages import Compare, GiveUp, Message
from haulier.handoff.urgent import UrgentPump
from haulier.memory.base import MemoryBase
from haulier.memory.proxy import Broken, SourceProxy
from haulier.memory.target_proxy import TargetProxy
from tests.handoff.test_memory_link import WIDE, Carrier
from tests.support.tinyguest import QEMU, TinyGuest, tiny_guest
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.qemu, pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")]


@pytest.fixture
def folder() -> Iterator[Path]:
    """On a tmpfs, where post-copy wants the guest's memory, and short enough for a socket's name."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="haulier-post-", dir=shared if os.access(shared, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


class Ends:
    """Pump and sink between the two, over carriers in memory."""

    def __init__(
        self,
        folder: Path,
        name: str,
        source: TinyGuest,
        broken: Broken | None = None,
        bases: tuple[MemoryBase | None, MemoryBase | None] = (None, None),
    ) -> None:
        self.failures: list[Exception] = []
        self.left, self.right = Carrier(), Carrier()
        self.left.peer, self.right.peer = self.right, self.left

        def connect() -> socket.socket:
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect(str(folder / name))
            return theirs

        proxy = SourceProxy(folder / f"{name}.source", bases[0], broken=broken)
        self.window = WIDE
        into = TargetProxy(folder / f"{name}.target", bases[1])
        self.sink = MemorySink(connect(), into, self.right, self.failures.append, connect)
        self.urgent = urgent = UrgentPump(folder / f"{name}.out", self.left)
        source.execute("migrate", uri=f"unix:{folder / name}.out", **({"resume": True} if broken else {}))
        self.pump = MemoryPump(urgent.stream(), proxy, self.left, lambda: self.window)
        self.pump.serve("ram0", urgent)
        for carrier in (self.left, self.right):
            carrier.run()
        self.pump.start()

    def close(self) -> None:
        self.pump.close()
        self.sink.close()
        for carrier in (self.left, self.right):
            carrier.stop()
        self.pump.proxy.close()
        self.sink.proxy.close()


class Agreement:
    """The source's control connection, with the target's answers."""

    def __init__(self, base: MemoryBase) -> None:
        self._target = TargetComparison(base)
        self._answer: Message | None = None

    def send(self, message: Message) -> None:
        if isinstance(message, Compare):
            self._answer = self._target.compare(message)
        elif isinstance(message, GiveUp):
            self._answer = self._target.give_up(message)

    def wait(self, kind: type[Message], timeout: float) -> Message:
        assert isinstance(self._answer, kind)
        return self._answer


@contextlib.contextmanager
def two(folder: Path) -> Iterator[tuple[TinyGuest, TinyGuest]]:
    monitor = ("-qmp", f"unix:{folder / 'resc.sock'},server=on,wait=off")
    with tiny_guest(folder / "b", "q35") as source, tiny_guest(folder / "c", "q35", *monitor, incoming=True) as target:
        for guest in (source, target):
            guest.capability("return-path")
            guest.capability("events")
            try:
                guest.capability("postcopy-ram")
                guest.capability("postcopy-preempt")
            except AssertionError as error:
                pytest.skip(f"no post-copy here: {error}")
        source.execute("cont")
        wait_for(lambda: source.counted() > 3, what="the guest's count")
        target.execute("migrate-incoming", uri=f"unix:{folder / 'in'}")
        source.execute(
            "migrate-set-parameters", max_bandwidth=12 << 20, max_postcopy_bandwidth=1 << 20, downtime_limit=1
        )
        yield source, target


def go_first(source: TinyGuest, target: TinyGuest, ends: Ends) -> None:
    """Pre-copy until pages have come again and again; then the guest runs at the target."""
    wait_for(lambda: len(ends.pump.proxy.often("ram0")) > 100, 60, "pages that were sent again and again")
    source.execute("migrate-start-postcopy")
    wait_for(lambda: target.execute("query-status")["status"] == "paused", 60, "the device state")
    ends.window = serving_window(50e6, 0.01)
    target.execute("cont")


def whole(source: TinyGuest, target: TinyGuest, before: int) -> None:
    source.wait_migrated()
    target.wait_migrated()
    assert target.execute("query-status")["status"] == "running"
    wait_for(lambda: target.counted() > before + 3, what="the guest's count")


def test_pages_that_are_asked_for_come_and_so_do_the_others(folder: Path) -> None:
    with two(folder) as (source, target):
        ends = Ends(folder, "in", source)
        try:
            go_first(source, target, ends)
            count = source.counted()
            wait_for(lambda: ends.sink.waits.answered > 0, what="a page that was asked for")
            wait_for(lambda: ends.pump.post_copy is not None and ends.pump.post_copy.pushed > 0, what="hot pages")
            source.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
            whole(source, target, count)
            wait_for(ends.pump.ended.is_set, what="the end of the stream")
            assert ends.pump.error is None and ends.failures == []
            assert ends.pump.proxy.finish() == ends.sink.proxy.digest()
            assert ends.pump.post_copy is not None and ends.pump.post_copy.requests > 0
            assert 0 < ends.sink.waits.mean_s <= ends.sink.waits.worst_s
            # Not all: some are on their way on the main stream when they are asked for.
            assert ends.sink.waits.overtook > 0
            # The guest dirties the same pages over and over, so what is urgent was there before, but for a little.
            assert ends.urgent.referred > 0 and ends.urgent.wire < ends.urgent.raw // 2
        finally:
            ends.close()


@pytest.mark.parametrize("first", ["cut", "cancel"])
def test_until_device_state_is_sent_the_source_can_run_on(folder: Path, first: str) -> None:
    """In pre-switchover nothing is lost yet: what `resume_source` does there."""
    with two(folder) as (source, _):
        source.capability("pause-before-switchover")
        ends = Ends(folder, "in", source)
        wait_for(lambda: ends.pump.raw > 3 << 20, what="a part of memory")
        source.execute("migrate-start-postcopy")
        wait_for(lambda: source.migration() == "pre-switchover", what="the switchover")
        count = source.counted()
        if first == "cut":
            ends.close()
        source.execute("migrate_cancel")
        wait_for(lambda: source.migration() in ("cancelled", "failed"), what="the end of it")
        if source.execute("query-status")["status"] != "running":
            source.execute("cont")
        wait_for(lambda: source.counted() > count + 3, what="the guest's count at the source")
        if first != "cut":
            ends.close()


def test_new_ends_go_on_where_both_were_cut(folder: Path) -> None:
    control = folder / "resc.ctl"
    with two(folder) as (source, target):
        keeper = rescue.start(folder / "resc.sock", control)
        assert rescue.recover(control, "unix:nowhere") is not None, "nothing is paused yet"
        ends = Ends(folder, "in", source)
        go_first(source, target, ends)
        count = source.counted()
        ends.close()
        for guest in (source, target):
            wait_for(lambda guest=guest: guest.migration() == "postcopy-paused", what="the pause")
        parser = ends.pump.proxy.parser
        assert rescue.recover(control, f"unix:{folder / 'again'}") is None
        assert rescue.recover(control, f"unix:{folder / 'again'}") is None, "it listens already"
        source.execute("migrate-set-parameters", max_postcopy_bandwidth=0)
        here, there = (served.picture_of(folder / f"in.{side}") for side in ("source", "target"))
        assert here is not None and there is not None and served.picture_of(folder / "in.source") is None
        agreeing.at_source(here, picture_id("h"), Agreement(there))  # type: ignore[arg-type]
        assert here.digest == there.digest
        ends = Ends(folder, "again", source, Broken(parser.blocks, tuple(parser.ids)), (here, there))
        try:
            whole(source, target, count)
            assert ends.pump.error is None and ends.pump.proxy.warnings == []
            # What pre-copy had brought is known at both ends.
            kinds = ends.pump.proxy.counters.pages
            assert kinds.get("xor", 0) + kinds.get("same", 0) + ends.urgent.referred > kinds.get("literal", 0), kinds
        finally:
            ends.close()
        assert keeper.wait(30) == 0 and not control.exists(), "it ends with what it is for"
