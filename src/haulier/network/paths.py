"""From a site's settings and another site's addresses to the paths of a session."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from haulier.durable import write_atomically
from haulier.errors import UNDECODABLE, HaulierError, UsageError
from haulier.network import addresses, discovery, mptcp
from haulier.network.addresses import Uplink
from haulier.network.rules import Rule, rule_for
from haulier.process import ProcessId
from haulier.session import PathAddress


@dataclass(frozen=True)
class Way:
    """A path before it is dialled: the address there, and by which uplink (None: as the host routes)."""

    there: str
    uplink: Uplink | None
    rule: Rule
    bound: bool
    """The uplink was chosen, not the host's routes: its packets are to leave by it."""

    def address(self, port: int) -> PathAddress:
        uplink = self.uplink if self.bound else None
        return PathAddress(
            self.there,
            port,
            uplink.interface if uplink else None,
            uplink.address if uplink else None,
            self.rule.cap_bps,
            self.rule.cost,
        )


def find(
    there: Sequence[str], port: int, rules: Sequence[Rule] = (), *, explore: bool = False, uplinks: bool = True
) -> list[Way]:
    """The paths to `port` at the addresses `there`, cheapest first.

    With `explore` every pair of an uplink here and an address there is tried, and those that answer are matched.
    Otherwise, or where none answers, there is one path to each address, as this host routes; without `uplinks` nobody
    needs to know by which.
    """
    if not explore and not rules and not uplinks:
        return [Way(host, None, Rule(""), False) for host in there]
    try:
        here = addresses.uplinks()
    except HaulierError:
        here = []
    ways = []
    if explore:
        pairs = discovery.discover(here, there, port)
        ways = [Way(pair.there, pair.uplink, rule_for(pair.uplink, rules), True) for pair in pairs]
    if not ways:
        for host in there:
            uplink = _routed(here, host)
            ways.append(Way(host, uplink, rule_for(uplink, rules), False))
    return sorted(ways, key=lambda way: way.rule.cost)


def _routed(here: Sequence[Uplink], host: str) -> Uplink | None:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    interface = addresses.leaving_by(host)
    return next((u for u in here if u.interface == interface and u.version == version), None)


def mptcp_steps(ways: Sequence[Way], taken: Mapping[str, int] | None = None) -> list[mptcp.Step]:
    """What this host needs so that MPTCP spreads over `ways`. UsageError if it cannot: they share an uplink.

    `taken`: see `mptcp.plan`.
    """
    known = [(way.uplink, way.there) for way in ways if way.uplink is not None]
    if len({uplink.interface for uplink, _ in known}) < len(ways) or len({u.version for u, _ in known}) > 1:
        raise UsageError("MPTCP needs an uplink of its own for each path, all of one IP version")
    hops = mptcp.gateways()
    others = []
    for uplink, there in known[1:]:
        direct = ipaddress.ip_address(there) in ipaddress.ip_network(uplink.network)
        others.append((uplink, there if direct else hops.get(uplink.interface, there)))
    return mptcp.plan(known[0][1], others, taken)


class _Shared(msgspec.Struct, frozen=True):
    """What this host is set up for, by whom it is used, and the numbers of its own addresses (`mptcp.numbered`)."""

    users: list[ProcessId]
    numbers: dict[str, int]
    steps: list[mptcp.Step]


@contextlib.contextmanager
def spread(ways: Sequence[Way], run: Path) -> Iterator[str]:
    """MPTCP is set up for `ways` meanwhile; gives "", or why it is not. `run`: the site's directory for such files.

    Several handoffs at once share the set-up, each adds what it lacks, and the last one that ends takes all of it away:
    without an endpoint the kernel would close the subflows that others have there.
    """
    file, user = run / "mptcp", ProcessId.of(os.getpid())
    assert user is not None
    try:
        _join(ways, file, user)
    except (HaulierError, OSError) as error:
        yield str(error)
        return
    try:
        yield ""
    finally:
        with contextlib.suppress(OSError):
            _leave(file, user)


def tidy(run: Path) -> None:
    """Takes away what `spread` set up where none of its users lived to do it."""
    file = run / "mptcp"
    with contextlib.suppress(OSError):
        if file.exists():
            with _locked(file):
                _save(_load(file), file)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _join(ways: Sequence[Way], file: Path, user: ProcessId) -> None:
    with _locked(file):
        shared = _load(file)
        steps = mptcp_steps(ways, shared.numbers)
        missing = [step for step in steps if step not in shared.steps]
        numbers = mptcp.numbered([way.uplink.address for way in ways[1:] if way.uplink is not None], shared.numbers)
        # Before it is done: whoever finds us dead knows what there may be.
        _save(_Shared([*shared.users, user], shared.numbers | numbers, shared.steps + missing), file)
        try:
            mptcp.apply(missing)
        except HaulierError:
            _save(shared, file)
            raise


def _leave(file: Path, user: ProcessId) -> None:
    with _locked(file):
        shared = _load(file)
        if user in shared.users:
            shared.users.remove(user)
        _save(_unless_used(shared), file)


def _load(file: Path) -> _Shared:
    """What is set up, for those who live."""
    try:
        shared = msgspec.json.decode(file.read_bytes(), type=_Shared)
    except (OSError, *UNDECODABLE):
        return _Shared([], {}, [])
    return _unless_used(_Shared([user for user in shared.users if user.alive()], shared.numbers, shared.steps))


def _unless_used(shared: _Shared) -> _Shared:
    """Nothing, taken away, if nobody uses it."""
    if shared.users:
        return shared
    mptcp.undo(shared.steps)
    return _Shared([], {}, [])


def _save(shared: _Shared, file: Path) -> None:
    if shared.users:
        write_atomically(file, msgspec.json.encode(shared))
    else:
        file.unlink(missing_ok=True)


class Spender:
    """Decides what a handoff may spend on paths. Pure; `choice` is "cheap", "all" or "deadline"."""

    def __init__(self, choice: str, deadline_s: float, costs: Sequence[int]) -> None:
        self._levels = sorted({cost for cost in costs if cost > 0})
        self._choice = choice
        self._deadline_s = deadline_s
        self._since = -math.inf
        # Where every path costs something, the cheapest is what there is.
        self.cost = self._levels[-1] if choice == "all" and self._levels else min(costs, default=0)

    def look(self, now: float, elapsed_s: float, eta_s: float) -> int:
        """The cost that is allowed now. `eta_s`: seconds that are left at the present rate, negative if not known.

        A dearer level is allowed when the end would come after nine tenths of the deadline; then it is given two
        seconds to show in the rate. What was allowed once stays so: to go back and forth would spend more.
        """
        if self._choice != "deadline" or not self._deadline_s or eta_s < 0 or now - self._since < 2.0:
            return self.cost
        if elapsed_s + eta_s > 0.9 * self._deadline_s:
            dearer = [level for level in self._levels if level > self.cost]
            if dearer:
                self.cost, self._since = dearer[0], now
        return self.cost
