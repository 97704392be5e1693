"""Which compression pays now: a pure function of what the link takes, what CPU is left, and what each mode costs.

Throughput of a mode is the smaller of what the CPU makes and what the link takes, in plain bytes a second:
``min(cpu * speed, link / ratio)``. The mode with the most wins, less 3 % for one that takes all of the CPU that is
left, and in proportion for less: what is gained has to be worth what guests could have had. A profile (`profile`)
says what modes cost on this host; what this guest's pages really cost and yield corrects it, mode by mode, while the
handoff runs.

A mode is changed only for a gain of 6 %, after it was in use for half a second, and what a mode was found to be worth
is remembered: so on constant input there are few changes, and then none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from haulier.compress.xz import name_of

NEAR: Final = 0.03
"""By so much a mode that takes all of the CPU has to be better than one that takes none."""
GAIN: Final = 1.06
"""A change has to promise so much ..."""
DWELL_S: Final = 0.5
"""... and the present mode must have been tried for so long."""
LEAST_BYTES: Final = 256 * 1024
"""Plain bytes below which a mode has not been tried."""
KEPT: Final = 0.7
"""How much of a correction outlives the next measurement."""
PROBE: Final = 1.5
"""A link that is not kept full may carry so many times what it is seen to carry."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A level of zstd or xz on this host: plain bytes a CPU second takes, and what a plain byte becomes on the wire."""

    level: int
    speed: float
    ratio: float
    memory: int = 0
    """Bytes that its window takes at either end."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs of the modes worth having, fastest first. `encode`: CPU seconds per plain byte before any compression."""

    costs: tuple[Cost, ...]
    encode: float = 2.0e-9
    made: float = 0.0
    """Unix seconds when it was measured; 0 = the one that haulier comes with."""

    def frontier(self) -> Profile:
        """Without modes that another one beats in both speed and bytes."""
        best: list[Cost] = []
        for cost in sorted(self.costs, key=lambda cost: (-cost.speed, cost.ratio)):
            if not best or cost.ratio < best[-1].ratio:
                best.append(cost)
        return Profile(tuple(best), self.encode, self.made)


DEFAULT: Final = Profile(
    (
        Cost(-5, 600e6, 0.333, 1 << 21),
        Cost(1, 440e6, 0.24, 1 << 21),
        Cost(2, 380e6, 0.229, 1 << 21),
        Cost(3, 260e6, 0.2205, 1 << 21),
        Cost(5, 150e6, 0.2136, 1 << 21),
        Cost(7, 75e6, 0.2066, 1 << 25),
        Cost(9, 57e6, 0.2046, 1 << 25),
        Cost(20, 27e6, 0.1901, 1 << 20),
        Cost(22, 22e6, 0.1856, 1 << 20),
        Cost(24, 7e6, 0.181, 1 << 20),
        Cost(26, 4.8e6, 0.1778, 1 << 20),
    )
)
"""Measured on one core of a small host, of a booted guest's memory (21 November 2026), less a fifth of the speed."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Measured over what the profile says: `speed` above 1 is faster, `ratio` above 1 is larger."""

    speed: float = 1.0
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A mode, what it promises (plain bytes a second), what limits it, and why it was taken, in a sentence."""

    cost: Cost
    promises: float
    limit: str
    reason: str

    @property
    def level(self) -> int:
        return self.cost.level


def throughput(cost: Cost, encode: float, link: float, cpu: float, fix: Correction) -> tuple[float, str]:
    """Plain bytes a second, and "link" or "cpu". `link`: bytes a second; `cpu`: cores' worth of time for it."""
    made = cpu / (encode + 1 / (cost.speed * fix.speed))
    taken = link / max(1e-9, cost.ratio * fix.ratio)
    return (made, "cpu") if made < taken else (taken, "link")


def choose(profile: Profile, link: float, cpu: float, fixes: Mapping[int, Correction] | None = None) -> Choice:
    """The mode for a link of `link` bytes a second and `cpu` cores. Modes not yet tried take the mean correction."""
    fixes = fixes or {}
    mean = mean_of(fixes.values())
    found = [
        (*throughput(cost, profile.encode, link, cpu, fixes.get(cost.level, mean)), cost) for cost in profile.costs
    ]

    def worth(one: tuple[float, str, Cost]) -> float:
        rate, limit, cost = one
        speed = cost.speed * fixes.get(cost.level, mean).speed
        busy = 1.0 if limit == "cpu" else rate * (profile.encode + 1 / speed) / cpu
        return rate * (1 - NEAR * busy)

    # Fastest first in the profile: of equals the fastest.
    rate, limit, cost = max(found, key=worth)
    return Choice(cost, rate, limit, explain(cost, rate, limit, link, cpu))


