"""`haulier cancel`: stop a handoff; the guest runs on where it is."""

from __future__ import annotations

import time

from haulier.cli.common import Json, Root, client, console, plain, print_json
from haulier.errors import HandoffFailed

WAIT_S = 120.0
POLL_S = 0.2


def cancel(which: str, /, *, root: Root = None, json: Json = False) -> int:
    """Cancel a handoff and wait until it has ended. The guest runs on at its source.

    Parameters
    ----------
    which
        Id of the handoff, or name of the guest.
    """
    agent = client(root)
    now = agent.cancel(which)
    deadline = time.monotonic() + WAIT_S
    while now["state"] != "ended":
        if time.monotonic() > deadline:
            raise HandoffFailed(
                f"handoff {now['id']} has not ended within {WAIT_S:g} s: see 'haulier status {now['id']}'"
            )
        time.sleep(POLL_S)
        now = agent.handoff(str(now["id"]))
    if json:
        print_json(now)
    elif now["outcome"] == "done":
        console.print(plain(f"too late: guest {now['guest']} runs at {now['target']}"), highlight=False)
    else:
        console.print(
            plain(f"handoff {now['id']} is {now['outcome']}; {now['guest']} is at {now['source']}"), highlight=False
        )
    return HandoffFailed.exit_code if now["outcome"] == "done" else 0
