"""`haulier gc`: free what nothing refers to."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from haulier.cli.common import Json, Root, client, print_json, print_table
from haulier.cli.progress import wait


def gc(
    *,
    dry_run: Annotated[bool, Parameter(negative="", help="Only say what would be freed.")] = False,
    everything: Annotated[bool, Parameter(name="--all", negative="", help="Also what the cache has room for.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Free chunks that no guest, image or handoff refers to, and that are not worth their room.

    With a store budget that is what is beyond it, and what was not used for a month. Without one it is what was not
    used for a month, and what does not even belong to a disk that moved away or to an image that was let go.
    """
    agent = client(root)
    found = wait(agent, agent.post("/v1/gc", {"dry_run": dry_run, "everything": everything}), json)
    if json:
        print_json(found)
        return
    rows: list[tuple[str, object]] = list(found["store"].items())
    rows += [("would go" if dry_run else "gone", name) for name in found["handoffs"]]
    print_table(("", ""), rows)
