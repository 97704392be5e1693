"""Which compression pays now: a pure function of what the link takes, what CPU is left, and what each mode costs.

Throughput of a mode is the smaller of what the CPU makes and what the link takes, in plain bytes a second:
``min(cpu * speed, link / ratio)``. The mode with the most wins, less 3 % for one that takes all of the CPU that is
left, and in proportion for less: what is gained has to be worth what guests could have had. A profile (`profile`)
says what modes cost on this host; trials of the same pages of this guest with modes like the one in use correct it
while the handoff runs.

A mode is changed only for a gain of 3 %, after it was in use for half a second, and what a mode was found to be worth
is remembered: so on constant input there are few changes, and then none. Beside that, a link that is about to run dry
gets a batch of a quick mode: so neither a weaker CPU nor a link that has grown leaves it idle until it is found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from haulier.compress.xz import is_xz, name_of

NEAR: Final = 0.03
"""By so much a mode that takes all of the CPU has to be better than one that takes none."""
GAIN: Final = 1.03
"""A change has to promise so much ..."""
DWELL_S: Final = 0.5
"""... and the present mode must have been tried for so long."""
URGENT: Final = 1.25
"""... unless it promises so much, or the link has to wait for the CPU."""
LEAST_BYTES: Final = 256 * 1024
"""Plain bytes below which a mode has not been tried."""
KEPT: Final = 0.93
"""How much of what was seen counts when so many more plain bytes were."""
BELIEVED: Final = 3
"""Measurements that the profile counts for."""
TRIAL_BYTES: Final = 1 << 20
"""Plain bytes between the first trials ..."""
EARLY_TRIALS: Final = 4
LATER_BYTES: Final = 12 << 20
"""... and between later ones."""
NEIGHBOURS: Final = 2
"""Modes on either side of the one in use that are tried."""
CAUTION: Final = 0.5
"""Of the CPU, so much is counted on for xz before anything of the guest's pages is known."""
SHARE_HALF_S: Final = 0.1
"""Seconds of the codec's time after which half of what is known of its share of the core is new."""
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
        Cost(20, 19e6, 0.1789, 1 << 21),
        Cost(21, 13.5e6, 0.1737, 1 << 21),
        Cost(23, 6.5e6, 0.1693, 1 << 21),
        Cost(24, 5.4e6, 0.1650, 1 << 21),
        Cost(25, 3.9e6, 0.1620, 1 << 21),
        Cost(26, 3.2e6, 0.1606, 1 << 21),
    )
)
"""Measured on one core of a small host, of a booted guest's memory (21 November 2026), less a fifth of the speed; xz
by what became of it when it was made one stream (23 November)."""


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


def throughput(cost: Cost, encode: float, link: float, cpu: float) -> tuple[float, str]:
    """Plain bytes a second, and "link" or "cpu". `link`: bytes a second; `cpu`: cores' worth of time for it."""
    made = cpu / (encode + 1 / cost.speed)
    taken = link / max(1e-9, cost.ratio)
    return (made, "cpu") if made < taken else (taken, "link")


def choose(profile: Profile, link: float, cpu: float) -> Choice:
    """The mode for a link of `link` bytes a second and `cpu` cores."""
    found = [(*throughput(cost, profile.encode, link, cpu), cost) for cost in profile.costs]

    def worth(one: tuple[float, str, Cost]) -> float:
        rate, limit, cost = one
        busy = 1.0 if limit == "cpu" else rate * (profile.encode + 1 / cost.speed) / cpu
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


def all_fixes(profile: Profile, fixes: Mapping[int, Correction]) -> dict[int, Correction]:
    """By level: what was measured, else that of the nearest mode that was tried; none was: 1."""
    tried = [number for number, cost in enumerate(profile.costs) if cost.level in fixes]
    found = {}
    for number, cost in enumerate(profile.costs):
        nearest = min(tried, key=lambda other: abs(other - number), default=None)
        found[cost.level] = Correction() if nearest is None else fixes[profile.costs[nearest].level]
    return found


@dataclass
class Link:
    """What the link carries, told from what it is seen to carry: bytes a second."""

    known: float = 0.0
    _waiting: int = 0

    def note(self, seen: float, full: bool, waiting: int = 0) -> float:
        """`full`: there was always something waiting for it, so that what is seen is what it carries.

        `waiting`: bytes that wait for it. While they grow it is given more than it takes: it has no more to give.
        """
        growing, self._waiting = waiting > self._waiting, waiting
        if full or not self.known:
            self.known = seen
        else:
            # Not full: it carries at least this, and perhaps more than was known.
            self.known = max(self.known, seen)
        return self.known if full or growing else max(self.known, seen * PROBE)


