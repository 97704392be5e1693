"""Which pairs of addresses, one here and one there, are paths: all are tried, those that answer are matched.

Two paths are of use only if they share neither their interface here nor their address there; otherwise they would
queue behind each other. So the best set is looked for: as many pairs as possible, first those that are in one subnet,
then the quickest. An interface with IPv4 and IPv6 is one uplink, and gets the quicker of the two.
"""

from __future__ import annotations

import concurrent.futures
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from haulier.network.addresses import Uplink

PROBE_S: Final = 1.5
"""Longer than the loss of one SYN, which is repeated after a second."""
MOST_PAIRS: Final = 64


@dataclass(frozen=True)
class Pair:
    """An uplink here and an address there. `rtt_s`: what a TCP handshake took; None before it was tried."""

    uplink: Uplink
    there: str
    rtt_s: float | None = None

    @property
    def same_subnet(self) -> bool:
        return ipaddress.ip_address(self.there) in ipaddress.ip_network(self.uplink.network)


def candidates(here: Sequence[Uplink], there: Sequence[str]) -> list[Pair]:
    """Every pair of one IP version, at most 64; what is no IP address is left out. Pure."""
    found = []
    for text in there:
        try:
            version = ipaddress.ip_address(text).version
        except ValueError:
            continue
        found += [Pair(uplink, text) for uplink in here if uplink.version == version]
    # Those of one subnet most likely are the paths: they must not fall off the end.
    return sorted(found, key=lambda pair: not pair.same_subnet)[:MOST_PAIRS]


def match(confirmed: Sequence[Pair]) -> list[Pair]:
    """The largest set of pairs of which no two share an interface here or an address there. Pure.

    Among equally large ones, more pairs of one subnet, then shorter round trips, as far as augmenting paths tell: the
    pairs are taken in that order, and one that was taken stays served (Kuhn's bipartite matching).
    """
    ordered = sorted(confirmed, key=lambda p: (not p.same_subnet, p.rtt_s or 0.0, p.uplink.version))
    taken: dict[str, Pair] = {}  # by address there
    by_interface: dict[str, list[Pair]] = {}
    for pair in ordered:
        by_interface.setdefault(pair.uplink.interface, []).append(pair)

    def serve(interface: str, seen: set[str]) -> bool:
        for pair in by_interface[interface]:
            if pair.there in seen:
                continue
            seen.add(pair.there)
            other = taken.get(pair.there)
            if other is None or serve(other.uplink.interface, seen):
                taken[pair.there] = pair
                return True
        return False

    for interface in by_interface:
        serve(interface, set())
    return sorted(taken.values(), key=ordered.index)


def probe(pair: Pair, port: int, timeout: float = PROBE_S) -> Pair | None:
    """`pair` with the time of a TCP handshake to `port` there, leaving by that very interface; None if it fails."""
    family = socket.AF_INET6 if pair.uplink.version == 6 else socket.AF_INET
    begun = time.monotonic()
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, pair.uplink.interface.encode())
            sock.bind((pair.uplink.address, 0))
            sock.connect((pair.there, port))
            return Pair(pair.uplink, pair.there, time.monotonic() - begun)
    except OSError:
        return None


def discover(
    here: Sequence[Uplink],
    there: Sequence[str],
    port: int,
    probing: Callable[[Pair, int], Pair | None] = probe,
) -> list[Pair]:
    """The paths from `here` to `port` at the addresses `there`, probed at once; [] if none answers."""
    tried = candidates(here, there)
    if not tried:
        return []
    with concurrent.futures.ThreadPoolExecutor(len(tried), thread_name_prefix="probe") as pool:
        answers = list(pool.map(lambda pair: probing(pair, port), tried))
    return match([pair for pair in answers if pair is not None])
