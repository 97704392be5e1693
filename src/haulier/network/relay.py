"""A relay for clients that do not speak MPTCP: HAProxy at an edge gateway, plain TCP to them, MPTCP to the guest.

    client -- TCP -- HAProxy -- MPTCP -- guest

Its connections to the guest move with it, as those of any client that speaks MPTCP; a client of the relay keeps its own
and learns nothing. HAProxy is used as it is: `mptcpize` has its sockets speak MPTCP, whatever its version. Where new
connections go is changed while it runs, through its runtime API on a UNIX socket.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from haulier.errors import HaulierError, Unsupported, UsageError
from haulier.network import iproute
from haulier.session.mptcp import RECEIVE_BYTES

SUBFLOWS: Final = 8
_RECEIVE = Path("/proc/sys/net/ipv4/tcp_rmem")
_SBIN: Final = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
_LIMIT = re.compile(r"\b(add_addr_accepted|subflows) (\d+)")


@dataclass(frozen=True)
class Relay:
    """`listen` and `to` are addresses with a port: where clients connect, and the guest's service now."""

    guest: str
    listen: str
    to: str
    directory: Path

    def __post_init__(self) -> None:
        for what, text in (("--listen", self.listen), ("--to", self.to)):
            host, _, port = text.rpartition(":")
            try:
                ipaddress.ip_address(host.strip("[]"))
                good = 0 < int(port) < 1 << 16 and host.startswith("[") == (":" in host)
            except ValueError:
                good = False
            if not good:
                raise UsageError(f"{what} {text[:60]!r}: give an address and a port, 10.78.1.20:443 or [fd78::20]:443")
        # A UNIX socket's path has to fit, and HAProxy reads its configuration in words.
        if len(str(self.socket)) > 90 or re.search(r"[^A-Za-z0-9/._-]", str(self.socket)):
            raise UsageError(
                f"the directory {str(self.directory)[:100]!r} is too long, or has letters beyond A-Za-z0-9._-"
            )

    @property
    def socket(self) -> Path:
        """HAProxy's runtime API."""
        return self.directory / f"{self.guest}.sock"

    @property
    def file(self) -> Path:
        return self.directory / f"{self.guest}.cfg"

    def config(self) -> str:
        """What HAProxy reads. Pure."""
        return "\n".join(
            [
                "global",
                f"    stats socket {self.socket} mode 600 level admin",
                "defaults",
                "    mode tcp",
                "    timeout connect 10s",
                # As long as both ends want: who moves is silent for a moment, who idles may for days.
                "    timeout client 7d",
                "    timeout server 7d",
                "    option clitcpka",
                "    option srvtcpka",
                "    option redispatch",
                f"listen {self.guest}",
                f"    bind {self.listen}",
                f"    server guest {self.to}",
                "",
            ]
        )

    def write(self) -> None:
        """Makes the directory and the configuration in it."""
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".new")
        fresh.write_text(self.config())
        fresh.replace(self.file)

    def command(self) -> list[str]:
        """HAProxy in the foreground. Unsupported where something of it is missing."""
        found = {
            name: shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SBIN}") for name in ("haproxy", "mptcpize")
        }
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise Unsupported(f"{' and '.join(missing)} not installed: a relay needs Debian's haproxy and mptcpize")
        return [str(found["mptcpize"]), "run", str(found["haproxy"]), "-db", "-f", str(self.file)]


def receive_buffers(shown: str) -> str:
    """What `net.ipv4.tcp_rmem` is to be where it is `shown` now; "" if that will do. Pure."""
    least, usual, most = map(int, shown.split())
    if usual >= RECEIVE_BYTES:
        return ""
    return f"{least} {RECEIVE_BYTES} {max(most, RECEIVE_BYTES)}"


def prepare_host() -> list[str]:
    """Has this host accept the addresses that guests announce, and subflows that join late be as fast as the first.

    What of it could not be done, and what the operator has to do instead.
    """
    said = []
    if problem := _accept_addresses():
        said.append(problem)
    try:
        wanted = receive_buffers(_RECEIVE.read_text())
        if wanted:
            _RECEIVE.write_text(wanted)
    except (OSError, ValueError) as error:
        wanted = f"sysctl -w net.ipv4.tcp_rmem='4096 {RECEIVE_BYTES} 33554432'"
        said.append(f"connections that have moved will be slow: receive buffers stay small ({error}); run: {wanted}")
    return said


def _accept_addresses() -> str:
    wanted = f"ip mptcp limits set subflows {SUBFLOWS} add_addr_accepted {SUBFLOWS}"
    try:
        now = {name: int(value) for name, value in _LIMIT.findall(iproute.run(["ip", "mptcp", "limits", "show"]))}
        if min(now.get("add_addr_accepted", 0), now.get("subflows", 0)) < 1:
            iproute.run(wanted.split())
    except HaulierError as error:
        return f"connections will not move: this host accepts no announced addresses ({error}); run: {wanted}"
    return ""