@dataclass
class Share:
    """How much of a core the codec gets, told from how much of its time it really ran."""

    known: float = 1.0

    def note(self, cpu_s: float, wall_s: float) -> float:
        """It ran for `cpu_s` of `wall_s` seconds; the core's share now."""
        kept = 0.5 ** (wall_s / SHARE_HALF_S)
        self.known = kept * self.known + (1 - kept) * min(1.0, cpu_s / max(1e-9, wall_s))
        return self.known


Tried = Mapping[int, tuple[int, int, float]]
"""By level, of the same pages: plain bytes, bytes on the wire, CPU seconds of compression."""


@dataclass
class Controller:
    """Decides batch by batch. Times in seconds are arguments; sizes in bytes.

    `fixes`: what trials of the same pages told of modes, over the profile; `content`: what the mode in use costs and
    yields of what is being sent just now, over what profile and trials say of it. The latter is of the pages and not
    of the mode, so it holds for all of them: else each mode would be judged by other pages.
    """

    profile: Profile
    link: float
    cpu: float = 1.0
    cap: float = 0.0
    """Cores at most, by the operator's word; 0 = no limit."""
    fixes: dict[int, Correction] = field(default_factory=dict)
    content: Correction = field(default_factory=Correction)
    changes: list[tuple[float, Choice]] = field(default_factory=list)
    trials: int = 0
    _seen: int = 0
    _tried_at: int = 0
    _plain: int = 0
    _wire: int = 0
    _cpu_s: float = 0.0
    _encode: tuple[float, float] = (0.0, 0.0)
    """CPU seconds before compression, and plain bytes, the latest counting most."""
    _due: tuple[float, float] = (0.0, 0.0)
    """Bytes on the wire and CPU seconds that profile and trials say of what was sent, the latest counting most ..."""
    _came: tuple[float, float] = (0.0, 0.0)
    """... and what came of it."""
    _pace: float = 0.0
    """CPU seconds a plain byte of the last batch."""
    _since: float = 0.0
    _used: int = 0

    def __post_init__(self) -> None:
        self.profile = self.profile.frontier()
        self._encode = (self.profile.encode * BELIEVED * LEAST_BYTES, float(BELIEVED * LEAST_BYTES))
        self.choice = choose(self.profile, self.link, self._share())
        if is_xz(self.choice.level):
            self.choice = choose(self.profile, self.link, CAUTION * self._share())

    def _share(self) -> float:
        return min(self.cpu, self.cap) if self.cap else self.cpu

    @property
    def encode(self) -> float:
        """CPU seconds for each plain byte before any compression: the profile's, corrected by what was seen."""
        return self._encode[0] / self._encode[1]

    def _now(self) -> Profile:
        """What modes cost of the pages that are being sent."""
        fixed, content = all_fixes(self.profile, self.fixes), self.content
        costs = (
            Cost(
                cost.level,
                cost.speed * fixed[cost.level].speed * content.speed,
                cost.ratio * fixed[cost.level].ratio * content.ratio,
                cost.memory,
            )
            for cost in self.profile.costs
        )
        return Profile(tuple(costs), self.encode, self.profile.made)

    def begin(self, now: float) -> Choice:
        """The first mode, by the profile alone."""
        self._since = now
        self.changes.append((now, self.choice))
        return self.choice

    def note(self, plain: int, wire: int, cpu_s: float, encode_s: float) -> None:
        """What a batch cost: so many bytes went into compression, so many came out, and that took so much CPU.

        `encode_s`: what was spent before, on pages that became these bytes or none.
        """
        self._pace = (cpu_s + encode_s) / plain if plain else 0.0
        kept = KEPT ** (plain / LEAST_BYTES)
        self._encode = (kept * self._encode[0] + encode_s, kept * self._encode[1] + plain)
        self._plain += plain
        self._wire += wire
        self._cpu_s += cpu_s
        self._used += plain
        self._seen += plain
        if self._plain < LEAST_BYTES:
            return
        cost, fix = self.choice.cost, all_fixes(self.profile, self.fixes)[self.choice.level]
        due = (self._plain * cost.ratio * fix.ratio, self._plain / (cost.speed * fix.speed))
        if not self._due[0]:
            # As much is believed of the profile as of so many bytes that were seen.
            self._due = self._came = (due[0] * BELIEVED, due[1] * BELIEVED)
        self._due = (KEPT * self._due[0] + due[0], KEPT * self._due[1] + due[1])
        self._came = (KEPT * self._came[0] + self._wire, KEPT * self._came[1] + self._cpu_s)
        self.content = Correction(self._due[1] / max(1e-9, self._came[1]), self._came[0] / self._due[0])
        self._plain = self._wire = 0
        self._cpu_s = 0.0

    def due(self, full: bool) -> tuple[int, ...]:
        """Levels to be tried with the pages that were just sent, for `learn`, the one in use first; none when it is not
        the time.

        `full`: the link has enough to go on with meanwhile. While it has not, no time is to be lost with trials: what
        is known of the mode in use tells how much faster than the profile this guest's pages go through all of them.
        """
        wait = TRIAL_BYTES if self.trials < EARLY_TRIALS else LATER_BYTES
        if not full or self._seen < LEAST_BYTES or (self._tried_at and self._seen - self._tried_at < wait):
            return ()
        levels = [cost.level for cost in self.profile.costs]
        at = levels.index(self.choice.level)
        others = [*levels[max(0, at - NEIGHBOURS) : at], *levels[at + 1 : at + NEIGHBOURS + 1]]
        # Slow ones may leave no time for all of them: each comes first in its turn.
        turn = self.trials % max(1, len(others))
        return (self.choice.level, *others[turn:], *others[:turn])

    def learn(self, tried: Tried) -> None:
        """What modes cost of the same pages, the mode in use among them: by that one the others are judged."""
        self._tried_at = self._seen
        self.trials += 1
        if self.choice.level not in tried:
            return
        costs = {cost.level: cost for cost in self.profile.costs}
        found = {
            level: Correction(plain / max(cpu_s, 1e-9) / costs[level].speed, max(wire, 1) / plain / costs[level].ratio)
            for level, (plain, wire, cpu_s) in tried.items()
            if plain and level in costs
        }
        mine, fix = found[self.choice.level], all_fixes(self.profile, self.fixes)[self.choice.level]
        for level, one in found.items():
            now = Correction(fix.speed * one.speed / mine.speed, fix.ratio * one.ratio / mine.ratio)
            old = self.fixes.get(level, now)
            self.fixes[level] = Correction((old.speed * now.speed) ** 0.5, (old.ratio * now.ratio) ** 0.5)

    def filler(self, left_s: float) -> int | None:
        """A quick level of zstd for the next batch alone, instead of the mode in use; None for that one.

        `left_s`: when the link will have nothing to do, in seconds. It is filled if xz makes no batch in that time.
        `note` is not to hear of such batches.
        """
        if not is_xz(self.choice.level):
            return None
        known = self._now()
        mine = next(cost for cost in known.costs if cost.level == self.choice.level)
        # What the last batch took counts where it took longer: pages differ more than what is known of them follows.
        if left_s > LEAST_BYTES * max(self._pace, known.encode + 1 / mine.speed) / self._share():
            return None
        quick = tuple(cost for cost in known.costs if not is_xz(cost.level))
        return choose(Profile(quick, known.encode), self.link, self._share()).level if quick else None

    def decide(self, now: float, link: float, cpu: float) -> Choice:
        """The mode for the next batches."""
        self.link, self.cpu = link, cpu
        share, known = self._share(), self._now()
        mine = next(cost for cost in known.costs if cost.level == self.choice.level)
        rate, limit = throughput(mine, known.encode, link, share)
        best = choose(known, link, share)
        waits = self._used < LEAST_BYTES or (
            limit == "link" and now - self._since < DWELL_S and best.promises < URGENT * rate
        )
        if not waits and best.level != self.choice.level and best.promises >= GAIN * rate:
            cost = next(cost for cost in self.profile.costs if cost.level == best.level)
            self.choice = Choice(cost, best.promises, best.limit, best.reason)
            self._since, self._used = now, 0
            self._plain = self._wire = 0
            self._cpu_s = 0.0
            self.changes.append((now, self.choice))
        else:
            cost = self.choice.cost
            self.choice = Choice(cost, rate, limit, explain(cost, rate, limit, link, share))
        return self.choice
