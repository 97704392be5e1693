"""A sample of a memory file against what all of it costs through the same codec."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from haulier.agent.site import Site
from haulier.guests.command import RAM_ID
from haulier.handoff import foretold, sampling
from haulier.handoff.messages import Job
from haulier.memory.ahead import AheadReader
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from haulier.memory.proxy import SourceProxy
from haulier.units import MIB, PAGE

PAGES = 64 * MIB // PAGE


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """A quarter text, a quarter noise in stretches, the rest holes."""
    path = tmp_path / "ram"
    chosen = random.Random(5)
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        for place in range(0, PAGES, 256):
            kind = chosen.randrange(4)
            file.seek(place * PAGE)
            if kind == 0:
                file.write(
                    b"".join(b"line %d of some text\n" % chosen.randrange(99) for _ in range(55_000))[: 256 * PAGE]
                )
            elif kind == 1:
                file.write(chosen.randbytes(256 * PAGE))
    return path


def whole(ram: Path, mirror: Path, base: MemoryBase | None = None) -> int:
    """Wire bytes of all of it."""
    reader = AheadReader(ram, RAM_ID)
    proxy = SourceProxy(mirror, base, None, level=5)
    proxy.name({RAM_ID: reader.pages * PAGE})
    reader.plan_all()
    wire = 0
    while not reader.done:
        assert proxy.mirror is not None
        wire += sum(len(batch.data) for batch in proxy.ahead(RAM_ID, *reader.take(proxy.mirror)))
    reader.close()
    proxy.close()
    return wire


def test_a_fifth_of_the_pages_tells_what_all_cost(ram: Path, tmp_path: Path) -> None:
    found = sampling.memory(ram, None, None, 5, runs=48, looks_s=0.0)
    truth = whole(ram, tmp_path / "all")
    assert found.memory_wire == pytest.approx(truth, rel=0.25)
    assert abs(found.memory_wire - truth) < 4 * found.memory_error
    assert found.memory_bytes == 64 * MIB and sum(found.pages.values()) == pytest.approx(PAGES, rel=0.01)
    assert found.dirty_wire_s == 0 and found.dirty_bps == 0


def test_what_both_sites_have_costs_next_to_nothing(ram: Path, tmp_path: Path) -> None:
    mirror = Mirror.create(tmp_path / "base", {RAM_ID: 64 * MIB})
    pages = np.fromfile(ram, np.uint8).reshape(-1, PAGE)
    mirror.set(np.arange(PAGES), pages)
    mirror.complete()
    mirror.close()
    found = sampling.memory(ram, MemoryBase.from_mirror(tmp_path / "base"), None, 5, looks_s=0.0)
    assert found.memory_wire < 10_000 and found.pages["literal"] == 0 and found.pages["same"] > PAGES / 8


def test_pages_that_change_between_two_looks_are_the_dirty_rate(
    ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dirtied(seconds: float) -> None:
        with ram.open("r+b") as file:
            for page in range(0, PAGES, 8):
                file.seek(page * PAGE)
                file.write(random.Random(page).randbytes(64))

    monkeypatch.setattr(sampling.time, "sleep", dirtied)
    found = sampling.memory(ram, None, None, 5)
    assert found.dirty_bps > 0 and found.dirty_wire_s > 0
    # A write of 64 bytes goes as a difference, not as a page.
    assert found.dirty_wire_s * 8 < found.dirty_bps / 10


def test_how_many_pages_are_hot_is_told_by_those_that_change_twice(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of 1200 pages, at random, before each look: as many as there are, give or take."""
    chance = random.Random(7)
    first = np.flatnonzero(np.fromfile(ram, np.uint8).reshape(-1, PAGE).any(axis=1))[:1200]

    def dirtied(seconds: float) -> None:
        with ram.open("r+b") as file:
            for page in chance.sample(list(first), 400):
                file.seek(int(page) * PAGE)
                file.write(chance.randbytes(64))

    monkeypatch.setattr(sampling.time, "sleep", dirtied)
    found = sampling.memory(ram, None, None, 5)
    pages = found.dirty_bps / 8 / PAGE
    assert found.hot_wire / found.dirty_wire_s == pytest.approx(1200 / pages, rel=0.2)


def test_an_empty_memory_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "ram").touch()
    with (tmp_path / "ram").open("r+b") as file:
        file.truncate(MIB)
    found = sampling.memory(tmp_path / "ram", None, None, 5)
    assert found.memory_wire < 100 and found.memory_error == 0 and found.pages["zero"] == 256


def test_a_plan_is_the_forecast_of_a_handoff_that_follows_soon(tmp_path: Path) -> None:
    site = Site(tmp_path / "site", "oslo", "127.0.0.1:7440")
    site.make_directories()
    site.guest_root("web1").mkdir()
    job = Job(handoff="h1", role="source", guest="web1", peer="lisbon")
    assert foretold.planned(site, job) is None
    keys = ("bytes", "seconds", "downtime_ms", "rate_bps", "mode", "converges")
    plan = {"guest": "web1", "target": "lisbon", "reasons": [], **dict.fromkeys(keys, 1)}
    foretold.keep_plan(site, plan)
    found = foretold.planned(site, job)
    assert found is not None and found["made"] == "plan" and found["bytes"] == 1
    foretold.keep_plan(site, plan | {"target": "porto"})
    assert foretold.planned(site, job) is None
    foretold.keep_plan(site, plan | {"reasons": [[4, "no"]]})
    assert foretold.planned(site, job) is None
    (site.guest_root("web1") / "plan.json").write_text("{")
    assert foretold.planned(site, job) is None


def test_a_site_learns_its_pace(tmp_path: Path) -> None:
    site = Site(tmp_path / "site", "oslo", "127.0.0.1:7440")
    site.make_directories()
    before = foretold.pace(site)
    report = {"wire": {"sent": 1, "received": 1}, "rate_bps": 1e7, "rtt_s": 0.02, "total_s": 30.0, "downtime_ms": 250.0}
    for _ in range(20):
        foretold.remember(site, report, 512 * MIB)
    after = foretold.pace(site)
    assert after.pass_s > before.pass_s * 5 and after.downtime_s == pytest.approx(0.2)
