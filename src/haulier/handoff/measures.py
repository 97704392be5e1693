"""What is done about a guest that dirties memory faster than the link carries it. Pure: readings in, measures out.

Each round is looked at when QEMU begins it: how much is left, and how long the link needs for that. A guest outruns the
link when over several rounds that has not become less, and is more than even the most patient gate would switch over
with. Or when, as things go, it will not be there by the deadline (one that hovers within the gate's reach is given
until the measures that are left need the time, and a minute where there is no deadline: its disk may be what does not
come to rest). Then comes what the operator allows, the mildest
first: the guest is slowed step by step (QEMU's auto-converge, held back until then), or goes before the rest of its
memory (post-copy; where both are allowed, after the first two steps); and where nothing is allowed, or nothing has
helped, the handoff is refused, and the guest runs on where it is.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from haulier.handoff.convergence import MIN_RATE_BPS, MOST_RATIO, Reading

AUTO_CONVERGE: Final = "auto-converge"
POST_COPY: Final = "post-copy"
ALLOWABLE: Final = (AUTO_CONVERGE, POST_COPY)
ROUNDS: Final = 5
"""Without progress over so many the guest counts as one that outruns the link."""
PROGRESS: Final = 0.8
"""Of what was left so many rounds before: less is progress."""
REACH: Final = 8.0
"""Times the downtime asked for: what the gate may come to accept in the end."""
HOVER_S: Final = 60.0
HOVER_ROUNDS: Final = 24
"""A guest within that reach for so long, and over so many rounds, is not let through any more: what it writes to memory
and disk together is what the link carries. (Rounds, too: a link that was gone meanwhile is no reason.)"""
SLOWED_REACH: Final = 1.0
STEP_S: Final = 5.0
"""Seconds that a step is given at least."""
STEPS: Final = (30, 60, 80, 95)
"""Per cent of its time that the guest is held, one step after another."""
GENTLE: Final = 2
"""Steps that are tried first where post-copy is allowed too: the guest need not crawl."""
EARLY_ROUNDS: Final = 3
"""As ROUNDS, where post-copy may follow at once: every further round is sent in vain."""
STEP_ROUNDS: Final = 3
"""Rounds that a step is given; QEMU takes two to follow."""
HELD_BACK: Final = {
    "cpu_throttle_initial": 1,
    "cpu_throttle_increment": 1,
    "max_cpu_throttle": 1,
    "throttle_trigger_threshold": 1,
}
"""Parameters with which auto-converge, which must be switched on before, does next to nothing."""


def throttled(percent: int) -> dict[str, int]:
    """Parameters with which QEMU's next step goes to that percentage."""
    return {"cpu_throttle_initial": percent, "cpu_throttle_increment": percent, "max_cpu_throttle": percent}


class Kind(enum.StrEnum):
    """What is to be done."""

    THROTTLE = "slow the guest"
    POST_COPY = "send the rest of its memory after it"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Measure:
    """`percent`: of its time that the guest is to be held. `why`: in a clause, for people."""

    kind: Kind
    percent: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Outlook:
    """As things go: seconds until the switchover (infinite if never), and the downtime if it were now, in seconds."""

    seconds: float
    downtime_s: float


def need_s(reading: Reading) -> float:
    """Seconds that the link needs for what is left, pages encoded as those before."""
    ratio = max(1.0, min(MOST_RATIO, 0.8 * reading.ratio))
    return reading.remaining / ratio * 8 / max(reading.rate_bps, MIN_RATE_BPS)