def explain(cost: Cost, rate: float, limit: str, link: float, cpu: float) -> str:
    """Why, in one line."""
    return (
        f"{name_of(cost.level)}: {rate / 1e6:.0f} MB/s of pages, as much as the {limit} allows "
        f"(link {link * 8 / 1e6:.1f} Mbit/s, {cpu:.2f} cores)"
    )


def mean_of(fixes: Iterable[Correction]) -> Correction:
    """The geometric mean; 1 for none."""
    known = list(fixes)
    if not known:
        return Correction()
    speed = ratio = 1.0
    for fix in known:
        speed, ratio = speed * fix.speed, ratio * fix.ratio
    return Correction(speed ** (1 / len(known)), ratio ** (1 / len(known)))


@dataclass
class Link:
    """What the link carries, told from what it is seen to carry: bytes a second."""

    known: float = 0.0

    def note(self, seen: float, full: bool) -> float:
        """`full`: there was always something waiting for it, so that what is seen is what it carries."""
        if full or not self.known:
            self.known = seen
        else:
            # Not full: it carries at least this, and perhaps more than was known.
            self.known = max(self.known, seen)
        return self.known if full else max(self.known, seen * PROBE)


@dataclass
class Controller:
    """Decides batch by batch. Times in seconds are arguments; sizes in bytes."""

    profile: Profile
    link: float
    cpu: float = 1.0
    cap: float = 0.0
    """Cores at most, by the operator's word; 0 = no limit."""
    fixes: dict[int, Correction] = field(default_factory=dict)
    changes: list[tuple[float, Choice]] = field(default_factory=list)
    _plain: int = 0
    _wire: int = 0
    _cpu_s: float = 0.0
    _since: float = 0.0
    _tried: int = 0

    def __post_init__(self) -> None:
        self.profile = self.profile.frontier()
        self.choice = choose(self.profile, self.link, self._share(), self.fixes)

    def _share(self) -> float:
        return min(self.cpu, self.cap) if self.cap else self.cpu

    def begin(self, now: float) -> Choice:
        """The first mode, by the profile alone."""
        self._since = now
        self.changes.append((now, self.choice))
        return self.choice

    def note(self, plain: int, wire: int, cpu_s: float) -> None:
        """What a batch cost: so many bytes went into zstd, so many came out, and encoding took so much CPU."""
        self._plain += plain
        self._wire += wire
        self._cpu_s += cpu_s
        self._tried += plain
        if self._plain < LEAST_BYTES:
            return
        cost = self.choice.cost
        zstd_s = max(self._cpu_s - self.profile.encode * self._plain, 0.1 * self._cpu_s, 1e-9)
        now = Correction(self._plain / zstd_s / cost.speed, self._wire / self._plain / cost.ratio)
        old = self.fixes.get(cost.level)
        if old is not None:
            now = Correction(KEPT * old.speed + (1 - KEPT) * now.speed, KEPT * old.ratio + (1 - KEPT) * now.ratio)
        self.fixes[cost.level] = now
        self._plain = self._wire = 0
        self._cpu_s = 0.0

    def decide(self, now: float, link: float, cpu: float) -> Choice:
        """The mode for the next batch."""
        self.link, self.cpu = link, cpu
        if now - self._since < DWELL_S or self._tried < LEAST_BYTES:
            return self.choice
        share = self._share()
        best = choose(self.profile, link, share, self.fixes)
        fix = self.fixes.get(self.choice.level, Correction())
        rate, limit = throughput(self.choice.cost, self.profile.encode, link, share, fix)
        if best.level != self.choice.level and best.promises >= GAIN * rate:
            self.choice = best
            self._since, self._tried = now, 0
            self._plain = self._wire = 0
            self._cpu_s = 0.0
            self.changes.append((now, best))
        else:
            cost = self.choice.cost
            self.choice = Choice(cost, rate, limit, explain(cost, rate, limit, link, share))
        return self.choice
