"""What a store gives up, from what it remembers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.policy.choice import choose
from haulier.policy.coordinated import Facts, Informed
from haulier.policy.model import NAMES, Item

items = st.lists(
    st.builds(
        Item,
        key=st.integers(0, 999),
        size=st.integers(1, 50),
        hits=st.integers(0, 5),
        came=st.floats(0, 100),
        used=st.floats(0, 100),
        main=st.booleans(),
    ),
    unique_by=lambda item: item.key,
    max_size=40,
)


@given(st.sampled_from(NAMES), items, st.integers(-5, 600), st.sets(st.integers(0, 999), max_size=5))
def test_enough_goes_and_no_more(name: str, found: list[Item], need: int, spared: set[int]) -> None:
    before = [item.key for item in found]
    choice = choose(name, found, need, capacity=500, now=100.0, spare=spared.__contains__)
    sizes = {item.key: item.size for item in found if item.key not in spared}
    taken = [sizes[key] for key in choice.victims]  # type: ignore[index]
    assert len(set(choice.victims)) == len(choice.victims)
    assert sum(taken) >= min(max(need, 0), sum(sizes.values()))
    assert sum(taken[:-1]) < max(need, 1)
    assert not set(choice.moved) & set(choice.victims)
    assert [item.key for item in found] == before
    again = choose(name, found, need, capacity=500, now=100.0, spare=spared.__contains__)
    assert again == choice


def test_gdsf_asks_what_fetching_again_costs() -> None:
    found = [Item("far", 10), Item("near", 10)]
    facts = {"far": Facts(refetch_s=5.0), "near": Facts(refetch_s=1.0)}
    assert choose("gdsf", found, 1, capacity=10, now=1.0, facts=facts.__getitem__).victims == ["near"]  # type: ignore[arg-type]


def test_gdsf_ages_from_one_choice_to_the_next() -> None:
    facts = Facts(refetch_s=1.0)
    first = choose(
        "gdsf",
        [Item("a", 1, hits=3, used=5.0), Item("b", 1, used=5.0)],
        1,
        capacity=9,
        now=10.0,
        facts=lambda key: facts,
    )
    assert first.victims == ["b"]
    later = [Item("a", 1, hits=1, used=5.0), Item("c", 1, hits=1, used=20.0), Item("d", 1, hits=1, used=5.0)]
    second = choose("gdsf", later, 2, capacity=9, now=30.0, memory=first.memory, facts=lambda key: facts)
    assert second.victims == ["a", "d"]  # c was used after the floor rose


def test_s3_fifo_gives_another_round() -> None:
    found = [Item("a", 1, hits=2, came=1.0), Item("b", 1, came=2.0), Item("m", 1, main=True, hits=1, came=0.0)]
    choice = choose("s3-fifo", found, 1, capacity=20, now=5.0)
    assert (choice.victims, choice.moved) == (["b"], {"a": 0})


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (Facts(copies=0, popularity=9), Facts(copies=3, popularity=9)),  # no fourth copy next door
        (Facts(copies=1, popularity=9), Facts(copies=1, popularity=1)),
        (Facts(refetch_s=2, copies=1), Facts(refetch_s=1, copies=1)),
    ],
)
def test_what_the_coordinator_says_decides(better: Facts, worse: Facts) -> None:
    facts = {"better": better, "worse": worse}
    policy = Informed(facts.__getitem__, 10, now=100.0)  # type: ignore[arg-type]
    policy.restore([Item("better", 1, used=100.0), Item("worse", 1, used=100.0)])
    assert policy.victim() == "worse"


def test_own_use_counts_and_fades() -> None:
    policy = Informed(lambda key: Facts(), 10, now=10 * 86400.0)
    policy.restore([Item("a", 1, hits=3, used=0.0), Item("b", 1, used=10 * 86400.0), Item("c", 1, used=1e5)])
    policy.hit("c")
    policy.remove("x")
    assert [policy.victim() for _ in "abc"] == ["a", "b", "c"]
