"""Joining a fleet, through real agents; and everything that must not work."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from haulier.agent import authority, joining
from haulier.agent.authority import Token
from haulier.agent.client import Client
from haulier.errors import Conflict, Corrupt, NotTrusted, PeerError, UsageError
from haulier.handoff.journal import Journal, SiteRow, TokenRow
from tests.agent.conftest import Fleet
from tests.support.agents import free_port, join, make_site, running


def token_of(fleet: Fleet, for_site: str = "") -> str:
    return authority.new_token(fleet.oslo, fleet.at_oslo.journal, for_site)


def try_join(fleet: Fleet, root: Path, name: str, token: str) -> None:
    joining.join(root, name, f"127.0.0.1:{free_port()}", (), fleet.oslo.control, token)


def test_two_sites_list_each_other(fleet: Fleet) -> None:
    for site in (fleet.oslo, fleet.lisbon):
        rows = {row["name"]: row for row in Client.local(site).sites()}
        assert set(rows) == {"lisbon", "oslo"}
        assert rows["oslo"]["issuer"] and not rows["lisbon"]["issuer"]
        assert rows["lisbon"]["control"] == fleet.lisbon.control
    assert fleet.to_lisbon().site()["name"] == "lisbon"
    assert fleet.lisbon.key.stat().st_mode & 0o777 == 0o600
    assert not fleet.lisbon.ca_key.exists()


def test_a_third_site_becomes_known_to_the_second_when_it_calls(fleet: Fleet, short: Path) -> None:
    porto = join(fleet.oslo, short / "p", "porto")
    assert fleet.at_lisbon.journal.find_site("porto") is None
    with Journal(porto.journal) as journal:
        assert Client.peer(porto, journal.site("lisbon")).site()["name"] == "lisbon"
    assert fleet.at_lisbon.journal.find_site("porto") is not None


def test_a_token_works_once(fleet: Fleet, short: Path) -> None:
    token = token_of(fleet)
    try_join(fleet, short / "p", "porto", token)
    with pytest.raises(NotTrusted, match="used already, by site 'porto'"):
        try_join(fleet, short / "q", "faro", token)
    assert not (short / "q").exists()
    assert fleet.at_oslo.journal.find_site("faro") is None


def test_an_expired_token(fleet: Fleet, short: Path) -> None:
    token = authority.new_token(fleet.oslo, fleet.at_oslo.journal, lifetime_s=-1)
    with pytest.raises(NotTrusted, match="expired"):
        try_join(fleet, short / "q", "faro", token)
    assert not (short / "q").exists()


def test_a_token_of_another_fleet_or_a_made_up_secret(fleet: Fleet, short: Path) -> None:
    other = make_site(short / "x", "oslo")
    with Journal(other.journal) as journal:
        foreign = authority.new_token(other, journal)
    with pytest.raises(NotTrusted, match="another fleet"):
        try_join(fleet, short / "q", "faro", foreign)
    good = Token.decode(token_of(fleet))
    forged = Token(good.issuer, good.fleet, b"x" * 32).encode()
    with pytest.raises(NotTrusted, match="not known"):
        try_join(fleet, short / "q", "faro", forged)


def test_the_secret_is_not_shown_to_a_site_that_is_not_the_issuer(fleet: Fleet, short: Path) -> None:
    good = Token.decode(token_of(fleet))
    misdirected = Token("lisbon", good.fleet, good.secret).encode()
    with pytest.raises(NotTrusted, match="certificate"):
        try_join(fleet, short / "q", "faro", misdirected)
    try_join(fleet, short / "q", "faro", good.encode())  # so it was not used up


@pytest.mark.parametrize("also", ["another authority", "no ASCII"])
def test_who_stands_between_cannot_slip_in_an_authority_of_their_own(
    fleet: Fleet, short: Path, monkeypatch: pytest.MonkeyPatch, also: str
) -> None:
    """The first one is the fleet's, and has the fingerprint that is in the token."""
    behind = make_site(short / "x", "oslo").ca_certificate.read_text() if also == "another authority" else "\u00e9"
    ca = fleet.oslo.ca_certificate.read_text() + behind
    real = Client.joining
    trusted: list[bytes] = []

    def joining_by(via: str, ca_pem: bytes | None, issuer: str | None) -> Client:
        client = real(via, ca_pem, issuer)
        if ca_pem is None:
            monkeypatch.setattr(client, "get", lambda path: {"ca": ca})
        else:
            trusted.append(ca_pem)
        return client

    monkeypatch.setattr(joining.Client, "joining", joining_by)
    token = token_of(fleet)
    if also == "another authority":
        with pytest.raises(Corrupt, match="does not come alone"):
            try_join(fleet, short / "q", "faro", token)
        assert not trusted and not (short / "q").exists()
    else:
        try_join(fleet, short / "q", "faro", token)
        assert trusted == [fleet.oslo.ca_certificate.read_bytes()]
        assert (short / "q/tls/ca.pem").read_bytes() == fleet.oslo.ca_certificate.read_bytes()


