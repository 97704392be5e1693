"""`haulier verify`: is what this site holds of a guest whole?"""

from __future__ import annotations

from haulier.agent.client import path_segment
from haulier.cli.common import GuestName, Json, Root, client, console, plain, print_json
from haulier.cli.progress import wait
from haulier.errors import Corrupt


def verify(guest: GuestName, /, *, root: Root = None, json: Json = False) -> int:
    """Check a guest's disk, chunk by chunk, and its overlay; also while it runs."""
    agent = client(root)
    found = wait(agent, agent.post(f"/v1/guests/{path_segment(guest)}/verify"), json)
    if json:
        print_json(found)
        return 0 if found["ok"] else Corrupt.exit_code
    if not found["ok"]:
        raise Corrupt(f"guest {guest!r}: {'; '.join(found['problems'])}")
    left = f", {found['chunks_elsewhere']} left elsewhere" if found.get("chunks_elsewhere") else ""
    console.print(
        plain(f"guest {guest} at {found['site']}: {found['chunks']} chunks right{left}, {found['status']}, all well"),
        highlight=False,
    )
    return 0
