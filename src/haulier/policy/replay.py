"""Policies driven by a trace: what one site's cache, or a fleet of them, would have fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from haulier.errors import UsageError
from haulier.policy.coordinated import Coordinated, Fleet
from haulier.policy.gdsf import Gdsf
from haulier.policy.model import Item, Key, Policy, check_policy
from haulier.policy.recency import Lfu, Lru
from haulier.policy.s3fifo import S3Fifo


class Access(NamedTuple):
    """`site` wants `key` of `size` bytes at `time`."""

    time: float
    site: int
    key: Key
    size: int


@dataclass
class Outcome:
    """What a trace came to: bytes and accesses, and those of them that were there; seconds of fetching the rest."""

    accesses: int = 0
    hits: int = 0
    bytes: int = 0
    hit_bytes: int = 0
    seconds: float = 0.0
    origin_bytes: int = 0

    def count(self, size: int, hit: bool, cost: float) -> None:
        """One more access; `cost` in seconds counts unless it hit."""
        self.accesses += 1
        self.bytes += size
        if hit:
            self.hits += 1
            self.hit_bytes += size
        else:
            self.seconds += cost

    @property
    def byte_ratio(self) -> float:
        return self.hit_bytes / self.bytes if self.bytes else 0.0

    @property
    def ratio(self) -> float:
        return self.hits / self.accesses if self.accesses else 0.0


@dataclass
class Cache:
    """One site's cache of `capacity` bytes, as the trace has left it. `gone` is what the last access drove out."""

    policy: Policy
    capacity: int
    used: int = 0
    sizes: dict[Key, int] = field(default_factory=dict)
    gone: list[Key] = field(default_factory=list)

    def access(self, key: Key, size: int, cost: float = 1.0) -> bool:
        """Whether `key` was there. If not it is fetched and, unless it is larger than the cache, kept."""
        self.gone = []
        if key in self.sizes:
            self.policy.hit(key, cost)
            return True
        if size > self.capacity:
            return False
        if isinstance(self.policy, Coordinated):
            self._insert(key, size, cost)  # it may choose not to keep what is new; the others always do
            self._make_room(0)
        else:
            self._make_room(size)
            self._insert(key, size, cost)
        return False

    def _make_room(self, size: int) -> None:
        while self.used + size > self.capacity:
            key = self.policy.victim()
            self.used -= self.sizes.pop(key)
            self.gone.append(key)

    def _insert(self, key: Key, size: int, cost: float) -> None:
        self.policy.insert(Item(key, size, cost))
        self.sizes[key] = size
        self.used += size


def local_policy(name: str, capacity: int) -> Policy:
    """A policy that needs to know of no other site. UsageError for other names."""
    for kind in (Lru, Lfu, Gdsf, S3Fifo):
        if kind.name == check_policy(name):
            return kind(capacity)
    raise UsageError(f"cache policy {name!r} is one of a fleet, not of a single site")


def replay(policy: Policy, capacity: int, trace: Iterable[tuple[Key, int, float]]) -> Outcome:
    """One site: (key, bytes, seconds to fetch it) each."""
    cache, found = Cache(policy, capacity), Outcome()
    for key, size, cost in trace:
        found.count(size, cache.access(key, size, cost), cost)
    return found


def replay_fleet(
    name: str,
    capacities: Sequence[int],
    costs: Sequence[Sequence[float]],
    origin: Sequence[float],
    half_life: float,
    trace: Iterable[Access],
) -> Outcome:
    """A fleet whose sites fetch what they lack from the nearest that has it. `costs`, `origin`: see `Fleet`.

    That holds for all policies; what differs is what each site keeps.
    """
    fleet = Fleet(costs, origin, half_life)
    together = [Coordinated(fleet, site) for site in range(len(capacities))] if name == Coordinated.name else []
    policies: Sequence[Policy] = together or [local_policy(name, capacity) for capacity in capacities]
    caches = [Cache(policy, capacity) for policy, capacity in zip(policies, capacities, strict=True)]
    found = Outcome()
    for time, site, key, size in trace:
        cache = caches[site]
        price = fleet.nearest(site, key)
        if together:
            fleet.access(site, key, time)
        hit = cache.access(key, size, price * size)
        found.count(size, hit, price * size)
        if hit:
            continue
        found.origin_bytes += size if price >= fleet.origin[site] else 0
        if key in cache.sizes:
            for other in fleet.holders[key] - {site} if together else ():
                together[other].touch(key)
            fleet.holders[key].add(site)
        for gone in cache.gone:
            fleet.holders[gone].discard(site)
    return found
