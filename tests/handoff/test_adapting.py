"""The controller and the codec together: levels follow what is seen, and the report says why."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from haulier.agent.site import Site
from haulier.compress.controller import DEFAULT, Cost, Profile
from haulier.compress.xz import is_xz
from haulier.handoff import adapting, calibration
from haulier.handoff.adapting import ENDING_LEVEL, Adapting, keep_profile, profile_of, profile_path
from haulier.memory.proxy import SourceProxy
from haulier.units import MIB, PAGE


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "site", "oslo", "127.0.0.1:7440")
    site.make_directories()
    return site


@pytest.fixture
def proxy(tmp_path: Path) -> SourceProxy:
    proxy = SourceProxy(tmp_path / "mirror", level=5, clock=time.thread_time, recent=True)
    proxy.name({"ram0": 4096 * PAGE})
    return proxy


class Feeding:
    """Sends pages that were not sent before."""

    def __init__(self, proxy: SourceProxy) -> None:
        self.proxy, self.at = proxy, 0
        self.rng = np.random.default_rng(1)

    def megabyte(self) -> None:
        pages = self.rng.integers(0, 20, (256, PAGE), dtype=np.uint8)
        self.proxy.ahead("ram0", np.arange(self.at, self.at + 256), pages)
        self.at += 256


def test_a_site_without_a_profile_has_the_shipped_one_and_keeps_what_it_measures(site: Site) -> None:
    assert profile_of(site) == DEFAULT
    mine = Profile((Cost(3, 1e8, 0.4), Cost(9, 1e7, 0.3)), made=5.0)
    keep_profile(site, mine)
    assert profile_of(site) == mine
    profile_path(site).write_text("{")
    assert profile_of(site) == DEFAULT


def test_the_codec_takes_the_level_that_the_link_asks_for(proxy: SourceProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(adapting.time, "monotonic", lambda: now[0])
    deciding = Adapting(DEFAULT, 5e6)
    slow = deciding.level
    feeding = Feeding(proxy)
    for _ in range(6):
        deciding.step(proxy, 5e6, True, 0)
        feeding.megabyte()
        now[0] += 0.4
    assert proxy.level == deciding.level
    for _ in range(9):
        deciding.step(proxy, 8e9, True, 0)
        feeding.megabyte()
        now[0] += 0.4
    assert proxy.level == deciding.level < slow
    told = deciding.report()
    assert told["level"] == proxy.level and told["changes"][0]["level"] == slow
    assert all("Mbit/s" in change["why"] for change in told["changes"]) and told["learnt"]


def test_small_batches_tell_nothing_of_modes(proxy: SourceProxy) -> None:
    deciding = Adapting(DEFAULT, 10e6)
    pages = np.random.default_rng(1).integers(0, 20, (2, PAGE), dtype=np.uint8)
    for at in range(0, 400, 2):
        deciding.step(proxy, 10e6, True, 0)
        proxy.ahead("ram0", np.arange(at, at + 2), pages)
    content = deciding.report()["content"]
    assert content == {"speed": 1.0, "ratio": 1.0, "trials": 0, "encode_ns": 2.0} and not proxy.recent


def test_the_page_codecs_own_time_is_learnt(proxy: SourceProxy) -> None:
    deciding = Adapting(DEFAULT, 10e6)
    feeding = Feeding(proxy)
    for _ in range(4):
        deciding.step(proxy, 10e6, True, 0)
        with deciding.working():
            feeding.megabyte()
    assert deciding.report()["content"]["encode_ns"] != 2.0


def test_near_the_end_no_level_is_slow(proxy: SourceProxy) -> None:
    proxy.set_level(15)
    Adapting(DEFAULT, 1e6).step(proxy, 1e6, True, 0, ending=True)
    assert proxy.level == ENDING_LEVEL
    proxy.set_level(1)
    Adapting(DEFAULT, 1e6).step(proxy, 1e6, True, 0, ending=True)
    assert proxy.level == 1


def test_the_operators_cap_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(adapting.time, "sleep", slept.append)
    cpu = iter([0.0, 0.1])
    wall = iter([5.0, 5.0, 5.1, 5.2, 5.3])
    monkeypatch.setattr(adapting.time, "thread_time", lambda: next(cpu))
    monkeypatch.setattr(adapting.time, "monotonic", lambda: next(wall))
    with Adapting(DEFAULT, 1e7, cap=0.25).working():
        pass
    # A tenth of a second of CPU is to take four tenths, of which one has passed.
    assert slept == [pytest.approx(0.3)]


def test_there_is_always_something_to_measure_with(site: Site) -> None:
    pages, origin = calibration.sample(site)
    assert len(pages) >= MIB and "libraries" in origin


def test_a_link_that_runs_dry_gets_a_quick_batch_and_the_mode_stays(proxy: SourceProxy) -> None:
    deciding = Adapting(DEFAULT, 1e6)
    slow = deciding.level
    assert is_xz(slow)
    known = deciding._controller.content
    for dry in (True, True, False, True, False):
        deciding.step(proxy, 1e6, not dry, 0, left_s=0.001 if dry else 2.0)
        assert deciding.level == slow
        assert (proxy.level == slow) != dry
        if dry:
            # What such a batch costs tells nothing of the mode in use.
            proxy.counters.plain_bytes += 1 << 20
            proxy.counters.wire_bytes += 1 << 20
    assert deciding._controller.content == known
    fast = Adapting(DEFAULT, 1e9)
    fast.step(proxy, 1e9, False, 0, left_s=0.0)
    assert proxy.level == fast.level and not is_xz(fast.level)
