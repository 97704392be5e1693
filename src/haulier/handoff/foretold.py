"""The forecast that belongs to a handoff, and the pace that a site has learnt from its own.

A plan that the operator made for the same guest and target a short while ago is the forecast; else the worker makes one
from a small sample while it waits for the target. Either stands in the report, beside what happened.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.agent.site import Site
from haulier.chunks.blocks import StoreBlockFinder
from haulier.durable import write_atomically
from haulier.errors import UNDECODABLE
from haulier.handoff import forecast, retained, sampling
from haulier.handoff.adapting import level_at
from haulier.handoff.forecast import MOST_REMEMBERED, Pace, Took
from haulier.handoff.messages import Job
from haulier.handoff.residence import guest_paths

log = logging.getLogger(__name__)
FRESH_S: Final = 900.0
RUNS: Final = 64
LOOKS_S: Final = 0.3


def _kept(site: Site, guest: str) -> Path:
    return site.guest_root(guest) / "plan.json"


def _past(site: Site) -> Path:
    return site.root / "pace.json"


def keep_plan(site: Site, plan: dict[str, Any]) -> None:
    """Beside the guest, until it goes or another is made."""
    with contextlib.suppress(OSError):
        write_atomically(_kept(site, plan["guest"]), msgspec.json.encode({"at": time.time(), "plan": plan}), 0o600)


def planned(site: Site, job: Job) -> dict[str, Any] | None:
    """The operator's plan for that handoff, if it is fresh."""
    try:
        kept = msgspec.json.decode(_kept(site, job.guest).read_bytes(), type=dict[str, Any])
        plan = kept["plan"]
        if plan["target"] == job.peer and 0 <= time.time() - kept["at"] < FRESH_S and not plan.get("reasons"):
            return {key: plan[key] for key in ("bytes", "seconds", "downtime_ms", "rate_bps", "mode", "converges")} | {
                "made": "plan",
                "age_s": round(time.time() - kept["at"], 1),
            }
    except (OSError, *UNDECODABLE, KeyError, TypeError):
        pass
    return None


def pace(site: Site) -> Pace:
    """As the last handoffs from here went."""
    return forecast.learn(_remembered(site))


def _remembered(site: Site) -> list[Took]:
    try:
        return msgspec.json.decode(_past(site).read_bytes(), type=list[Took])
    except (OSError, *UNDECODABLE):
        return []


def remember(site: Site, report: dict[str, Any], memory_bytes: int) -> None:
    """Learns from a handoff that is done."""
    took = Took(
        memory_bytes=memory_bytes,
        wire=report["wire"]["sent"] + report["wire"]["received"],
        rate_bps=report["rate_bps"],
        rtt_s=report["rtt_s"],
        total_s=report["total_s"],
        downtime_s=report["downtime_ms"] / 1000,
    )
    with contextlib.suppress(OSError):
        past = [*_remembered(site), took][-MOST_REMEMBERED:]
        write_atomically(_past(site), msgspec.json.encode(past), 0o600)


def small(
    site: Site, job: Job, uuid: str, picture: str, finder: StoreBlockFinder, rate_bps: float, rtt_s: float
) -> dict[str, Any]:
    """A forecast of memory alone from a small sample."""
    base = retained.open_base(site, job.guest, uuid, picture)
    ram = guest_paths(site, job.guest).ram
    level = job.options.level or level_at(site, rate_bps)
    found = sampling.memory(ram, base, finder, level, runs=RUNS, looks_s=LOOKS_S)
    return forecast.make(found, rate_bps, rtt_s, pace(site), level) | {"made": "small sample"}


def told(made: dict[str, Any] | None, report: dict[str, Any]) -> dict[str, Any]:
    """What the report says of it: the forecast, and what happened over it."""
    if made is None:
        return {}
    wire = report["wire"]["sent"] + report["wire"]["received"]
    came = forecast.compare(made, wire, report["total_s"], report["downtime_ms"])
    return {"forecast": made, "came_true": came}
