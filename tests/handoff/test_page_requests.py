"""Pages asked for while a guest runs before its memory is whole: counted, checked, and asked for in its name."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from haulier.errors import Corrupt
from haulier.handoff.page_requests import PUSH, PostCopyPump, Waits
from haulier.memory.mirror import Mirror
from haulier.memory.proxy import SourceProxy
from haulier.memory.returnpath import Request, ReturnPathParser, request
from haulier.units import PAGE
from tests.support.qemustream import Writer, page_of


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[SourceProxy]:
    """It has sent pages 3 and 4 of ram0 four times, page 9 three times, all others at most once."""
    found = SourceProxy(tmp_path / "mirror")
    found.count()
    writer = Writer().begin()
    for round_ in range(4):
        writer.part().page("ram0", 3, page_of(round_)).page("ram0", 4, page_of(round_ + 20))
        if round_ < 3:
            writer.page("ram0", 9, page_of(round_ + 40))
        writer.page("ram0", 20 + round_, page_of(round_ + 60)).eos()
    cuts = [*range(0, len(writer.data), 1000), len(writer.data)]
    for start, end in itertools.pairwise(cuts):
        found.feed(writer.data[start:end])
        found.flush()
    yield found
    found.close()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, qemus = socket.socketpair()
    qemus.settimeout(5)
    with ours, qemus:
        yield ours, qemus


def said(qemus: socket.socket, blocks: dict[str, int]) -> list[Request]:
    return [message for message in ReturnPathParser(blocks).feed(qemus.recv(65536)) if isinstance(message, Request)]


def test_what_was_sent_most_often_is_asked_for_first(
    proxy: SourceProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    assert proxy.often("ram0").tolist() == [3, 4, 9]
    pump = PostCopyPump(proxy, ends[0], "ram0")
    pump.push()
    assert said(ends[1], proxy.parser.blocks) == [Request("ram0", 3 * PAGE, 2 * PAGE), Request("ram0", 9 * PAGE, PAGE)]
    assert pump.pushed == 3 <= PUSH


def test_requests_are_carried_on_and_counted(proxy: SourceProxy, ends: tuple[socket.socket, socket.socket]) -> None:
    pump = PostCopyPump(proxy, ends[0], "ram0")
    data = request("ram0", 5 * PAGE, 2 * PAGE)
    pump.returned(data[:9])
    pump.push()  # in the middle of a message: nothing
    pump.returned(data[9:])
    assert said(ends[1], proxy.parser.blocks) == [Request("ram0", 5 * PAGE, 2 * PAGE)]
    assert pump.requests == 2 and pump.pushed == 0


def test_nothing_is_asked_for_where_a_nameless_request_would_then_mean_another_block(
    proxy: SourceProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    pump = PostCopyPump(proxy, ends[0], "ram0")
    pump.returned(request("rom", 0, PAGE))
    pump.push()
    assert pump.pushed == 0


def test_nonsense_of_the_target_never_reaches_qemu(
    proxy: SourceProxy, ends: tuple[socket.socket, socket.socket]
) -> None:
    pump = PostCopyPump(proxy, ends[0], "ram0")
    with pytest.raises(Corrupt):
        pump.returned(request("ram0", 0, 1 << 40 & 0xFFFFF000))
    ends[0].close()
    assert ends[1].recv(100) == b""


def test_waits_are_from_the_question_to_the_page(tmp_path: Path) -> None:
    mirror = Mirror.create(tmp_path / "mirror", {"ram0": 64 * PAGE, "rom": 4 * PAGE})
    waits = Waits()
    waits.said(10.0, request("ram0", 7 * PAGE, PAGE) + request("rom", PAGE, PAGE), mirror)
    waits.said(10.5, request("ram0", 7 * PAGE, PAGE), mirror)
    waits.came(10.1, np.array([1, 2]))
    waits.came(10.2, np.array([65, 3]))
    waits.came(10.6, np.array([7]))
    waits.came(11.0, np.array([7]))
    assert waits.requests == 3 and waits.answered == 2
    assert waits.worst_s == pytest.approx(0.6) and waits.mean_s == pytest.approx(0.4)
    waits.said(12.0, b"\xff\xff\xff\xff", mirror)
    waits.said(12.0, request("ram0", 0, PAGE), mirror)
    assert waits.requests == 3, "not counted any more, and no harm done"
    mirror.close()
