"""Addresses that a site has for its guests: who has which, and the way to each on the bridge.

The network leads the pool's addresses to this host ("10.78.1.10-10.78.1.99", a subnet, or the same of IPv6); here each
that is given out gets a route of its own to the guests' bridge. A lease is a file. A guest that comes back gets the
address that it had, as long as nobody else has it: where the search for a free one begins follows from its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from haulier.errors import UNDECODABLE, HaulierError, NoRoom, UsageError
from haulier.network import iproute

MOST: Final = 1 << 16
"""Addresses in a pool; of a larger IPv6 subnet the first ones are taken."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Pool:
    """A range of addresses, both ends included."""

    first: Address
    last: Address

    @staticmethod
    def parse(text: str) -> Pool:
        """ "FIRST-LAST", or a subnet without its own, its first (a router's) and its last address. UsageError."""
        try:
            if "-" in text:
                low, _, high = text.partition("-")
                first, last = ipaddress.ip_address(low.strip()), ipaddress.ip_address(high.strip())
            else:
                network = ipaddress.ip_network(text.strip())
                first, last = network[2], network[min(network.num_addresses, MOST) - 2]
        except (ValueError, IndexError):
            raise UsageError(
                f"{text[:60]!r} is no pool of addresses: give 10.78.1.10-10.78.1.99, or a subnet such as 10.78.1.0/24"
            ) from None
        if first.version != last.version or not 0 <= int(last) - int(first) < MOST:
            raise UsageError(f"the pool {text[:60]!r} does not go from a lower to a higher address, {MOST} at most")
        return Pool(first, last)

    def __len__(self) -> int:
        return int(self.last) - int(self.first) + 1

    def __contains__(self, address: object) -> bool:
        try:
            found = ipaddress.ip_address(str(address))
        except ValueError:
            return False
        return found.version == self.first.version and int(self.first) <= int(found) <= int(self.last)

    def choose(self, guest: str, taken: Collection[str]) -> str:
        """A free address for `guest`, the same whenever it is free. NoRoom when all are taken. Pure."""
        start = int.from_bytes(hashlib.blake2b(guest.encode(), digest_size=4).digest(), "big")
        for number in range(len(self)):
            address = str(self.first + (start + number) % len(self))
            if address not in taken:
                return address
        raise NoRoom(f"all {len(self)} addresses of the pool {self.first}-{self.last} are given out: enlarge it")


class Lease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An address that a guest has at this site."""

    guest: str
    address: str


def host_route(address: str) -> str:
    """`address` with the length of a whole address, as routes and rules of it are written. Pure."""
    return f"{address}/{ipaddress.ip_address(address).max_prefixlen}"


class Leases:
    """The leases of one site, a file each, and their routes in this network namespace."""

    def __init__(self, directory: Path, pool: str, bridge: str) -> None:
        """`pool` as in site.toml; "" for a site that has none."""
        self.directory = directory
        self.pool = Pool.parse(pool) if pool else None
        self.bridge = bridge

    def all(self) -> list[Lease]:
        """Those that can be read."""
        found = []
        for path in sorted(self.directory.glob("*.json")) if self.directory.is_dir() else ():
            with contextlib.suppress(OSError, *UNDECODABLE):
                found.append(msgspec.json.decode(path.read_bytes(), type=Lease))
        return found

    def of(self, guest: str) -> str:
        """The address that `guest` has here; "" if it has none."""
        return next((lease.address for lease in self.all() if lease.guest == guest), "")

    def take(self, guest: str) -> str:
        """An address for `guest`, with its route; the one that it has, if it has one of the pool.

        UsageError without a pool, NoRoom when it is empty, HaulierError if the host refuses the route.
        """
        pool = self.check()
        with self._locked():
            address = self.of(guest)
            if address not in pool:
                self._drop(guest)
                address = pool.choose(guest, {lease.address for lease in self.all()})
                path = self._path(guest)
                fresh = path.with_suffix(".new")
                fresh.write_bytes(msgspec.json.encode(Lease(guest=guest, address=address)))
                fresh.replace(path)
            self.lead(address)
        return address

    def check(self) -> Pool:
        """The pool; UsageError if there is none."""
        if self.pool is None:
            raise UsageError('this site has no addresses for guests: give it some (pool = "10.78.1.0/24" in site.toml)')
        return self.pool

    def lead(self, address: str) -> None:
        """Makes the address's route, or leaves it as it is. HaulierError."""
        iproute.run(["ip", "route", "replace", host_route(address), "dev", self.bridge])

    def drop(self, guest: str) -> None:
        """Takes a lease and its route away; no error if there is none."""
        if self.directory.is_dir():
            with self._locked():
                self._drop(guest)

    def _drop(self, guest: str) -> None:
        address = self.of(guest)
        if address:
            with contextlib.suppress(HaulierError):
                iproute.run(["ip", "route", "del", host_route(address), "dev", self.bridge])
        self._path(guest).unlink(missing_ok=True)

    def _path(self, guest: str) -> Path:
        return self.directory / f"{guest}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
