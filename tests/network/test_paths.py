"""A site's settings and another site's addresses become paths; what a handoff may spend on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from haulier.errors import UsageError
from haulier.lab import namespaces
from haulier.network import paths
from haulier.network.addresses import Uplink
from haulier.network.paths import Spender, Way, find, mptcp_steps, spread
from haulier.network.rules import Rule, read_rules, rule_for
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
    assert steps[1].do == "route replace default via 100.64.0.2 dev wwan0 table 7440"
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
def test_paths_are_found_by_trying_and_mptcp_is_set_up_for_as_long_as_somebody_uses_it(tmp_path: Path) -> None:
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

        def endpoints() -> str:
            return str(made.exec("a", ["ip", "mptcp", "endpoint"]).stdout)

        def use() -> None:
            with spread(plain, tmp_path) as said:
                assert said == "" and "10.91.0.5" in endpoints()
                # Another process that uses it too.
                (tmp_path / "mptcp").write_text(f"1 {(tmp_path / 'mptcp').read_text()}")
            assert "10.91.0.5" in endpoints(), "the other one still needs it"
            with spread(plain, tmp_path):
                (tmp_path / "mptcp").write_text("")
            assert endpoints() == ""

        namespaces.call(inside, use)
        with spread(plain[:1] * 2, tmp_path) as said:
            assert "of its own" in said
        listener.close()


def _listen() -> Any:
    import socket

    return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)


def test_the_users_of_a_set_up_are_those_that_live(tmp_path: Path) -> None:
    (tmp_path / "mptcp").write_text("1 999999999")
    assert paths._users(tmp_path / "mptcp") == {1}
    (tmp_path / "mptcp").write_text("nonsense")
    assert paths._users(tmp_path / "mptcp") == set()
