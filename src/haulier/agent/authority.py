"""The fleet's private certificate authority, and how a site gets into the fleet.

The site that makes a fleet holds ``ca.key`` and is its issuer. A site's identity is its certificate: subject
alternative name ``<site>.haulier``. Host names play no part in it, so a site may change its address.

Joining: the issuer makes a token, once usable, which names the issuer, the fingerprint of the fleet's authority and
a secret. The joiner makes its own key, fetches the authority's certificate (public), compares it with the
fingerprint, and only then, over TLS checked against that authority and the issuer's name, shows the secret together
with its certificate request. So nobody between the two learns the secret or can pass off another fleet.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import ipaddress
import math
import secrets
import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from haulier.agent.site import NAME, Site, check_name
from haulier.durable import write_atomically
from haulier.errors import Corrupt, NotTrusted, Unsupported
from haulier.handoff.journal import Journal, TokenRow
from haulier.session.tls import SUFFIX, plain_context

TOKEN_LIFETIME_S: Final = 3600.0
_CA_YEARS: Final = 20
_SITE_YEARS: Final = 5
_SKEW: Final = datetime.timedelta(days=1)
"""Sites' clocks may differ: a certificate is good from a day before it was made."""
_TOKEN_PREFIX: Final = "haulier-join-"
_MAX_TOKEN: Final = 1000


_SPACER: Final = b"""\
-----BEGIN CERTIFICATE-----
MGYwWgIBATAFBgMrZXAwADAeFw0wMDAxMDEwMDAwMDBaFw0wMDAxMDEwMDAwMDBa
MAAwKjAFBgMrZXADIQBnMsC3GxEFw9cnnWxdNYO01uVUYtbHTlIU9v9kx8pQGzAF
BgMrZXADAQA=
-----END CERTIFICATE-----
"""
"""A certificate of nobody, unsigned, to whose key no private one exists. Where a site's certificate has something
behind it, OpenSSL does not look for what signed it, and so does not send the fleet's authority, which is four times
as long and which everybody has."""


class Token(msgspec.Struct, frozen=True):
    """What a join token holds. `fleet` is the SHA-256 of the authority's certificate."""

    issuer: str
    fleet: bytes
    secret: bytes

    def encode(self) -> str:
        packed = msgspec.msgpack.encode((self.issuer, self.fleet, self.secret))
        return _TOKEN_PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @staticmethod
    def decode(text: str) -> Token:
        """NotTrusted if the text is no token."""
        body = text.strip().removeprefix(_TOKEN_PREFIX)
        try:
            if not text.strip().startswith(_TOKEN_PREFIX) or len(body) > _MAX_TOKEN:
                raise ValueError("prefix or length")
            packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            issuer, fleet, secret = msgspec.msgpack.decode(packed, type=tuple[str, bytes, bytes])
        except (ValueError, binascii.Error, msgspec.MsgspecError):
            raise NotTrusted("that is no join token: copy the whole line that 'haulier site token' printed") from None
        if not NAME.fullmatch(issuer) or len(fleet) != 32 or len(secret) != 32:
            raise NotTrusted("that is no join token: copy the whole line that 'haulier site token' printed")
        return Token(issuer, fleet, secret)

    @property
    def digest(self) -> bytes:
        """What the issuer keeps of the secret."""
        return hashlib.sha256(self.secret).digest()


def server_name(site: str) -> str:
    """The name in a site's certificate."""
    return check_name(site, "site") + SUFFIX


def site_of(peercert: Mapping[str, Any] | None) -> str | None:
    """The site named by a peer certificate in the form of `ssl`'s getpeercert(); None if it names none, or several."""
    if not peercert:
        return None
    names = {value for kind, value in peercert.get("subjectAltName", ()) if kind == "DNS" and value.endswith(SUFFIX)}
    if len(names) != 1:
        return None
    name = str(names.pop()).removesuffix(SUFFIX)
    return name if NAME.fullmatch(name) else None


