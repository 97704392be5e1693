"""Has the memory codec follow link and CPU while a handoff runs: feeds the controller, and takes what it decides.

One thread, the pump's. What the link takes is what was acknowledged, and counts as all it takes only while something
waited for it; the CPU that is left is the part of its wall time in which the codec's thread really ran.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from haulier.agent.site import Site
from haulier.compress import profile as profiles
from haulier.compress.controller import DEFAULT, Choice, Controller, Link, Profile, Share, choose
from haulier.durable import write_atomically
from haulier.errors import HaulierError
from haulier.memory.proxy import LEAST_PACKED, SourceProxy

log = logging.getLogger(__name__)
MOST_CHANGES: Final = 200
ENDING_LEVEL: Final = 5


def profile_path(site: Site) -> Path:
    return site.root / "profile.json"


def profile_of(site: Site) -> Profile:
    """What `haulier calibrate` measured here, or what haulier comes with."""
    try:
        return profiles.decode(profile_path(site).read_bytes())
    except FileNotFoundError:
        return DEFAULT
    except (OSError, HaulierError) as error:
        log.warning("%s", error)
        return DEFAULT


def keep_profile(site: Site, profile: Profile) -> None:
    write_atomically(profile_path(site), profiles.encode(profile))


def level_at(site: Site, rate_bps: float) -> int:
    """The level that a handoff from this site begins with on such a link."""
    return choose(profile_of(site).frontier(), max(rate_bps, 1.0) / 8, site.cpu_cap or 1.0).level


class Adapting:
    """The controller of one handoff. `choice` is what is in use; `report` tells how it came to that."""

    def __init__(self, profile: Profile, rate_bps: float, cap: float = 0.0) -> None:
        self._link = Link(rate_bps / 8)
        self._controller = Controller(profile, rate_bps / 8, 1.0, cap)
        self._began = time.monotonic()
        self._cap = cap
        self._share = Share()
        self._plain = self._wire = 0
        self._cpu_s = 0.0
        self._worked_s = 0.0
        self.choice: Choice = self._controller.begin(0.0)

    @property
    def level(self) -> int:
        return self.choice.level

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around what encodes: how much of the time its thread ran. Keeps to the operator's cap."""
        wall, cpu = time.monotonic(), time.thread_time()
        yield
        wall, cpu = time.monotonic() - wall, time.thread_time() - cpu
        self._worked_s += cpu
        self._share.note(cpu, wall)
        if self._cap and cpu > self._cap * wall:
            time.sleep(cpu / self._cap - wall)

    def step(
        self,
        proxy: SourceProxy,
        rate_bps: float,
        full: bool,
        waiting: int,
        *,
        left_s: float = math.inf,
        ending: bool = False,
    ) -> None:
        """Between two batches: takes note of what the last ones cost, and changes the level where that pays.

        `full`: the link has enough to do; `left_s`: seconds until it has nothing; `waiting`: bytes that are not
        acknowledged yet. Near the end a batch is part of the downtime, so a slow level gives way to a quick one.
        """
        if ending:
            if proxy.level > ENDING_LEVEL:
                proxy.set_level(ENDING_LEVEL)
            return
        counters = proxy.counters
        plain, wire = counters.plain_bytes - self._plain, counters.wire_bytes - self._wire
        # Of what is small no mode can be judged: headers and calls are what it costs.
        if plain >= LEAST_PACKED and proxy.level == self.choice.level:
            cpu_s = counters.compress_s - self._cpu_s
            self._controller.note(plain, wire, cpu_s, max(0.0, self._worked_s - cpu_s))
        self._plain, self._wire, self._cpu_s = counters.plain_bytes, counters.wire_bytes, counters.compress_s
        self._worked_s = 0.0
        if (levels := self._controller.due(full)) and len(proxy.recent) > 1:
            earlier, last = proxy.recent
            self._controller.learn(profiles.trial(levels, earlier, last))
        link = self._link.note(rate_bps / 8, full, waiting)
        before = self.choice.level
        self.choice = self._controller.decide(time.monotonic() - self._began, max(link, 1.0), self._share.known)
        if self.choice.level != before:
            log.info("%s", self.choice.reason)
        filler = self._controller.filler(left_s)
        proxy.set_level(self.choice.level if filler is None else filler)

    def report(self) -> dict[str, Any]:
        """For the report and `status --explain`: each change with its time and reason, and what was learnt."""
        controller = self._controller
        return {
            "level": self.choice.level,
            "why": self.choice.reason,
            "limit": self.choice.limit,
            "calibrated": controller.profile.made,
            "cpu_share": round(self._share.known, 3),
            "changes": [
                {"at": round(at, 2), "level": choice.level, "why": choice.reason}
                for at, choice in controller.changes[:MOST_CHANGES]
            ],
            "content": {
                "speed": round(controller.content.speed, 3),
                "ratio": round(controller.content.ratio, 3),
                "encode_ns": round(controller.encode * 1e9, 2),
                "trials": controller.trials,
            },
            "learnt": {
                str(level): {"speed": round(fix.speed, 3), "ratio": round(fix.ratio, 3)}
                for level, fix in sorted(controller.fixes.items())
            },
        }
