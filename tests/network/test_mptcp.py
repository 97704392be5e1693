"""What is set up for MPTCP, on paper and on a real kernel."""

from __future__ import annotations

import pytest

from haulier.errors import HaulierError
from haulier.lab import namespaces
from haulier.network import mptcp
from haulier.network.addresses import Uplink
from haulier.session.mptcp import available
from tests.support.labs import lab

FIRST = Uplink("wan0", "10.91.0.1", "10.91.0.0/30")
SECOND = Uplink("wan1", "10.91.0.5", "10.91.0.4/30")
THIRD = Uplink("wan2", "2001:db8::5", "2001:db8::/64")
TWO = 'name = "mp"\n[[site]]\nname = "a"\n[[site]]\nname = "b"\n' + '[[link]]\na = "a"\nb = "b"\n' * 2


def test_the_plan_is_one_endpoint_one_rule_and_one_table_for_each_further_path() -> None:
    assert mptcp.script(mptcp.plan("10.91.0.2", [(SECOND, "10.91.0.6")])) == (
        "ip mptcp limits set subflows 8 add_addr_accepted 8\n"
        "ip route replace 10.91.0.2/32 via 10.91.0.6 dev wan1 table 7440\n"
        "ip rule add from 10.91.0.5/32 table 7440 priority 7440\n"
        "ip mptcp endpoint add 10.91.0.5 id 100 dev wan1 subflow\n"
    )
    # Another connection needs the first uplink's table as it is.
    assert mptcp.script(mptcp.plan("2001:db8:1::2", [(THIRD, "fe80::1")], {"10.91.0.5": 0})) == (
        "ip mptcp limits set subflows 8 add_addr_accepted 8\n"
        "ip -6 route replace 2001:db8:1::2/128 via fe80::1 dev wan2 table 7441 onlink\n"
        "ip -6 rule add from 2001:db8::5/128 table 7441 priority 7441\n"
        "ip mptcp endpoint add 2001:db8::5 id 101 dev wan2 subflow\n"
    )


def test_an_address_keeps_its_number_and_others_get_those_that_are_free() -> None:
    assert mptcp.numbered(["a", "b", "c"], {}) == {"a": 0, "b": 1, "c": 2}
    assert mptcp.numbered(["c", "d", "e"], {"a": 0, "c": 2}) == {"c": 2, "d": 1, "e": 3}


@pytest.mark.root
@pytest.mark.skipif(not available(), reason="this kernel has no MPTCP")
def test_it_is_set_up_and_taken_down_and_nothing_stays_when_it_fails() -> None:
    with lab(TWO) as made:

        def state() -> str:
            shown = [made.exec("a", ["ip", *words]).stdout for words in (["mptcp", "endpoint"], ["rule"])]
            return "".join(shown)

        before = state()
        steps = mptcp.plan("10.91.0.2", [(SECOND, "10.91.0.6")])
        inside = made.namespace("a")
        for _ in range(2):  # the second time over what is there
            namespaces.call(inside, lambda: mptcp.apply(steps))
            assert "10.91.0.5 id 100 subflow" in state() and "from 10.91.0.5 lookup 7440" in state()
        namespaces.call(inside, lambda: mptcp.undo(steps))
        assert state() == before
        bad = [*steps, mptcp.Step("mptcp endpoint add 10.91.0.5 dev nosuch subflow")]
        with pytest.raises(HaulierError, match="nosuch"):
            namespaces.call(inside, lambda: mptcp.apply(bad))
        assert state() == before