def begins_of(peercert: Mapping[str, Any] | None) -> float:
    """Since when a peer certificate in the form of `ssl`'s getpeercert() is good (Unix seconds); 0 if it is unknown."""
    said = (peercert or {}).get("notBefore")
    return float(ssl.cert_time_to_seconds(said)) if isinstance(said, str) else 0.0


def begins(certificate: bytes) -> float:
    """The same of a certificate in PEM."""
    return load_certificate(certificate, "the certificate").not_valid_before_utc.timestamp()


def next_beginning(least: float, now: float) -> float:
    """A time (Unix seconds) since when certificates that are made at `now` may be good, and none that was made before:
    `least` is what was required of them so far."""
    return max(math.floor(now - _SKEW.total_seconds()) + 1.0, least + 1.0)


def fleet_fingerprint(ca_pem: bytes) -> bytes:
    """SHA-256 of the authority's certificate; Corrupt if `ca_pem` is none."""
    return load_certificate(ca_pem, "the fleet's certificate").fingerprint(hashes.SHA256())


def only_certificate(pem: bytes) -> bytes:
    """The one certificate in `pem`, without anything around it. Corrupt if there is none, or another beside it.

    What is trusted has to be what was looked at: a second one would be an authority that nobody compared.
    """
    what = "the fleet's certificate"
    try:
        if len(x509.load_pem_x509_certificates(pem)) != 1:
            raise Corrupt(f"{what} does not come alone: somebody may be between you and the site that you join at")
    except ValueError:
        raise Corrupt(f"{what} is damaged: it is no PEM certificate") from None
    return load_certificate(pem, what).public_bytes(serialization.Encoding.PEM)


def load_certificate(pem: bytes, what: str) -> x509.Certificate:
    """Corrupt if it is no certificate."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise Corrupt(f"{what} is damaged: it is no PEM certificate") from None


# -- making


def create_authority(site: Site) -> None:
    """Makes the fleet's authority and this site's certificate, for the first site of a fleet."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"haulier fleet of {site.name}")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=365 * _CA_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_atomically(site.ca_key, _private_pem(key), 0o600)
    write_atomically(site.ca_certificate, certificate.public_bytes(serialization.Encoding.PEM))
    own, request = new_request(site.name)
    install(site, own, sign(site, site.name, request, (site.control_host, *site.reachable())))


def new_request(name: str) -> tuple[bytes, bytes]:
    """A fresh private key and a certificate request for it, both PEM. The key never leaves the site."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _private_pem(key), _request(name, key)


def _request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, server_name(name))]))
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def sign(site: Site, name: str, request_pem: bytes, addresses: Sequence[str], begins: float = 0.0) -> bytes:
    """A certificate (PEM) for the site `name` with the key of a request. Nothing else is taken from the request.

    It is good from `begins` on (Unix seconds), but not longer than clocks may differ. Unsupported where the authority's
    key is not at this site; NotTrusted if the request is not signed by its key.
    """
    ca_key = _load_ca_key(site)
    ca = load_certificate(site.ca_certificate.read_bytes(), str(site.ca_certificate))
    try:
        request = x509.load_pem_x509_csr(request_pem)
        public = request.public_key()
        if not request.is_signature_valid or not isinstance(public, ec.EllipticCurvePublicKey):
            raise ValueError("signature or kind of key")
    except (ValueError, InvalidSignature):
        raise NotTrusted(f"the certificate request of site {name!r} is not valid: join again") from None
    names: list[x509.GeneralName] = [x509.DNSName(server_name(name))]
    for address in dict.fromkeys(addresses):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            continue
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, server_name(name))]))
        .issuer_name(ca.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - _SKEW, datetime.datetime.fromtimestamp(begins, datetime.UTC)))
        .not_valid_after(now + datetime.timedelta(days=365 * _SITE_YEARS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(sign_certificates=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def install(site: Site, key: bytes, certificate: bytes) -> None:
    """Puts a site's key and certificate in place."""
    write_atomically(site.key, key, 0o600)
    install_certificate(site, certificate)


