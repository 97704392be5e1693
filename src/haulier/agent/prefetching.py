"""Prefetches as the agent sees them: begun, and ended before anything else is done with the guest."""

from __future__ import annotations

import signal
import time
from typing import Final

from haulier.agent.core import Core
from haulier.errors import Conflict, UsageError
from haulier.handoff import spawning
from haulier.handoff.custody import record_of
from haulier.handoff.journal import HandoffRow, new_handoff_id
from haulier.handoff.messages import Job, Options
from haulier.handoff.ownership import State

ENDED_S: Final = 20.0
LEAST_FRESH_S: Final = 1.0


def live(core: Core, guest: str) -> list[HandoffRow]:
    """Prefetches of that guest that are under way at this site, as source or as target."""
    return [row for row in core.journal.handoffs(guest=guest, live=True) if row.role in spawning.PREFETCH]


def end_here(core: Core, guest: str) -> None:
    """Ends those, and waits until what they sent is kept. Conflict if one does not end."""
    rows = live(core, guest)
    for row in rows:
        core.journal.update_handoff(row.id, detail={**row.detail, "cancel": True})
        row.worker.signal(signal.SIGTERM)
    deadline = time.monotonic() + ENDED_S
    while rows:
        # A worker that died is the supervisor's; one that lives ends by itself.
        rows = live(core, guest)
        if rows and time.monotonic() > deadline:
            raise Conflict(f"prefetch {rows[0].id} of guest {guest!r} does not end: see its worker.log, and try again")
        if rows:
            time.sleep(0.02)


def start(core: Core, guest: str, to: str, options: Options) -> Job:
    """Begins one; what this site can know is refused at once."""
    if to == core.site.name:
        raise UsageError(f"guest {guest!r} is at {to!r} already, which is this site: name another")
    peer = core.known_site(to)
    if options.keep_fresh_s and not LEAST_FRESH_S <= options.keep_fresh_s <= 86400:
        raise UsageError(f"a prefetch is kept fresh every 1 s to 24 h, not every {options.keep_fresh_s:g} s")
    row = core.journal.guest(guest)
    end_here(core, guest)
    with core.alone(guest, "beginning a prefetch"):
        if record_of(core.journal.guest(guest)).state is not State.OWNER or core.journal.handoffs(guest, live=True):
            raise Conflict(f"guest {guest!r} is not this site's, or is being handed over: see 'haulier status'")
        if row.wanted != "running":
            raise Conflict(f"guest {guest!r} is {row.wanted}: only a running guest can be prefetched")
        job = Job(handoff=new_handoff_id(), role=spawning.PREFETCH_SOURCE, guest=guest, peer=peer.name, options=options)
        core.children.append(spawning.start_source(core.site, core.journal, job))
    return job
