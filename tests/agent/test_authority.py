"""Certificates and tokens."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from haulier.agent import authority
from haulier.agent.authority import Token
from haulier.agent.site import Site
from haulier.errors import Corrupt, NotTrusted, Unsupported
from haulier.handoff.journal import Journal
from tests.support.agents import make_site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path / "s", "oslo")


def test_keys_are_for_the_owner_only(site: Site) -> None:
    for path in (site.key, site.ca_key):
        assert path.stat().st_mode & 0o777 == 0o600
    assert site.tls.stat().st_mode & 0o777 == 0o700


def test_a_certificate_names_the_site_and_nothing_that_the_request_asks_for(site: Site) -> None:
    key = rsa.generate_private_key(65537, 2048)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "oslo.haulier")]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("oslo.haulier")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    with pytest.raises(NotTrusted, match="lisbon"):  # another kind of key than ours
        authority.sign(site, "lisbon", request.public_bytes(serialization.Encoding.PEM), ())
    _, good = authority.new_request("porto")
    pem = authority.sign(site, "lisbon", good, ("10.0.0.2", "edge.example", "10.0.0.2"))
    made = x509.load_pem_x509_certificate(pem)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["lisbon.haulier"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.2")]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    made.verify_directly_issued_by(x509.load_pem_x509_certificate(site.ca_certificate.read_bytes()))
    assert made.not_valid_before_utc < datetime.datetime.now(datetime.UTC)


def test_a_damaged_request_is_refused(site: Site) -> None:
    _, good = authority.new_request("lisbon")
    for bad in (b"", b"nonsense", good[:-80] + b"A" + good[-79:]):
        with pytest.raises(NotTrusted):
            authority.sign(site, "lisbon", bad, ())


def test_only_the_issuer_signs(site: Site) -> None:
    site.ca_key.unlink()
    with pytest.raises(Unsupported, match="did not make this fleet"), Journal(site.journal) as journal:
        authority.new_token(site, journal)
    site.ca_key.write_bytes(b"x")
    with pytest.raises(Corrupt), Journal(site.journal) as journal:
        authority.new_token(site, journal)


@pytest.mark.parametrize(
    ("peercert", "site"),
    [
        (None, None),
        ({}, None),
        ({"subjectAltName": (("DNS", "oslo.haulier"), ("IP Address", "1.2.3.4"))}, "oslo"),
        ({"subjectAltName": (("DNS", "oslo.haulier"), ("DNS", "lisbon.haulier"))}, None),
        ({"subjectAltName": (("DNS", "oslo.example"),)}, None),
        ({"subjectAltName": (("DNS", "../x.haulier"),)}, None),
        ({"subject": ((("commonName", "oslo.haulier"),),)}, None),
    ],
)
def test_identity_is_the_one_name_in_the_certificate(peercert, site) -> None:
    assert authority.site_of(peercert) == site


def test_tokens_round_trip_and_keep_their_secret_out_of_the_journal(site: Site) -> None:
    with Journal(site.journal) as journal:
        text = authority.new_token(site, journal)
        token = Token.decode(f"  {text}\n")
        assert token.issuer == "oslo"
        assert token.fleet == authority.fleet_fingerprint(site.ca_certificate.read_bytes())
        journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert token.secret not in site.journal.read_bytes()
    assert token.digest in site.journal.read_bytes()


@pytest.mark.parametrize(
    "text", ["", "haulier-join-", "haulier-join-%%%", "haulier-join-AAAA", "x", "haulier-join-" + "A" * 100_000]
)
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(NotTrusted, match="no join token"):
        Token.decode(text)


def test_days_left(site: Site) -> None:
    assert 1800 < authority.days_left(site.certificate) < 1827


def test_the_fleets_authority_is_not_sent_along(site: Site) -> None:
    """Everybody has it: it would be a third of each handshake."""
    wires = [(ssl.MemoryBIO(), ssl.MemoryBIO()) for _ in range(2)]
    client = authority.client_context(site).wrap_bio(*wires[0], server_hostname="oslo.haulier")
    server = authority.server_context(site).wrap_bio(*wires[1], server_side=True)
    said = [0, 0]
    for _ in range(3):
        for number, end in enumerate((client, server)):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
            said[number] += wires[1 - number][0].write(wires[number][1].read())
    assert server.getpeercert() and client.getpeercert()
    own = authority.load_certificate(site.certificate.read_bytes(), "").public_bytes(serialization.Encoding.DER)
    # Hellos, signatures, ends and the spacer are about 640 bytes, the authority's certificate 390.
    assert all(count - len(own) < 750 for count in said), said
