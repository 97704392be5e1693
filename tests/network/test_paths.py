"""A site's settings and another site's addresses become paths; what a handoff may spend on them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from haulier.errors import UsageError
from haulier.lab import namespaces
from haulier.lab.lab import Lab
from haulier.network import paths
from haulier.network.addresses import Uplink
from haulier.network.paths import Spender, Way, find, mptcp_steps, spread, tidy
from haulier.network.rules import Rule, read_rules, rule_for
from haulier.session.mptcp import available
from tests.support.labs import lab

FIBRE = Uplink("eth0", "192.0.2.1", "192.0.2.0/24")
LTE = Uplink("wwan0", "100.64.0.1", "100.64.0.0/30")


def test_rules_are_read() -> None:
    found = read_rules([{"uplink": "wwan0", "cap_mbps": 5, "cost": 10}, {"uplink": "192.0.2.1"}])
    assert found == (Rule("wwan0", 5e6, 10), Rule("192.0.2.1"))
    assert rule_for(LTE, found) == found[0] and rule_for(FIBRE, found) == found[1]
    assert rule_for(Uplink("eth1", "192.0.2.2", "192.0.2.0/24"), found) == rule_for(None, found) == Rule("")


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"uplink": ""},
        {"uplink": 3},
        {"uplink": "x" * 64},
        {"uplink": "a", "cap": 5},
        {"uplink": "a", "cap_mbps": -1},
        {"uplink": "a", "cap_mbps": float("nan")},
        {"uplink": "a", "cap_mbps": True},
        {"uplink": "a", "cap_mbps": "5mbit"},
        {"uplink": "a", "cost": 1.5},
        {"uplink": "a", "cost": -1},
        {"uplink": "a", "cost": 1001},
        "wwan0",
    ],
)
def test_rules_that_make_no_sense_are_refused(table: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"\[\[path\]\]"):
        read_rules([table])
    with pytest.raises(UsageError, match="at most"):
        read_rules([{"uplink": "a"}] * 17)


def test_a_way_is_bound_to_its_uplink_only_when_that_was_chosen() -> None:
    rule = Rule("wwan0", 5e6, 10)
    bound = Way("203.0.113.1", LTE, rule, True).address(7447)
    assert (bound.source, bound.local, bound.cap_bps, bound.cost) == ("wwan0", "100.64.0.1", 5e6, 10)
    routed = Way("203.0.113.1", LTE, rule, False).address(7447)
    assert (routed.source, routed.local, routed.cap_bps, routed.cost) == (None, None, 5e6, 10)


def test_mptcp_wants_an_uplink_for_each_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haulier.network.mptcp.gateways", lambda: {"wwan0": "100.64.0.2"})
    steps = mptcp_steps([Way("192.0.2.9", FIBRE, Rule(""), True), Way("203.0.113.1", LTE, Rule(""), True)])
    assert steps[1].do == "route replace 192.0.2.9/32 via 100.64.0.2 dev wwan0 table 7440"
    for second in (Way("192.0.2.10", FIBRE, Rule(""), True), Way("lisbon.example", None, Rule(""), False)):
        with pytest.raises(UsageError, match="of its own"):
            mptcp_steps([Way("192.0.2.9", FIBRE, Rule(""), True), second])


def test_money_is_spent_when_the_deadline_needs_it_and_a_level_at_a_time() -> None:
    spender = Spender("deadline", 100.0, [0, 10, 5, 5])
    assert spender.look(0.0, 10.0, -1.0) == 0, "nothing is known yet"
    assert spender.look(1.0, 11.0, 70.0) == 0
    assert spender.look(2.0, 12.0, 80.0) == 5
    assert spender.look(3.0, 13.0, 200.0) == 5, "it has not had the time to show"
    assert spender.look(4.5, 14.5, 200.0) == 10
    assert spender.look(9.0, 19.0, 1.0) == 10, "what was allowed stays so"
    assert Spender("deadline", 0.0, [0, 5]).look(0.0, 1e6, 1e6) == 0, "no deadline"
    assert Spender("cheap", 100.0, [0, 5]).look(0.0, 99.0, 99.0) == 0
    assert Spender("all", 0.0, [0, 5, 7]).look(0.0, 0.0, -1.0) == 7
    assert Spender("all", 0.0, [0]).look(0.0, 0.0, -1.0) == Spender("all", 0.0, []).cost == 0
    assert Spender("cheap", 0.0, [7, 5]).cost == 5, "no path is free: the cheapest is used at once"


TWO = (
    'name = "ways"\nipv6 = true\n[[site]]\nname = "a"\nguest_gateway = "10.77.0.1/24"\n[[site]]\nname = "b"\n'
    + '[[link]]\na = "a"\nb = "b"\n' * 2
)


@pytest.mark.root
def test_paths_are_found_by_trying(tmp_path: Path) -> None:
    with lab(TWO) as made:
        listener = made.call("b", _listen)
        port = listener.getsockname()[1]
        inside = made.namespace("a")
        names = made.links_between("a", "b")
        there = [made.address("b", name) for name in names]
        cheap_last = (Rule("wan0", 0.0, 3),)

        def explore() -> list[Way]:
            return find([*there, made.address6("b", names[0]), "192.0.2.99"], port, cheap_last, explore=True)

        # 192.0.2.99 answers to nobody.
        ways = namespaces.call(inside, explore)
        assert [(way.uplink.interface, way.rule.cost, way.bound) for way in ways if way.uplink] == [
            ("wan1", 0, True),
            ("wan0", 3, True),
        ]
        assert {way.there for way in ways} <= {*there, made.address6("b", names[0])}
        plain = namespaces.call(inside, lambda: find(there, port))
        assert [(way.there, way.bound) for way in plain] == [(host, False) for host in there]
        assert [way.uplink.interface for way in plain if way.uplink] == ["wan0", "wan1"]

        with spread(plain[:1] * 2, tmp_path) as said:
            assert "of its own" in said
        listener.close()


def _listen() -> Any:
    import socket

    return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)


def _state(made: Lab, site: str) -> str:
    """What a set-up for MPTCP changes of a site's network."""
    words = ("mptcp endpoint", "-4 rule", "-4 route show table all")
    return "".join(made.exec(site, ["ip", *line.split()]).stdout for line in words)


