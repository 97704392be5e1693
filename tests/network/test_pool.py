"""Pools of addresses and their leases."""

from __future__ import annotations

from pathlib import Path

import pytest

from haulier.errors import HaulierError, NoRoom, UsageError
from haulier.network import iproute
from haulier.network.pool import Leases, Pool


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The routes that `ip` would have."""
    made: set[str] = set()

    def run(words: list[str]) -> str:
        assert words[:2] == ["ip", "route"] and words[4:] == ["dev", "br0"]
        if words[2] == "replace":
            made.add(words[3])
        elif words[3] not in made:
            raise HaulierError("no such route")
        else:
            made.remove(words[3])
        return ""

    monkeypatch.setattr(iproute, "run", run)
    return made


def test_a_pool_is_a_range_or_a_subnet_without_its_ends() -> None:
    assert len(Pool.parse("10.78.1.10-10.78.1.12")) == 3
    subnet = Pool.parse("10.78.1.0/24")
    assert (str(subnet.first), str(subnet.last)) == ("10.78.1.2", "10.78.1.254")
    assert "10.78.1.2" in subnet and "10.78.1.1" not in subnet and "10.78.1.255" not in subnet
    assert "fd78::5" in Pool.parse("fd78::/64") and "fd78::5" not in subnet and "web1" not in subnet
    for wrong in ("", "10.78.1.0", "10.78.1.9-10.78.1.1", "10.78.1.1-fd78::1", "10.78.1.1/24", "a-b", "10.0.0.0/32"):
        with pytest.raises(UsageError):
            Pool.parse(wrong)


def test_a_guest_gets_the_same_address_each_time_unless_somebody_has_it() -> None:
    pool = Pool.parse("10.78.1.10-10.78.1.12")
    mine = pool.choose("web1", ())
    assert pool.choose("web1", ()) == mine and mine in pool
    others = {mine}
    for name in ("web1", "web2"):
        others.add(pool.choose(name, others))
    assert len(others) == 3
    with pytest.raises(NoRoom, match="all 3 addresses"):
        pool.choose("web3", others)


def test_leases_outlive_the_process_and_each_has_its_route(tmp_path: Path, routes: set[str]) -> None:
    leases = Leases(tmp_path / "leases", "10.78.1.10-10.78.1.12", "br0")
    assert leases.all() == [] and leases.of("web1") == ""
    leases.drop("web1")
    first, second = leases.take("web1"), leases.take("web2")
    assert first != second and leases.take("web1") == first
    assert Leases(tmp_path / "leases", "10.78.1.10-10.78.1.12", "br0").of("web1") == first
    assert routes == {f"{first}/32", f"{second}/32"}
    leases.drop("web1")
    assert leases.of("web1") == "" and routes == {f"{second}/32"}


def test_a_lease_of_a_pool_that_was_changed_is_given_anew(tmp_path: Path, routes: set[str]) -> None:
    Leases(tmp_path / "leases", "10.78.1.0/24", "br0").take("web1")
    assert Leases(tmp_path / "leases", "fd78::/64", "br0").take("web1").startswith("fd78::")
    assert len(routes) == 1 and routes.pop().endswith("/128")


def test_a_site_without_a_pool_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no addresses for guests"):
        Leases(tmp_path / "leases", "", "br0").take("web1")