class Measures:
    """One handoff's. `note` is called at each reading; times in seconds."""

    def __init__(self, allow: Collection[str], downtime_ms: int, deadline: float = 0.0) -> None:
        """`deadline`: by the same clock as the readings; 0 = none."""
        self._allow = set(allow)
        self._downtime_s = downtime_ms / 1000
        self._deadline = deadline
        self._rounds: deque[tuple[int, float, float]] = deque(maxlen=ROUNDS + 1)
        """(round, when it began, seconds that the link needed for what was left then)."""
        self._began = 0.0
        self._within: tuple[int, float] | None = None
        """Round and time from which on it has been within the gate's reach."""
        self._step = 0
        self._judged = 0
        self._judged_at = 0.0
        self.taken: list[dict[str, Any]] = []

    def outlook(self, reading: Reading) -> Outlook:
        """By how what is left shrank over the last rounds."""
        now = need_s(reading)
        if len(self._rounds) < 2:
            return Outlook(now, now)
        (_, first_at, first), (_, last_at, last) = self._rounds[0], self._rounds[-1]
        goal = self._downtime_s / 2
        if last <= goal:
            return Outlook(now, now)
        shrunk = (first - last) / max(1e-3, last_at - first_at)
        return Outlook((last - goal) / shrunk if shrunk > 0 else float("inf"), now)

    def note(self, reading: Reading) -> Measure | None:
        """What has to be done now, if anything."""
        self._began = self._began or reading.now
        if reading.rounds < 2 or (self._rounds and self._rounds[-1][0] == reading.rounds):
            return None
        need = need_s(reading)
        self._rounds.append((reading.rounds, reading.now, need))
        if need > REACH * self._downtime_s:
            self._within = None
        elif self._within is None:
            self._within = reading.rounds, reading.now
        if self._step and (reading.rounds - self._judged < STEP_ROUNDS or reading.now - self._judged_at < STEP_S):
            return None
        why = self._outrun() or self._hovers(reading) or self._late(reading)
        if not why:
            return None
        self._judged, self._judged_at = reading.rounds, reading.now
        measure = self._next(why)
        self.taken.append(
            {
                "after_s": round(reading.now - self._began, 2),
                "round": reading.rounds,
                "what": measure.kind.value,
                "percent": measure.percent,
                "why": why,
            }
        )
        return measure

    def _outrun(self) -> str:
        span = STEP_ROUNDS + 1 if self._step else EARLY_ROUNDS if self._allow == {POST_COPY} else ROUNDS
        recent = list(self._rounds)[-span:]
        needs = [need for _, _, need in recent]
        # A guest that is being slowed is not left to hover: the sooner it is through, the less it loses.
        reach = SLOWED_REACH if self._step else REACH
        if len(recent) < span or min(needs) <= reach * self._downtime_s or needs[-1] < PROGRESS * needs[0]:
            return ""
        return (
            f"in {span} rounds what is left has not become less: the link would need {needs[-1]:.1f} s for it, "
            f"and {self._downtime_s * 1000:.0f} ms of downtime are asked for"
        )

    def _hovers(self, reading: Reading) -> str:
        if self._within is None:
            return ""
        first, since = self._within
        seconds = reading.now - since
        # One that is being slowed is judged by its last step.
        if self._step:
            seconds = min(seconds, reading.now - self._judged_at)
        if seconds < (2 * STEP_S if self._step else HOVER_S) or reading.rounds - first < HOVER_ROUNDS:
            return ""
        need = need_s(reading)
        if need <= self._downtime_s:
            return (
                f"for {seconds:.0f} s what is left of its memory has been small enough, and its disk has not come to "
                "rest: it writes to it about as fast as the link carries"
            )
        return (
            f"for {seconds:.0f} s what is left has hovered around {need:.1f} s of link, with "
            f"{self._downtime_s * 1000:.0f} ms of downtime asked for: what it writes to memory and disk together is "
            "about what the link carries"
        )

    def _late(self, reading: Reading) -> str:
        if not self._deadline or len(self._rounds) < 3:
            return ""
        seconds, left = self.outlook(reading).seconds, self._deadline - reading.now
        # What only hovers within the gate's reach may be let through at any round: there is no trend to go by.
        hovers = self._rounds[-1][2] <= REACH * self._downtime_s
        if seconds <= left or (hovers and left > self._for_measures_s()):
            return ""
        when = "never" if seconds == float("inf") else f"in {seconds:.0f} s"
        return f"as things go it would be there {when}, and {max(0.0, left):.0f} s are left"

    def _for_measures_s(self) -> float:
        """Seconds to leave for what is still allowed; 0 where nothing is, for a refusal takes none."""
        return STEP_S * (len(self._steps()[self._step :]) + (POST_COPY in self._allow))

    def _steps(self) -> tuple[int, ...]:
        """By which this guest may be slowed, one after another."""
        if AUTO_CONVERGE not in self._allow:
            return ()
        return STEPS[:GENTLE] if POST_COPY in self._allow else STEPS

    def _next(self, why: str) -> Measure:
        steps = self._steps()
        if self._step < len(steps):
            self._step += 1
            return Measure(Kind.THROTTLE, steps[self._step - 1], why)
        if POST_COPY in self._allow:
            return Measure(Kind.POST_COPY, 0, why)
        return Measure(Kind.REFUSE, 0, why)


def advice(allow: Collection[str]) -> str:
    """What the operator could do about a refusal."""
    more = "" if AUTO_CONVERGE in allow else "allow its being slowed (--allow auto-converge), "
    more += "" if POST_COPY in allow else "allow it to go before its memory (--allow post-copy), "
    return f"{more}ask for a longer downtime, hand it over when it writes less, or use a faster link"