THREE = 'name = "mp"\n[[site]]\nname = "a"\n[[site]]\nname = "b"\n' + '[[link]]\na = "a"\nb = "b"\n' * 3
needs_mptcp = pytest.mark.skipif(not available(), reason="this kernel has no MPTCP")


@pytest.mark.root
@needs_mptcp
def test_mptcp_is_set_up_for_as_long_as_somebody_uses_it_and_for_all_of_them(tmp_path: Path) -> None:
    with lab(THREE) as made:
        there = [made.address("b", name) for name in made.links_between("a", "b")]
        own = [made.address("a", name) for name in made.links_between("a", "b")]
        before = _state(made, "a")

        def use() -> None:
            ways = find(there, 0)
            first, second = spread(ways, tmp_path), spread(ways[1:], tmp_path)
            assert first.__enter__() == ""
            alone = _state(made, "a")
            assert f"{own[1]} id 100 subflow" in alone and f"{own[2]} id 101 subflow" in alone
            # What its subflows need, and nothing else that comes from there.
            assert f"{there[0]} via {there[2]} dev wan2 table 7441" in alone
            assert "default via" not in alone
            # To another of the addresses, by one of the same uplinks: it shares the rule, not the route.
            assert second.__enter__() == ""
            assert f"{there[1]} via {there[2]} dev wan2 table 7441" in _state(made, "a")
            first.__exit__(None, None, None)
            assert set(alone.splitlines()) < set(_state(made, "a").splitlines()), "the other one may use it"
            second.__exit__(None, None, None)
            assert _state(made, "a") == before
            assert not (tmp_path / "mptcp").exists()

        namespaces.call(made.namespace("a"), use)


SPREAD = """
import sys
from pathlib import Path
from haulier.network.paths import find, spread
with spread(find(sys.argv[2:], 0), Path(sys.argv[1])) as said:
    print(said, flush=True)
    sys.stdin.read()
"""


@pytest.mark.root
@needs_mptcp
def test_what_a_killed_process_had_set_up_is_taken_away_when_nobody_else_uses_it(tmp_path: Path) -> None:
    with lab(THREE) as made, contextlib.ExitStack() as stack:
        there = [made.address("b", name) for name in made.links_between("a", "b")]
        before = _state(made, "a")

        def clear_up() -> str:
            namespaces.call(made.namespace("a"), lambda: tidy(tmp_path))
            return _state(made, "a")

        assert clear_up() == before
        words = [sys.executable, "-c", SPREAD, str(tmp_path)]
        killed, other = (
            stack.enter_context(made.popen("a", [*words, *hosts], stdin=PIPE, stdout=PIPE, text=True))
            for hosts in (there, there[1:])
        )
        stack.callback(other.kill)
        stack.callback(killed.kill)
        assert killed.stdout.readline() == other.stdout.readline() == "\n"
        both = _state(made, "a")
        assert both != before
        killed.kill()
        killed.wait()
        assert clear_up() == both, "the other one lives"
        other.kill()
        other.wait()
        assert _state(made, "a") == both
        assert clear_up() == before
        assert not (tmp_path / "mptcp").exists()


def test_a_set_up_of_which_nothing_can_be_read_is_none(tmp_path: Path) -> None:
    for text in ("", "1 999999999", "{}", '{"users": [], "numbers": {}, "steps": 1}', "\xff"):
        (tmp_path / "mptcp").write_text(text, "latin-1")
        assert paths._load(tmp_path / "mptcp").users == []
