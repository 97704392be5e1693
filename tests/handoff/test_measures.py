"""What is done about a guest that outruns the link: nothing to one that does not, and in the end something certain."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.handoff.convergence import Reading
from haulier.handoff.measures import (
    AUTO_CONVERGE,
    GENTLE,
    HELD_BACK,
    HOVER_ROUNDS,
    HOVER_S,
    POST_COPY,
    REACH,
    ROUNDS,
    STEP_ROUNDS,
    STEP_S,
    STEPS,
    Kind,
    Measure,
    Measures,
    advice,
    need_s,
    throttled,
)

RATE = 10e6


def reading(round_: int, megabytes: float, now: float, ratio: float = 1.0) -> Reading:
    return Reading(now, round_, int(megabytes * 1e6), RATE, ratio)


def drive(measures: Measures, left: list[float], step_s: float = 5.0) -> list[Measure]:
    """One reading at the beginning of each round, and one in its middle."""
    found = []
    for number, megabytes in enumerate(left):
        for part in (0.0, 0.5):
            measure = measures.note(reading(number + 2, megabytes * (1 - part), (number + part) * step_s))
            if measure is not None:
                found.append(measure)
    return found


def test_a_guest_that_converges_is_left_alone() -> None:
    measures = Measures([AUTO_CONVERGE], 300)
    assert drive(measures, [40, 20, 10, 5, 2.5, 1.2, 0.6, 0.3]) == []
    assert measures.taken == []


WITHIN = REACH * 0.3 * RATE / 8 / 1e6 * 0.9


def test_one_that_hovers_within_reach_of_the_gate_is_left_alone_for_a_minute() -> None:
    rounds = int(HOVER_S / 2)
    assert drive(Measures([], 300), [40, 20, *[WITHIN] * rounds], step_s=2.0) == []
    for allowed, kind in (((), Kind.REFUSE), ((POST_COPY,), Kind.POST_COPY), ((AUTO_CONVERGE,), Kind.THROTTLE)):
        found = drive(Measures(allowed, 300), [40, 20, *[WITHIN] * (rounds + 2)], step_s=2.0)
        assert found[0].kind is kind and "hovered" in found[0].why
    still, *_ = drive(Measures([], 300), [40, 20, *[0.01] * (rounds + 2)], step_s=2.0)
    assert still.kind is Kind.REFUSE and "disk" in still.why
    # Whoever was beyond it meanwhile begins anew.
    between = [40, 20, *[WITHIN] * (rounds - 1), 2 * WITHIN, *[WITHIN] * (rounds - 1)]
    assert drive(Measures([], 300), between, step_s=2.0) == []


def test_one_that_hovers_while_it_is_slowed_is_slowed_further_and_refused_in_the_end() -> None:
    slowed = 0.9 * 0.3 * RATE / 8 / 1e6
    measures = Measures([AUTO_CONVERGE], 300)
    found = drive(measures, [slowed] * 400, step_s=0.5)
    assert [measure.percent for measure in found[: len(STEPS)]] == list(STEPS)
    assert found[len(STEPS)].kind is Kind.REFUSE
    after = [taken["after_s"] for taken in measures.taken[: len(STEPS) + 1]]
    assert all(later - sooner >= 2 * STEP_S for sooner, later in itertools.pairwise(after))


def test_a_link_that_was_gone_is_no_reason_to_give_up() -> None:
    measures = Measures([], 300)
    assert [measures.note(reading(2 + n, WITHIN, 2.0 * n)) for n in range(HOVER_ROUNDS // 2)] == [None] * 12
    assert measures.note(reading(2 + HOVER_ROUNDS // 2, WITHIN, 3600.0)) is None


def test_one_that_outruns_the_link_is_refused_when_nothing_is_allowed() -> None:
    measures = Measures([], 300)
    found = drive(measures, [20.0] * ROUNDS)
    assert [measure.kind for measure in found] == [Kind.REFUSE]
    assert "16.0 s" in found[0].why and "300 ms" in found[0].why
    assert measures.taken[0]["what"] == "refuse"
    assert "--allow auto-converge" in advice([]) and "--allow post-copy" in advice([AUTO_CONVERGE])
    assert "--allow" not in advice([AUTO_CONVERGE, POST_COPY])


def test_it_goes_before_its_memory_as_soon_as_rounds_are_in_vain_if_that_is_allowed() -> None:
    found = drive(Measures([POST_COPY], 300), [20.0] * ROUNDS)
    assert found[0].kind is Kind.POST_COPY and "3 rounds" in found[0].why
    assert drive(Measures([POST_COPY], 300), [20.0, 12.0, 7.0, 4.0, 2.0, 0.5]) == []


def test_it_is_slowed_a_little_before_it_goes_without_its_memory() -> None:
    found = drive(Measures([AUTO_CONVERGE, POST_COPY], 300), [20.0] * 40)
    kinds = [measure.kind for measure in found]
    assert kinds[: GENTLE + 1] == [Kind.THROTTLE] * GENTLE + [Kind.POST_COPY]
    assert [measure.percent for measure in found[:GENTLE]] == list(STEPS[:GENTLE])


def test_one_that_will_be_late_goes_before_its_memory() -> None:
    found = drive(Measures([POST_COPY], 300, deadline=30.0), [20.0, 17.0, 15.0, 14.0])
    assert found[0].kind is Kind.POST_COPY and "are left" in found[0].why


def test_what_is_allowed_comes_first_each_step_with_time_to_work_and_a_refusal_last() -> None:
    found = drive(Measures([AUTO_CONVERGE], 300), [20.0] * 60)
    assert [measure.percent for measure in found[: len(STEPS)]] == list(STEPS)
    assert found[len(STEPS)].kind is Kind.REFUSE
    measures = Measures([AUTO_CONVERGE], 300)
    drive(measures, [20.0] * 60)
    rounds = [taken["round"] for taken in measures.taken[: len(STEPS) + 1]]
    assert all(later - sooner >= STEP_ROUNDS for sooner, later in itertools.pairwise(rounds))


def test_a_step_that_helps_is_the_last() -> None:
    found = drive(Measures([AUTO_CONVERGE], 300), [20.0] * ROUNDS + [14, 9, 6, 4, 2.6, 1.7, 1.1, 0.5])
    assert [measure.percent for measure in found] == [STEPS[0]]


def test_one_that_hovers_within_reach_has_until_what_is_left_to_do_needs_the_time() -> None:
    hovers = [40, 20, *[WITHIN, WITHIN * 0.95] * 10]
    deadline = 80.0
    assert drive(Measures([], 300, deadline=deadline), hovers[:15]) == []
    for allowed, least in (([], 0), ([POST_COPY], STEP_S), ([AUTO_CONVERGE], STEP_S * len(STEPS))):
        measures = Measures(allowed, 300, deadline=deadline)
        first = drive(measures, hovers)[0]
        at = (measures.taken[0]["round"] - 2) * 5.0
        assert first.kind is (Kind.THROTTLE if AUTO_CONVERGE in allowed else Kind.POST_COPY if allowed else Kind.REFUSE)
        assert least - 5.0 < deadline - at <= least  # rounds are looked at every five seconds


def test_a_deadline_that_will_not_be_met_is_acted_on_before_it_is_missed() -> None:
    shrinking = [40 * 0.97**n for n in range(30)]
    assert drive(Measures([AUTO_CONVERGE], 300), shrinking[:4]) == []
    found = drive(Measures([AUTO_CONVERGE], 300, deadline=60.0), shrinking[:4])
    assert [measure.percent for measure in found] == [STEPS[0]] and "are left" in found[0].why
    (refused,) = drive(Measures([], 300, deadline=60.0), shrinking[:3])
    assert refused.kind is Kind.REFUSE
    assert drive(Measures([], 300, deadline=1e6), shrinking[:4]) == []


def test_the_outlook_is_when_the_rest_is_small_enough() -> None:
    measures = Measures([], 1000)
    drive(measures, [12.5, 10.0, 7.5])
    found = measures.outlook(reading(4, 7.5, 10.0))
    # 2 s of link less in each 5 s: from 6 s to half a second takes 13.75 s.
    assert found.seconds == pytest.approx(13.75) and found.downtime_s == pytest.approx(6.0)
    growing = Measures([], 1000)
    drive(growing, [5.0, 10.0])
    assert growing.outlook(reading(3, 10, 5.0)).seconds == float("inf")
    assert Measures([], 1000).outlook(reading(2, 1.25, 0)).seconds == 1.0


@given(st.lists(st.floats(0, 1000), max_size=60), st.booleans(), st.integers(10, 60_000))
def test_never_more_than_every_step_once_before_a_refusal(left: list[float], allowed: bool, downtime: int) -> None:
    found = drive(Measures([AUTO_CONVERGE] if allowed else [], downtime), left)
    steps = [measure.percent for measure in found if measure.kind is Kind.THROTTLE]
    assert steps == list(STEPS[: len(steps)])
    kinds: list[Any] = [measure.kind for measure in found]
    if Kind.REFUSE in kinds and allowed:
        assert kinds.index(Kind.REFUSE) == len(STEPS)


def test_pages_that_shrink_on_the_wire_need_less_of_it() -> None:
    assert need_s(reading(2, 10, 0, 1.0)) == pytest.approx(8.0)
    assert need_s(reading(2, 10, 0, 5.0)) == pytest.approx(2.0)
    assert HELD_BACK["max_cpu_throttle"] <= 1 and throttled(80)["max_cpu_throttle"] == 80
