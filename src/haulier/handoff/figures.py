"""What a source's report says of any handoff, whatever moves: times by the marks, bytes by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from haulier.disks.sending import DiskSender
from haulier.images.layers import INSTANCE, Split


def times(marks: Mapping[str, float], done: float, check_s: float, names: Sequence[str]) -> dict[str, Any]:
    """Of the marks, which are times of this host's clock in seconds: "begin", "stop", perhaps "running", and others.

    `done`: when the source was released. `check_s` of a check that was asked for is not downtime. `names`: which marks
    the report tells of the switchover, in milliseconds after the stop.
    """
    begin, stop, running = marks["begin"], marks["stop"], marks.get("running", done)
    return {
        "total_s": round(running - begin, 4),
        "until_released_s": round(done - begin, 4),
        "downtime_ms": round((running - stop - check_s) * 1000, 1),
        "check_ms": round(check_s * 1000, 1),
        "stopped_at": stop,
        "running_at": running,
        "switchover_ms": {key: round((marks[key] - stop) * 1000, 1) for key in names if key in marks},
    }


def by_layer(split: Split, sender: DiskSender, state_bytes: int) -> dict[str, dict[str, int]]:
    """How large each layer of the disk is and what was sent of it; the guest's state counts as instance."""
    sizes = split.sizes(sender.manifest.unique())
    found = {name: {"bytes": size, **asdict(sender.layers[name])} for name, size in sizes.items()}
    found[INSTANCE]["memory_wire_bytes"] = state_bytes
    return found
