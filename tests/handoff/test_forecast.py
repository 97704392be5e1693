"""The forecast as arithmetic: what makes a handoff dearer makes it higher, and what was learnt brings it nearer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.handoff import forecast
from haulier.handoff.forecast import FIXED_BYTES, Pace, Sampled, Took, compare, learn, make
from haulier.units import MIB

KINDS = {"zero": 60_000.0, "same": 40_000.0, "block": 10_000.0, "xor": 5_000.0, "literal": 16_072.0}
BUSY = Sampled(memory_bytes=512 * MIB, pages=KINDS, memory_wire=20e6, memory_error=1e6, disk_chunks=100, disk_wire=2e6)
IDLE = Sampled(memory_bytes=512 * MIB, pages=KINDS, memory_wire=0.0)


def of(found: Sampled = BUSY, rate: float = 10e6, rtt: float = 0.05, pace: Pace | None = None, **changes: Any) -> Any:
    return make(msgspec.structs.replace(found, **changes), rate, rtt, pace)


def test_bytes_are_those_of_memory_disk_and_what_is_always_sent() -> None:
    found = of(missing=1 << 20, missing_wire=5e5)["bytes"]
    assert found["total"] == found["disk"] + found["memory"] + FIXED_BYTES
    assert (found["disk"], found["memory"]) == (2_500_000, 20_000_000)
    assert found["low"] < found["total"] < found["high"]


def test_an_idle_guest_takes_the_time_that_its_memory_takes_to_pass() -> None:
    found = of(IDLE)
    assert found["limit"] == "processing"
    assert found["seconds"]["likely"] == pytest.approx(1.1 + 6 * 0.05 + 0.75, abs=0.01)
    assert of(rate=1e9)["limit"] == "processing" and of(rate=5e6)["limit"] == "link"


def test_a_guest_that_outruns_the_link_is_said_to_and_still_gets_a_number() -> None:
    slow = of(dirty_wire_s=2e6)
    assert not slow["converges"] and of(dirty_wire_s=1e5)["converges"]
    assert slow["bytes"]["again"] <= 512 * MIB / 2


def test_pages_that_are_rewritten_again_and_again_are_sent_a_few_times_only() -> None:
    # 300 KB a second for the 47 s of a first pass at 4 Mbps; but it is always the same 800 KB.
    once = of(rate=4e6, dirty_wire_s=3e5)["bytes"]["again"]
    hot = of(rate=4e6, dirty_wire_s=3e5, hot_wire=8e5)["bytes"]["again"]
    assert 8e5 <= hot < 3 * 8e5 < 14e6 < once
    assert of(dirty_wire_s=3e5, hot_wire=0.0)["bytes"]["again"] == 0


def test_what_fits_into_the_downtime_converges_however_often_it_is_rewritten() -> None:
    assert of(dirty_wire_s=2e6, hot_wire=1e5)["converges"] and not of(dirty_wire_s=2e6, hot_wire=1e6)["converges"]


def test_what_is_written_to_the_disk_while_it_lasts_comes_on_top() -> None:
    rest, busy = of()["bytes"], of(disk_wire_s=1e5)["bytes"]
    # 1.1 s and the 17.6 s of the first pass, and what is written while that is sent.
    assert busy["disk"] - rest["disk"] == pytest.approx(1e5 * (1.1 + 17.6) * 1.087, rel=0.02)
    assert busy["again"] == 0 and busy["total"] - rest["total"] == busy["disk"] - rest["disk"]


amounts = st.floats(0, 1e8)


@given(amounts, amounts, st.floats(1e5, 1e9), st.floats(1e5, 1e9), st.floats(0, 1))
def test_more_to_do_is_never_less_work(dirty: float, more: float, rate: float, faster: float, rtt: float) -> None:
    low, high = of(rate=rate, rtt=rtt, dirty_wire_s=dirty), of(rate=rate, rtt=rtt, dirty_wire_s=dirty + more)
    assert high["bytes"]["total"] >= low["bytes"]["total"]
    assert high["seconds"]["likely"] >= low["seconds"]["likely"]
    quick = of(rate=rate + faster, rtt=rtt, dirty_wire_s=dirty)
    assert quick["seconds"]["likely"] <= low["seconds"]["likely"] + 0.01
    for found in (low, high, quick):
        for what in ("seconds", "downtime_ms"):
            assert 0 <= found[what]["low"] <= found[what]["likely"] <= found[what]["high"]


def took(total: float, wire: int = 0, down: float = 0.1) -> Took:
    return Took(memory_bytes=1024 * MIB, wire=wire, rate_bps=10e6, rtt_s=0.02, total_s=total, downtime_s=down)


def test_the_pace_is_learnt_from_handoffs() -> None:
    assert learn([]) == Pace()
    # What is fixed is what is left of those that waited for the link: 60 - 0.12 - 56 s.
    waited = took(60, wire=70_000_000)
    assert learn([waited]).fixed_s == pytest.approx(3.88)
    # They say nothing of memory that passes; the others do.
    assert learn([waited]).pass_s == Pace().pass_s
    slow = learn([took(9.22), took(10.22), took(100.0)])
    assert slow.pass_s == pytest.approx(9.0) and slow.downtime_s == pytest.approx(0.05)
    assert slow.fixed_s == Pace().fixed_s


def test_a_handoff_that_did_not_wait_bounds_what_is_fixed() -> None:
    quick = learn([took(0.62), took(0.72), took(60, wire=70_000_000)])
    assert quick.fixed_s == pytest.approx(0.55) and quick.pass_s == pytest.approx(0.05)
    assert learn([took(0.1)] * 3).fixed_s == 0.2


def test_what_came_is_told_as_a_share_of_what_was_forecast() -> None:
    made = of()
    came = compare(made, made["bytes"]["total"] * 2, made["seconds"]["likely"], made["downtime_ms"]["likely"] / 2)
    assert came == {"bytes": 2.0, "seconds": 1.0, "downtime": 0.5}
    assert forecast.interval(10, 0.1) == {"low": 9, "likely": 10, "high": 11}
