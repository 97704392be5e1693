"""Bulk that comes steadily and slowly is read a little later; nothing else waits."""

from __future__ import annotations

import pytest

from haulier.session.leisure import LEAST, LOOK_S, MOST, QUIET_S, SHARE, STEADY_RTTS, STEADY_S, Leisure

RTT = 0.05


def steady(leisure: Leisure, count: int = 12_000, every_s: float = 0.01, rtt: float = RTT) -> list[float]:
    """What it says at each of the looks of two seconds."""
    return [leisure.note(at * every_s, count, rtt) for at in range(int(2 * STEADY_S / every_s))]


def test_it_rests_once_bulk_has_come_for_a_while() -> None:
    said = steady(Leisure())
    begun = next(at for at, rest in enumerate(said) if rest)
    assert begun * 0.01 == pytest.approx(STEADY_S, abs=0.02)
    assert set(said[begun:]) == {LOOK_S}


def test_on_a_long_way_the_sender_has_found_the_rate_before() -> None:
    assert set(steady(Leisure(), rtt=2.5 * STEADY_S / STEADY_RTTS)) == {0.0}


def test_the_shorter_the_way_the_shorter_the_rest() -> None:
    assert steady(Leisure(), rtt=0.004)[-1] == pytest.approx(SHARE * 0.004)
    assert steady(Leisure(), rtt=0.0)[-1] == 0.0


@pytest.mark.parametrize(("count", "every_s"), [(LEAST - 1, 0.01), (MOST + 1, 0.01), (12_000, QUIET_S * 1.1)])
def test_answers_and_fast_links_and_what_comes_now_and_then_are_read_at_once(count: int, every_s: float) -> None:
    assert set(steady(Leisure(), count, every_s)) == {0.0}


def test_after_a_pause_it_begins_anew_and_small_messages_between_do_not_matter() -> None:
    leisure = Leisure()
    steady(leisure)
    at = 2 * STEADY_S
    assert leisure.note(at, 12_000, RTT) == LOOK_S
    assert leisure.note(at + 0.01, 30, RTT) == 0.0
    assert leisure.note(at + 0.02, 12_000, RTT) == LOOK_S
    assert leisure.note(at + 0.03 + QUIET_S, 12_000, RTT) == 0.0
