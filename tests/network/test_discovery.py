"""Pairs of addresses: which are tried, and which of those that answer become paths."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from haulier.network.addresses import Uplink
from haulier.network.discovery import Pair, candidates, discover, match

FIBRE = Uplink("eth0", "192.0.2.1", "192.0.2.0/24")
FIBRE6 = Uplink("eth0", "2001:db8::1", "2001:db8::/64")
LTE = Uplink("wwan0", "100.64.0.1", "100.64.0.0/30")


def test_candidates_are_pairs_of_one_version_those_of_one_subnet_first() -> None:
    found = candidates([LTE, FIBRE, FIBRE6], ["203.0.113.1", "192.0.2.7", "2001:db8:9::1", "lisbon.example"])
    assert found[0] == Pair(FIBRE, "192.0.2.7")
    assert {(pair.uplink, pair.there) for pair in found} == {
        (LTE, "203.0.113.1"),
        (LTE, "192.0.2.7"),
        (FIBRE, "203.0.113.1"),
        (FIBRE, "192.0.2.7"),
        (FIBRE6, "2001:db8:9::1"),
    }


def test_two_uplinks_to_one_address_are_one_path_the_quicker() -> None:
    assert match([Pair(LTE, "203.0.113.1", 0.08), Pair(FIBRE, "203.0.113.1", 0.02)]) == [
        Pair(FIBRE, "203.0.113.1", 0.02)
    ]


def test_an_uplink_with_both_versions_is_one_path() -> None:
    found = match([Pair(FIBRE, "203.0.113.1", 0.03), Pair(FIBRE6, "2001:db8:9::1", 0.02)])
    assert found == [Pair(FIBRE6, "2001:db8:9::1", 0.02)]


def test_a_pair_gives_way_so_that_there_are_two_paths() -> None:
    # The quickest pair is fibre to .1; but LTE reaches .1 alone, so fibre takes .2.
    found = match([Pair(FIBRE, "203.0.113.1", 0.01), Pair(FIBRE, "203.0.113.2", 0.05), Pair(LTE, "203.0.113.1", 0.09)])
    assert {(pair.uplink.interface, pair.there) for pair in found} == {
        ("eth0", "203.0.113.2"),
        ("wwan0", "203.0.113.1"),
    }


def test_only_what_answers_is_a_path() -> None:
    def probing(pair: Pair, port: int) -> Pair | None:
        assert port == 7447
        return Pair(pair.uplink, pair.there, 0.02) if pair.uplink is FIBRE else None

    assert discover([FIBRE, LTE], ["203.0.113.1", "203.0.113.2"], 7447, probing) == [Pair(FIBRE, "203.0.113.1", 0.02)]
    assert discover([], ["203.0.113.1"], 7447, probing) == []
    assert discover([FIBRE], ["lisbon.example"], 7447, probing) == []


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 9)), max_size=12)


@given(pairs)
def test_no_more_disjoint_pairs_can_be_found_by_trying_all(edges: list[tuple[int, int, int]]) -> None:
    confirmed = [
        Pair(Uplink(f"eth{a}", f"10.0.{a}.1", f"10.0.{a}.0/24"), f"10.9.{b}.1", rtt / 100) for a, b, rtt in edges
    ]
    found = match(confirmed)
    assert len({p.uplink.interface for p in found}) == len({p.there for p in found}) == len(found)
    assert set(found) <= set(confirmed)
    joined = {(a, b) for a, b, _ in edges}
    best = max(sum((a, b) in joined for a, b in enumerate(order)) for order in permutations(range(4)))
    assert len(found) == best
