"""The forecast as arithmetic: what makes a handoff dearer makes the forecast higher."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.handoff.plan import _forecast
from haulier.units import MIB, PAGE

BUSY = {"zero": 0.5, "same": 0.2, "block": 0.1, "xor": 0.05, "literal": 0.15, "wire_per_sent_page": 1500.0}
IDLE = {"zero": 0.6, "same": 0.4, "block": 0.0, "xor": 0.0, "literal": 0.0, "wire_per_sent_page": 0.0}
NO_DISK = {"chunks": 0, "wire_per_chunk": 0.0}


def forecast(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "memory_bytes": 512 * MIB,
        "memory": BUSY,
        "disk": {"chunks": 100, "wire_per_chunk": 20_000.0},
        "missing": 0,
        "dirty_bps": 0.0,
        "rate_bps": 10e6,
        "rtt_s": 0.05,
    }
    return _forecast(**(values | changes))


def test_bytes_are_those_of_the_pages_and_chunks_that_have_to_be_sent() -> None:
    found = forecast()["bytes"]
    pages = 512 * MIB // PAGE
    assert found["disk"] == 2_000_000
    assert found["memory"] == pytest.approx(0.2 * pages * 1500 + pages * 0.05, abs=2)
    assert found["total"] == found["disk"] + found["memory"]
    assert sum(found["memory_pages"].values()) == pytest.approx(pages, abs=3)


def test_an_idle_guest_costs_next_to_nothing() -> None:
    found = forecast(memory=IDLE, disk=NO_DISK)
    assert found["bytes"]["total"] < 10_000
    assert found["seconds"]["likely"] < 3


def test_time_follows_the_link() -> None:
    slow, fast = forecast(rate_bps=10e6), forecast(rate_bps=50e6)
    assert slow["bytes"] == fast["bytes"]
    assert slow["seconds"]["likely"] == pytest.approx(2.3 + slow["bytes"]["total"] * 8 / 10e6, abs=0.01)
    assert slow["seconds"]["likely"] > 3 * fast["seconds"]["likely"]
    assert (slow["mode"]["level"], fast["mode"]["level"]) == (9, 3)
    assert forecast(rtt_s=0.2)["downtime_ms"]["likely"] > slow["downtime_ms"]["likely"]


amounts = st.floats(0, 1e9)


@given(amounts, amounts, st.floats(1e5, 1e9), st.floats(0, 1), st.integers(0, 1 << 34))
def test_more_to_do_is_never_less_work(dirty: float, more: float, rate: float, rtt: float, missing: int) -> None:
    low = forecast(dirty_bps=dirty, rate_bps=rate, rtt_s=rtt)
    high = forecast(dirty_bps=dirty + more, rate_bps=rate, rtt_s=rtt, missing=missing)
    assert high["bytes"]["total"] >= low["bytes"]["total"]
    for found in (low, high):
        for what in ("seconds", "downtime_ms"):
            assert 0 < found[what]["low"] <= found[what]["likely"] <= found[what]["high"]
        # However much the guest dirties, the forecast is a number one can show.
        assert found["bytes"]["memory"] < 512 * MIB


def test_what_is_missing_at_the_target_counts() -> None:
    assert forecast(missing=100 * MIB)["bytes"]["disk"] > forecast()["bytes"]["disk"] + 20 * MIB
