"""The source of a guest that runs at the target before its memory is whole: its QEMU only gives pages any more."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from haulier.errors import Corrupt, GuestError, HaulierError
from haulier.guests.qemu import Qemu
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.memory_link import MemoryPump
from haulier.handoff.messages import Filled
from haulier.handoff.progress import Progress
from haulier.memory.base import MemoryBase
from haulier.memory.proxy import Broken, SourceProxy
from haulier.memory.salvage import salvage

log = logging.getLogger(__name__)

WHOLE_S = 10.0
"""How long QEMU may take to say that it is done after it has closed its stream."""


def remember(journal: Journal, handoff: str, proxy: SourceProxy) -> None:
    """Notes, durably, what a stream that goes on after a break does not say again."""
    note(journal, handoff, blocks=proxy.parser.blocks, ids=proxy.parser.ids)


def note(journal: Journal, handoff: str, **facts: Any) -> None:
    """Adds to what the journal says of the post-copy, for workers that may have to go on with it."""
    with journal.transaction():
        detail = journal.handoff(handoff).detail
        journal.update_handoff(handoff, detail={**detail, "post_copy": {**detail.get("post_copy", {}), **facts}})


def remembered(row: HandoffRow) -> Broken:
    """What `remember` noted. Corrupt if it did not."""
    found = row.detail.get("post_copy")
    try:
        assert isinstance(found, dict)
        blocks = {str(name): int(size) for name, size in found["blocks"].items()}
        return Broken(blocks, tuple(int(number) for number in found["ids"]))
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        raise Corrupt(f"handoff {row.id} says nothing of its post-copy: it cannot be gone on with") from None


def picture_of(mirror: Path) -> MemoryBase | None:
    """What a worker that is gone had in its mirror of this post-copy; None if nothing can be made of it.

    The other site's may differ from it: they are to be compared. The file has no name any more, and goes with the base.
    """
    try:
        # Without the picture that it began with: pages that are still as they are there, QEMU does not send again.
        salvage(mirror, None)
        return MemoryBase.from_mirror(mirror)
    except (OSError, HaulierError) as error:
        log.info("what the worker before knew of the memory is lost: %s", error)
        return None
    finally:
        mirror.unlink(missing_ok=True)


def check_whole(qemu: Qemu, mark: int) -> None:
    """QEMU has closed its stream: GuestError unless all of the memory was sent."""
    with contextlib.suppress(GuestError):
        states = {"completed", "postcopy-paused"}
        if qemu.wait_migration(states, WHOLE_S, since=mark).data["status"] == "completed":
            return
    reason = qemu.query_migrate().get("error-desc", "it gives no reason")
    raise GuestError(f"QEMU's post-copy of {qemu.spec.name!r} is interrupted: {reason}")


def observe(qemu: Qemu, progress: Progress, pump: MemoryPump) -> None:
    """What is left of the memory, for the status."""
    with contextlib.suppress(HaulierError):
        left = int(qemu.query_migrate().get("ram", {}).get("remaining", 0))
        ratio = pump.wire / pump.raw if pump.raw > 1 << 20 else 0.3
        progress.left(0, int(left * ratio))
    served = pump.post_copy
    if served is not None:
        progress.status.message = (
            f"the guest runs at {progress.status.target} and has asked for {served.requests} pages; the rest follows"
        )


def figures(pump: MemoryPump, filled: Filled | None, marks: Mapping[str, float]) -> dict[str, Any]:
    """For the report: pages that the guest asked for and that were sent first, what it waited, how long it took."""
    served = pump.post_copy
    found: dict[str, Any] = {
        "requested_pages": served.requests if served is not None else 0,
        "pushed_pages": served.pushed if served is not None else 0,
        "worst_wait_ms": None,
        "mean_wait_ms": None,
    }
    if pump.urgent is not None:
        carried = pump.urgent
        found["urgent"] = {"raw_bytes": carried.raw, "wire_bytes": carried.wire, "referred_pages": carried.referred}
    if filled is not None:
        found |= {"worst_wait_ms": round(filled.worst_ms, 1), "mean_wait_ms": round(filled.mean_ms, 1)}
        found["requested_pages"] = max(found["requested_pages"], filled.requests)
    if "whole" in marks and "running" in marks:
        found["seconds"] = round(marks["whole"] - marks["running"], 3)
    return found