def install_certificate(site: Site, certificate: bytes) -> None:
    """Puts another certificate for the same key in place."""
    write_atomically(site.certificate, certificate.rstrip() + b"\n" + _SPACER)


def request_with(site: Site) -> bytes:
    """A certificate request (PEM) with the key that this site has already."""
    try:
        key = serialization.load_pem_private_key(site.key.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise Corrupt(f"the key of site {site.name!r} in {site.tls} cannot be used: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Corrupt(f"{site.key} holds another kind of key")
    return _request(site.name, key)


def check_certificate(site: Site, certificate: bytes) -> None:
    """Corrupt unless it is one for this site and its key, by the fleet's authority, and good for longer than what is
    there."""
    new = load_certificate(certificate, "the new certificate")
    old = load_certificate(site.certificate.read_bytes(), str(site.certificate))
    ca = load_certificate(site.ca_certificate.read_bytes(), str(site.ca_certificate))
    try:
        new.verify_directly_issued_by(ca)
        if new.public_key() != old.public_key() or new.subject != old.subject:
            raise ValueError("it is for another site or key")
        if new.not_valid_after_utc < old.not_valid_after_utc:
            raise ValueError("it ends before the one that is there")
    except (ValueError, TypeError, InvalidSignature) as error:
        raise Corrupt(f"the new certificate of site {site.name!r} is wrong ({error}): the old one stays") from None


def new_token(site: Site, journal: Journal, for_site: str = "", lifetime_s: float = TOKEN_LIFETIME_S) -> str:
    """A join token, recorded in the journal (only its digest). Unsupported where this site is not the issuer."""
    _load_ca_key(site)
    if for_site:
        check_name(for_site, "site")
    token = Token(site.name, fleet_fingerprint(site.ca_certificate.read_bytes()), secrets.token_bytes(32))
    journal.add_token(TokenRow(token.digest, time.time() + lifetime_s, for_site))
    return token.encode()


# -- TLS


def server_context(site: Site) -> ssl.SSLContext:
    """For the control API: TLS 1.3; a client's certificate is asked for and, if shown, must be of the fleet."""
    context = plain_context(server=True)
    _load(context, site)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(site: Site) -> ssl.SSLContext:
    """For calls to other sites: TLS 1.3, own certificate shown, peer's name checked."""
    context = plain_context(server=False)
    _load(context, site)
    return context


def joining_context(ca_pem: bytes | None) -> ssl.SSLContext:
    """Before a site has a certificate. With None nothing is checked: good only to fetch the authority's certificate."""
    context = plain_context(server=False)
    if ca_pem is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=ca_pem.decode())
    return context


def reload(context: ssl.SSLContext, site: Site) -> None:
    """Has connections that are accepted from now on see the certificate that is there now."""
    context.load_cert_chain(site.certificate, site.key)


def days_left(certificate: Path) -> float:
    """Days until a certificate ends."""
    end = load_certificate(certificate.read_bytes(), str(certificate)).not_valid_after_utc
    return (end - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400


def _load(context: ssl.SSLContext, site: Site) -> None:
    try:
        context.load_cert_chain(site.certificate, site.key)
        context.load_verify_locations(site.ca_certificate)
    except (OSError, ssl.SSLError) as error:
        raise NotTrusted(f"the certificate of site {site.name!r} in {site.tls} cannot be used: {error}") from None


def _load_ca_key(site: Site) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(site.ca_key.read_bytes(), None)
    except FileNotFoundError:
        raise Unsupported(
            f"site {site.name!r} did not make this fleet and cannot admit others: do this at the site that did"
        ) from None
    except ValueError:
        raise Corrupt(f"{site.ca_key} is damaged") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Corrupt(f"{site.ca_key} holds another kind of key")
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
