"""DHCP for a site's guests: dnsmasq on their bridge, which answers those that are here and nobody else.

A guest's address is its own and goes with it, so nothing is ever leased out of a range: each guest that is here has a
line with its MAC and its address. The bridge has the same address and MAC at every site, so a guest that renews its
lease after a move asks "the same" server, and the new site's, which is authoritative, answers for an address that it
never gave.
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from haulier import tools
from haulier.errors import HaulierError, Unsupported
from haulier.network import iproute
from haulier.process import ProcessId, started_as

LEASE: Final = "1h"
START_S: Final = 5.0


@dataclass(frozen=True)
class Host:
    """A guest that is here. `address` without a length."""

    name: str
    mac: str
    address: str

    @property
    def line(self) -> str:
        return f"{self.mac},{self.address},{self.name},{LEASE}"


def hosts_file(hosts: Iterable[Host]) -> str:
    """What dnsmasq reads. Pure."""
    return "".join(sorted(f"{host.line}\n" for host in hosts))


def command(program: str, directory: Path, bridge: str, networks: Sequence[ipaddress.IPv4Interface]) -> list[str]:
    """The command line of dnsmasq for the subnets of `bridge`. Pure."""
    words = [program, "--conf-file=/dev/null", "--port=0", f"--interface={bridge}", "--bind-interfaces"]
    # No lo: two sites may be on one host, in namespaces of their own or not.
    words += ["--except-interface=lo", "--dhcp-authoritative", "--no-ping", "--no-hosts", "--no-resolv"]
    words += [f"--dhcp-range={net.network.network_address},static,{net.network.netmask},{LEASE}" for net in networks]
    words += [f"--dhcp-hostsfile={directory / 'hosts'}", f"--dhcp-leasefile={directory / 'leases'}"]
    return [*words, f"--pid-file={directory / 'pid'}", f"--log-facility={directory / 'log'}", "--user=root"]


class Dhcp:
    """The DHCP server of one site. Its process outlives the agent; every call makes things as they should be."""

    def __init__(self, directory: Path, bridge: str) -> None:
        self.directory = directory
        self.bridge = bridge

    def running(self) -> ProcessId | None:
        """The server's process."""
        return next(iter(started_as("dnsmasq", f"--pid-file={self.directory / 'pid'}")), None)

    def serve(self, hosts: Iterable[Host]) -> None:
        """Answers exactly these from now on. Unsupported without dnsmasq, HaulierError if it does not start."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        file, text = self.directory / "hosts", hosts_file(hosts)
        changed = not file.exists() or file.read_text() != text
        if changed:
            fresh = file.with_suffix(".new")
            fresh.write_text(text)
            fresh.replace(file)
        process = self.running()
        if process is None:
            self._start()
        elif changed:
            process.signal(signal.SIGHUP)

    def _start(self) -> None:
        program = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin")
        if program is None:
            raise Unsupported("dnsmasq is not installed: install dnsmasq-base, or leave dhcp out of site.toml")
        found = iproute.facts("addr", "show", "dev", self.bridge)
        networks = [
            ipaddress.IPv4Interface(f"{entry['local']}/{entry['prefixlen']}")
            for link in found
            for entry in link.get("addr_info", ())
            if entry.get("family") == "inet"
        ]
        if not networks:
            raise Unsupported(f"the bridge {self.bridge} has no IPv4 address, from which guests' DHCP could be served")
        done = tools.run(command(program, self.directory, self.bridge, networks), timeout_s=START_S)
        if done.returncode:
            raise HaulierError(f"dnsmasq did not start on {self.bridge}: {(done.stderr or done.stdout).strip()[-300:]}")
        deadline = time.monotonic() + START_S
        while self.running() is None:
            if time.monotonic() > deadline:
                raise HaulierError(f"dnsmasq ended at once: see {self.directory / 'log'}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Ends it; no error if none runs."""
        process = self.running()
        if process is not None:
            process.signal(signal.SIGTERM)
            if not process.wait_gone(START_S):
                process.kill()
        for name in ("hosts", "pid"):
            with contextlib.suppress(OSError):
                (self.directory / name).unlink()
