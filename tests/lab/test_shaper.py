"""The shaper under a virtual clock: exact figures, no waiting."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.errors import UsageError
from haulier.lab.shaper import Shape, Shaper

PACKET = bytes(1250)  # 10 000 bits: 1 ms at 10 Mbit/s


def shaper(**shape: float | int | bool) -> Shaper:
    return Shaper(Shape(**shape), random.Random(7))  # type: ignore[arg-type]


def drain(link: Shaper) -> list[tuple[float, bytes]]:
    """Everything that still comes out, with its times."""
    out: list[tuple[float, bytes]] = []
    while (due := link.due()) is not None:
        out.extend((due, packet) for packet in link.ready(due))
    return out


def test_packet_comes_out_after_transmission_and_delay() -> None:
    link = shaper(rate_bps=10e6, delay_s=0.025)
    link.push(1.0, PACKET)
    assert link.due() == pytest.approx(1.026)
    assert link.ready(1.0259) == []
    assert link.ready(1.0261) == [PACKET]
    assert link.due() is None


def test_unlimited_link_only_delays() -> None:
    link = shaper(delay_s=0.01)
    for _ in range(100):
        link.push(0.0, PACKET)
    assert [time for time, _ in drain(link)] == [pytest.approx(0.01)] * 100


def test_back_to_back_packets_leave_at_the_rate() -> None:
    link = shaper(rate_bps=10e6, delay_s=0.025, queue_bytes=1 << 20)
    for _ in range(50):
        link.push(0.0, PACKET)
    assert [time for time, _ in drain(link)] == [pytest.approx(0.001 * n + 0.025) for n in range(1, 51)]


def test_queue_drops_its_tail_and_does_not_count_the_packet_being_sent() -> None:
    link = shaper(rate_bps=10e6, queue_bytes=10 * len(PACKET))
    for _ in range(20):
        link.push(0.0, PACKET)
    assert link.queued_bytes == 10 * len(PACKET)
    assert link.counts.dropped == 9
    assert len(drain(link)) == 11


def test_queue_has_room_again_as_it_is_served() -> None:
    link = shaper(rate_bps=10e6, queue_bytes=2 * len(PACKET))
    for _ in range(3):
        link.push(0.0, PACKET)
    link.push(0.0005, PACKET)
    assert link.counts.dropped == 1
    link.push(0.0011, PACKET)
    assert link.counts.dropped == 1


@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        (Shape(rate_bps=10e6, delay_s=0.025), 62_500),
        (Shape(rate_bps=100e6, delay_s=0.1), 2_500_000),
        (Shape(rate_bps=1e6, delay_s=0.001), 48_000),
        (Shape(rate_bps=10e6, delay_s=0.025, queue_bytes=5000), 5000),
    ],
)
def test_default_queue_is_one_bandwidth_delay_product(shape: Shape, limit: int) -> None:
    assert shape.limit_bytes == limit


def test_new_rate_applies_to_what_waits_in_the_queue() -> None:
    link = shaper(rate_bps=10e6, queue_bytes=1 << 20)
    for _ in range(11):
        link.push(0.0, PACKET)
    # At 1.5 ms the first is out and half of the second; the rest goes ten times slower from here.
    link.reshape(0.0015, link.shape.changed(rate_bps=1e6))
    times = [time for time, _ in drain(link)]
    assert times[0] == pytest.approx(0.001)
    assert times[1] == pytest.approx(0.0015 + 0.005)
    assert times[10] == pytest.approx(0.0065 + 9 * 0.01)


def test_rate_can_be_lifted_while_packets_wait() -> None:
    link = shaper(rate_bps=8e3, delay_s=0.01, queue_bytes=1 << 20)
    for _ in range(5):
        link.push(0.0, PACKET)
    link.reshape(0.1, link.shape.changed(rate_bps=0.0))
    assert [time for time, _ in drain(link)] == [pytest.approx(0.11)] * 5


def test_new_delay_never_reorders() -> None:
    link = shaper(delay_s=0.5)
    link.push(0.0, b"first")
    link.reshape(0.1, link.shape.changed(delay_s=0.01))
    link.push(0.1, b"second")
    assert drain(link) == [(0.5, b"first"), (0.5, b"second")]


def test_down_loses_what_is_on_its_way_and_up_carries_again() -> None:
    link = shaper(rate_bps=10e6, delay_s=0.025)
    for _ in range(3):
        link.push(0.0, PACKET)
    link.reshape(0.002, link.shape.changed(up=False))
    link.push(0.003, PACKET)
    assert drain(link) == []
    link.reshape(1.0, link.shape.changed(up=True))
    link.push(1.0, b"back")
    assert [packet for _, packet in drain(link)] == [b"back"]
    assert link.counts.cut == 4
    assert link.counts.delivered == 1


def test_loss_is_a_share_and_costs_no_capacity() -> None:
    link = shaper(rate_bps=10e6, loss=0.2, queue_bytes=1 << 28)
    for _ in range(20_000):
        link.push(0.0, PACKET)
    # Five standard deviations of a binomial distribution.
    assert abs(link.counts.lost - 4000) < 5 * (20_000 * 0.2 * 0.8) ** 0.5
    last = drain(link)[-1][0]
    assert last == pytest.approx(0.001 * (20_000 - link.counts.lost))


def test_total_loss_loses_everything() -> None:
    link = shaper(loss=1.0)
    for _ in range(1000):
        link.push(0.0, PACKET)
    assert link.counts.lost == 1000
    assert link.due() is None


def test_jitter_is_uniform_around_the_delay() -> None:
    link = shaper(delay_s=0.05, jitter_s=0.02)
    delays = []
    for n in range(2000):
        link.push(float(n), PACKET)
        due = link.due()
        assert due is not None
        delays.append(due - n)
        assert link.ready(due) == [PACKET]
    assert min(delays) >= 0.03 - 1e-9
    assert max(delays) <= 0.07 + 1e-9
    assert sum(delays) / len(delays) == pytest.approx(0.05, abs=0.002)


SHAPES = st.builds(
    lambda rate, delay, jitter, loss, queue, up: Shape(
        rate_bps=rate, delay_s=delay, jitter_s=delay * jitter, loss=loss, queue_bytes=queue, up=up
    ),
    st.sampled_from([0.0, 8e3, 1e6, 10e6, 1e9]),
    st.sampled_from([0.0, 0.001, 0.2]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0, 1500, 10_000]),
    st.booleans(),
)
STEPS = st.lists(
    st.tuples(st.floats(0, 0.3), st.one_of(st.integers(20, 1500), st.just(None), SHAPES)), min_size=1, max_size=60
)


@settings(max_examples=200, deadline=None)
@given(SHAPES, STEPS)
def test_any_history_keeps_order_loses_no_count_and_respects_bounds(
    first: Shape, steps: list[tuple[float, int | Shape | None]]
) -> None:
    link = Shaper(first, random.Random(1))
    now = 0.0
    sent: list[bytes] = []
    out: list[bytes] = []
    for pause, step in steps:
        now += pause
        if isinstance(step, Shape):
            link.reshape(now, step)
        elif step is None:
            out.extend(link.ready(now))
        else:
            packet = len(sent).to_bytes(4, "big") + bytes(step)
            sent.append(packet)
            link.push(now, packet)
    while (due := link.due()) is not None:
        now = max(now, due)
        out.extend(link.ready(now))
    counts = link.counts
    assert counts.pushed == len(sent)
    assert counts.delivered == len(out)
    assert counts.pushed == counts.lost + counts.dropped + counts.cut + counts.delivered
    assert counts.delivered_bytes == sum(map(len, out))
    assert out == sorted(out)
    assert set(out) <= set(sent)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(20, 1500)), min_size=1, max_size=100))
def test_no_window_of_time_carries_more_than_the_rate(arrivals: list[tuple[float, int]]) -> None:
    link = shaper(rate_bps=1e6, delay_s=0.02, queue_bytes=1 << 20)
    now = 0.0
    out: list[tuple[float, bytes]] = []
    for pause, size in arrivals:
        now += pause
        while (due := link.due()) is not None and due <= now:
            out.extend((due, packet) for packet in link.ready(due))
        link.push(now, bytes(size))
    out.extend(drain(link))
    assert len(out) == len(arrivals)
    for start in range(0, len(out), 7):
        bits = 0
        for time, packet in out[start + 1 :]:
            bits += len(packet) * 8
            assert time - out[start][0] >= bits / 1e6 - 1e-9


@pytest.mark.parametrize(
    "values",
    [
        {"rate_bps": -1.0},
        {"rate_bps": 100.0},
        {"rate_bps": 1e15},
        {"rate_bps": float("nan")},
        {"delay_s": -0.1},
        {"delay_s": 1e9},
        {"delay_s": float("nan")},
        {"delay_s": 0.01, "jitter_s": 0.02},
        {"loss": 1.1},
        {"loss": -0.1},
        {"queue_bytes": 10},
        {"queue_bytes": 1 << 40},
    ],
)
def test_values_without_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Shape(**values)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        Shape().changed(**values)
