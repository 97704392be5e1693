"""`haulier calibrate`: measure what compression costs on this host."""

from __future__ import annotations

import time

from haulier.cli.common import Json, Root, load_site, print_json, print_table, size
from haulier.compress import profile as profiles
from haulier.compress.xz import name_of
from haulier.handoff.adapting import keep_profile, profile_path
from haulier.handoff.calibration import sample


def calibrate(*, root: Root = None, json: Json = False) -> None:
    """Measure how fast this host compresses guests' memory at each level. Takes some seconds of one core.

    Handoffs from this site choose their level by it. Run it when no handoff is under way, and again on other hardware.
    """
    site = load_site(root)
    pages, origin = sample(site)
    began = time.monotonic()
    profile = profiles.measure(pages, now=time.time())
    keep_profile(site, profile)
    facts = {
        "profile": str(profile_path(site)),
        "sample_bytes": len(pages),
        "sample_of": origin,
        "seconds": round(time.monotonic() - began, 2),
        "levels": [
            {"level": cost.level, "bytes_per_s": round(cost.speed), "ratio": round(cost.ratio, 4)}
            for cost in profile.costs
        ],
    }
    if json:
        print_json(facts)
        return
    print_table(
        ("MODE", "PAGES A SECOND", "BYTES BECOME"),
        [(name_of(cost.level), f"{size(cost.speed)}", f"{100 * cost.ratio:.1f} %") for cost in profile.costs],
    )
    print(f"measured in {facts['seconds']} s with {size(len(pages))} of {origin}")
