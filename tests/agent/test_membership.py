"""Sites that are put out of the fleet, or set up anew, and certificates that are renewed, through real agents."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import msgspec
import pytest

from haulier.agent import authority, joining, membership
from haulier.agent.client import Client
from haulier.agent.site import Site, split_address
from haulier.errors import Conflict, Corrupt, NotTrusted, UnknownThing, Unsupported
from haulier.handoff.journal import HELD, HandoffRow, Journal
from haulier.handoff.ownership import State
from tests.agent.conftest import Fleet
from tests.support.agents import free_port, join, running
from tests.support.waiting import wait_for


def call(site: Site, at: str) -> dict[str, Any]:
    """What site `at` answers to `site`, which shows its certificate."""
    with Journal(site.journal) as journal:
        return Client.peer(site, journal.site(at)).site()


def remove(fleet: Fleet, name: str, *, force: bool = False) -> dict[str, Any]:
    """As `haulier site remove` at oslo."""
    return fleet.client.wait(fleet.client.delete(f"/v1/sites/{name}{'?force=1' if force else ''}"))


def set_up_anew(fleet: Fleet, root: Path) -> Site:
    token = authority.new_token(fleet.oslo, fleet.at_oslo.journal, "lisbon")
    return joining.join(root, "lisbon", f"127.0.0.1:{free_port()}", (), fleet.oslo.control, token)


def test_a_site_that_was_put_out_is_heard_nowhere(fleet: Fleet, short: Path) -> None:
    porto = join(fleet.oslo, short / "p", "porto")
    for at in ("oslo", "lisbon"):
        assert call(porto, at)["name"] == at
    done = remove(fleet, "porto", force=True)
    assert done == {"site": "porto", "told": ["lisbon"], "untold": []}
    for at in ("oslo", "lisbon"):
        with pytest.raises(NotTrusted, match="not among its sites"):
            call(porto, at)
    for site in (fleet.oslo, fleet.lisbon):
        assert [row["name"] for row in Client.local(site).sites()] == ["lisbon", "oslo"]
    assert call(fleet.lisbon, "oslo")["name"] == "oslo"


def test_a_site_that_could_not_be_told_asks(fleet: Fleet, short: Path) -> None:
    porto = join(fleet.oslo, short / "p", "porto")
    Client.local(fleet.lisbon).sites()
    done = remove(fleet, "lisbon", force=True)
    assert done == {"site": "lisbon", "told": [], "untold": ["porto"]}
    with running(porto) as at_porto:
        assert call(fleet.lisbon, "porto")["name"] == "porto"
        at_porto.membership.supervise()
        with pytest.raises(NotTrusted, match="not among its sites"):
            call(fleet.lisbon, "porto")
        assert at_porto.journal.find_site("lisbon") is None


def test_an_old_key_is_worth_nothing_after_the_site_was_set_up_anew(fleet: Fleet, short: Path) -> None:
    """Neither as who calls nor as who is called."""
    again = set_up_anew(fleet, short / "n")
    assert call(again, "oslo")["name"] == "oslo"
    with pytest.raises(NotTrusted, match="withdrawn when that site was set up anew"):
        call(fleet.lisbon, "oslo")
    row = fleet.at_oslo.journal.site("lisbon")
    assert row.control == again.control
    with pytest.raises(NotTrusted, match="replaced or withdrawn"):
        Client.peer(fleet.oslo, msgspec.structs.replace(row, control=fleet.lisbon.control)).site()
    with running(again):
        assert Client.peer(fleet.oslo, row).site()["name"] == "lisbon"


def test_who_was_put_out_may_join_again(fleet: Fleet, short: Path) -> None:
    remove(fleet, "lisbon", force=True)
    again = join(fleet.oslo, short / "n", "lisbon")
    assert call(again, "oslo")["name"] == "oslo"
    with pytest.raises(NotTrusted, match="withdrawn"):
        call(fleet.lisbon, "oslo")


def test_a_site_that_is_needed_stays(fleet: Fleet, short: Path) -> None:
    porto = join(fleet.oslo, short / "p", "porto")
    here, there = fleet.at_oslo.journal, fleet.at_lisbon.journal
    there.advance("web1", "absent", State.OWNER, owner="lisbon", epoch=1)
    here.advance("web2", "absent", State.GRANTED, handoff="h1")
    here.add_handoff(HandoffRow("h1", "web2", "source", "lisbon"))
    left = HandoffRow("h2", "web3", "target", "lisbon", state="ended", outcome="done", detail={"residual": HELD})
    with running(porto) as at_porto:
        at_porto.journal.add_handoff(left)
        with pytest.raises(Conflict) as refused:
            remove(fleet, "lisbon")
    for text in ("'web1' lives there", "h1 of guest 'web2' is under way", "at site 'porto': guest 'web3' left data"):
        assert text in str(refused.value), refused.value
    with pytest.raises(Conflict, match="'porto' does not say whether it needs it"):
        remove(fleet, "lisbon")
    assert call(fleet.lisbon, "oslo")["name"] == "oslo"
    assert remove(fleet, "lisbon", force=True)["untold"] == ["porto"]


def test_a_guest_of_a_site_that_does_not_answer(fleet: Fleet, short: Path) -> None:
    join(fleet.oslo, short / "p", "porto")
    fleet.at_oslo.journal.advance("web1", "absent", State.AWAY, owner="porto")
    with pytest.raises(Conflict, match="'web1' lived there when it was last heard of"):
        remove(fleet, "porto")


def test_a_site_that_nobody_needs_goes_without_force(fleet: Fleet) -> None:
    assert remove(fleet, "lisbon") == {"site": "lisbon", "told": [], "untold": []}


def test_who_may_not_decide(fleet: Fleet, short: Path) -> None:
    porto = join(fleet.oslo, short / "p", "porto")
    Client.local(fleet.lisbon).sites()
    with pytest.raises(Unsupported, match="did not make this fleet"):
        Client.local(fleet.lisbon).delete("/v1/sites/porto?force=1")
    with pytest.raises(Conflict, match="is this site"):
        remove(fleet, "oslo", force=True)
    with pytest.raises(UnknownThing):
        remove(fleet, "faro", force=True)
    with Journal(porto.journal) as journal:
        to_lisbon = Client.peer(porto, journal.site("lisbon"))
    with pytest.raises(NotTrusted, match="did not make this fleet"):
        to_lisbon.post("/v1/peer/refresh")
    with pytest.raises(NotTrusted, match="for the operator"):
        to_lisbon.delete("/v1/sites/oslo?force=1")


# -- certificates


def shown_by(site: Site) -> str:
    """When the certificate ends that the agent shows now."""
    context = authority.client_context(site)
    with (
        socket.create_connection(split_address(site.control), 10) as raw,
        context.wrap_socket(raw, server_hostname=authority.server_name(site.name)) as tls,
    ):
        certificate = tls.getpeercert()
        assert certificate is not None
        return str(certificate["notAfter"])


@pytest.mark.parametrize("name", ["lisbon", "oslo"])
def test_a_certificate_is_renewed_before_it_ends(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    site, agent = {"lisbon": (fleet.lisbon, fleet.at_lisbon), "oslo": (fleet.oslo, fleet.at_oslo)}[name]
    before, key = shown_by(site), site.key.read_bytes()
    agent.membership.supervise()
    assert shown_by(site) == before
    monkeypatch.setattr(authority, "_SITE_YEARS", 8)
    monkeypatch.setattr(membership, "RENEW_DAYS", 6 * 365.0)
    monkeypatch.setattr(agent.membership, "_due", 0.0)
    agent.membership.supervise()
    assert authority.days_left(site.certificate) > 7 * 365
    assert site.key.read_bytes() == key
    wait_for(lambda: ssl.cert_time_to_seconds(shown_by(site)) > ssl.cert_time_to_seconds(before), 10)
    assert call(fleet.lisbon, "oslo")["name"] == "oslo" and fleet.to_lisbon().site()["name"] == "lisbon"


def test_a_wrong_certificate_is_not_taken(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fleet.lisbon.certificate.read_bytes()
    _, request = authority.new_request("lisbon")
    of_another_key = authority.sign(fleet.oslo, "lisbon", request, ())
    of_another_site = authority.sign(fleet.oslo, "porto", authority.request_with(fleet.lisbon), ())
    monkeypatch.setattr(authority, "_SITE_YEARS", 1)
    that_ends_sooner = authority.sign(fleet.oslo, "lisbon", authority.request_with(fleet.lisbon), ())
    for wrong in (of_another_key, of_another_site, that_ends_sooner, b"none"):
        monkeypatch.setattr(Client, "post", lambda *_, wrong=wrong, **__: {"certificate": wrong.decode()})
        with pytest.raises(Corrupt):
            fleet.at_lisbon.membership.renew()
    assert fleet.lisbon.certificate.read_bytes() == before


def test_nobody_gets_a_certificate_for_another_site(fleet: Fleet, short: Path) -> None:
    porto = join(fleet.oslo, short / "p", "porto")
    with Journal(porto.journal) as journal:
        answer = Client.peer(porto, journal.site("oslo")).post(
            "/v1/peer/certificate", {"request": authority.request_with(fleet.lisbon).decode()}
        )
    pem = str(answer["certificate"]).encode()
    assert "porto.haulier" in authority.load_certificate(pem, "it").subject.rfc4514_string()
