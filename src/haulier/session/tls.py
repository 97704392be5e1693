"""TLS 1.3 with certificates of the fleet at both ends, and the site name that a certificate carries."""

from __future__ import annotations

import contextlib
import errno
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from haulier.errors import HaulierError, NotTrusted, PeerError, UsageError

SUFFIX: Final = ".haulier"
"""A site's certificate names it as dNSName `<site>.haulier`."""

_REFUSED: Final = ("ALERT_UNKNOWN_CA", "CERTIFICATE", "ALERT_ACCESS_DENIED", "ALERT_DECRYPT_ERROR")
_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION", "RECORD_LAYER")


class TlsSocket(ssl.SSLSocket):
    """One whose peer may go away while it is being wrapped: the ssl module would leave it open, with no owner."""

    def getpeername(self) -> Any:
        """The peer's address. Raises OSError; before TLS is there, the socket is closed then."""
        try:
            return super().getpeername()
        except OSError as error:
            # Wrapping has taken the descriptor from the plain socket, and looks here whether anybody is there.
            if getattr(self, "_sslobj", None) is None:
                with contextlib.suppress(OSError):
                    self.close()
                raise ConnectionResetError(errno.ECONNRESET, "the peer closed the connection before TLS") from error
            raise


def plain_context(*, server: bool) -> ssl.SSLContext:
    """What every context of this system begins as: TLS 1.3 alone, nothing loaded yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if server:
        # Nobody comes back to a session: a ticket, with the client's certificate in it, is a kilobyte for nothing.
        context.num_tickets = 0
    return context


@dataclass(frozen=True)
class TlsConfig:
    """This site's certificate and key, the fleet's CA (PEM files), and which site the peer must be (None: any)."""

    certificate: Path
    key: Path
    ca: Path
    peer_name: str | None = None

    @property
    def peer(self) -> str:
        """What to call the peer in messages before it has said who it is."""
        return f"site {self.peer_name}" if self.peer_name else "the other site"

    def context(self, *, server: bool) -> ssl.SSLContext:
        """A context for one side. Raises UsageError when a file is missing or no good."""
        context = plain_context(server=server)
        context.check_hostname = False  # site names, not host names: see check_peer
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.ca)
        except (OSError, ssl.SSLError) as e:
            raise UsageError(
                f"cannot use certificate {self.certificate}, key {self.key} and CA {self.ca} ({e}): "
                "make them with `haulier site init` or `haulier site join`"
            ) from e
        return context

    def check_peer(self, sock: ssl.SSLSocket) -> str:
        """The site name in the certificate of the peer. Raises NotTrusted when it is not the one wanted."""
        names = site_names(sock)
        if self.peer_name is None:
            if not names:
                raise NotTrusted("the peer's certificate names no site: have it join the fleet again")
            return names[0]
        if self.peer_name not in names:
            raise NotTrusted(
                f"expected site {self.peer_name}, but the certificate says {', '.join(names) or 'no site at all'}: "
                "check the address of that site with `haulier site list`"
            )
        return self.peer_name


def site_names(sock: ssl.SSLSocket) -> list[str]:
    """The sites that the verified certificate of the peer names."""
    certificate: dict[str, Any] = dict(sock.getpeercert() or {})
    names = (value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS")
    return [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]


def explain(error: ssl.SSLError, peer: str) -> HaulierError:
    """What an error of the TLS layer means, as one of ours."""
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return NotTrusted(
            f"the certificate of {peer} is not trusted ({error.verify_message}): "
            "have it join this fleet, and check the clocks"
        )
    if "PEER_DID_NOT_RETURN" in reason:
        return NotTrusted(f"{peer} showed no certificate: it is no site of this fleet")
    if any(word in reason for word in _REFUSED):
        return NotTrusted(f"{peer} refused this site's certificate ({reason.lower()}): join its fleet again")
    if any(word in reason for word in _NOT_TLS):
        return PeerError(f"{peer} does not speak TLS 1.3 there ({reason.lower()}): check the address and the port")
    return PeerError(f"TLS with {peer} failed: {reason.lower()}")
