"""Where a site's coordinator is, as written in ``site.toml``.

here                          in this site's own agent
https://10.0.0.2:7443         at an address that stands in the certificate of the site that runs it
https://lisbon@host:7443      at any address, with the certificate of site lisbon
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from haulier.agent.client import Client
from haulier.agent.site import Site, check_name, split_address
from haulier.errors import UsageError

HERE: Final = "here"


@dataclass(frozen=True)
class Address:
    """`host` and `port` of the control API, `site` whose certificate it must show ("" = one with this address)."""

    host: str = ""
    port: int = 0
    site: str = ""

    @property
    def here(self) -> bool:
        return not self.host

    @staticmethod
    def parse(text: str) -> Address:
        """UsageError if it is none."""
        if text == HERE:
            return Address()
        scheme, separator, rest = text.partition("://")
        if scheme != "https" or not separator:
            raise UsageError(
                f"bad coordinator {text[:80]!r}: give https://HOST:PORT, https://SITE@HOST:PORT, or 'here'"
            )
        name, at, place = rest.rpartition("@")
        host, port = split_address(place.rstrip("/"))
        if at:
            return Address(host, port, check_name(name, "site"))
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise UsageError(
                f"coordinator {text[:80]!r}: with a host name, say whose certificate it shows: https://SITE@{place}"
            ) from None
        return Address(host, port)

    def __str__(self) -> str:
        if self.here:
            return HERE
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{self.site + '@' if self.site else ''}{host}:{self.port}"

    def client(self, site: Site) -> Client:
        """Calls as `site` to the agent or coordinator that listens there."""
        return Client.at(site, self.host, self.port, self.site, f"the coordinator at {self}")