def test_a_taken_name_needs_a_token_for_it(fleet: Fleet, short: Path) -> None:
    token = token_of(fleet)
    with pytest.raises(Conflict, match="--site lisbon"):
        try_join(fleet, short / "q", "lisbon", token)
    with pytest.raises(Conflict):
        try_join(fleet, short / "q", "oslo", token_of(fleet, "oslo"))
    try_join(fleet, short / "q", "lisbon", token_of(fleet, "lisbon"))
    try_join(fleet, short / "r", "faro", token)  # a refusal does not use a token up


@pytest.mark.parametrize(
    "change",
    [{"name": "../x"}, {"name": ""}, {"control": "nowhere"}, {"bulk": ["a b"]}, {"bulk": ["10.0.0.1"] * 17}],
)
def test_bad_words_in_a_join_request(fleet: Fleet, change: dict[str, object]) -> None:
    token = Token.decode(token_of(fleet))
    _, request = authority.new_request("porto")
    body = msgspec.to_builtins(joining.JoinRequest(token.secret.hex(), "porto", "p:1", [], request.decode()))
    ca = fleet.oslo.ca_certificate.read_bytes()
    caller = Client.joining(fleet.oslo.control, ca, "oslo")
    with pytest.raises((UsageError, Conflict)):
        caller.post("/v1/join", body | change)
    with pytest.raises(UsageError, match="does not make sense"):
        caller.post("/v1/join", body | {"colour": "red"})
    caller.post("/v1/join", body)


def test_what_is_there_is_not_overwritten(fleet: Fleet) -> None:
    with pytest.raises(Conflict, match="already holds a site"):
        try_join(fleet, fleet.lisbon.root, "porto", token_of(fleet))
    with pytest.raises(Conflict, match="already holds a site"):
        joining.init(fleet.lisbon.root, "porto", "p:1")


def test_nobody_answers(short: Path) -> None:
    token = Token("oslo", b"f" * 32, b"s" * 32).encode()
    with pytest.raises(PeerError, match="does not answer"):
        joining.join(short / "p", "porto", "p:1", (), f"127.0.0.1:{free_port()}", token)


def test_the_peer_may_not_say_who_issues(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    lie = [msgspec.to_builtins(SiteRow("evil", "e:1", issuer=True)), msgspec.to_builtins(SiteRow("lisbon", "no:1"))]
    revoked = {"oslo": 9e9, "lisbon": 9e9}
    monkeypatch.setattr(Client, "fleet", lambda self: {"sites": lie, "revoked": revoked})
    joining.refresh(fleet.lisbon, fleet.at_lisbon.journal)
    assert not fleet.at_lisbon.journal.site("evil").issuer
    assert fleet.at_lisbon.journal.site("lisbon").control == fleet.lisbon.control
    assert fleet.at_lisbon.journal.site("oslo").begins < 9e9 and fleet.at_lisbon.journal.site("lisbon").begins < 9e9
    for answer in (
        {"sites": [{"name": "../x", "control": "a:1"}]},
        {"sites": [], "revoked": {"../x": 1.0}},
        {"sites": [], "revoked": ["x"]},
        {"sites": {}, "revoked": {"evil": 1.0}},
        {},
    ):
        monkeypatch.setattr(Client, "fleet", lambda self, answer=answer: answer)
        with pytest.raises(PeerError, match="wrongly"):
            joining.refresh(fleet.lisbon, fleet.at_lisbon.journal)
    assert fleet.at_lisbon.journal.find_site("evil") is not None


def test_an_older_haulier_does_not_say_what_is_revoked(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "fleet", lambda self: {"sites": [{"name": "faro", "control": "a:1"}]})
    joining.refresh(fleet.lisbon, fleet.at_lisbon.journal)
    assert fleet.at_lisbon.journal.find_site("faro") is not None


def test_old_tokens_are_forgotten(fleet: Fleet) -> None:
    journal = fleet.at_oslo.journal
    journal.add_token(TokenRow(b"o" * 32, expires=time.time() - 8 * 86400))
    token_of(fleet)
    with pytest.raises(NotTrusted, match="not known"):
        journal.use_token(b"o" * 32, "porto", time.time())


def test_an_agent_without_its_address_says_so(short: Path) -> None:
    site = make_site(short / "s", "oslo")
    with running(site):
        other = joining.init(short / "t", "oslo", site.control)
        with pytest.raises(Exception, match="cannot listen"), running(other):
            pass
