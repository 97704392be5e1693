"""`haulier prefetch`: send a guest's data ahead of its handoff."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from haulier.cli import handoff
from haulier.cli.common import GuestName, Json, Root, client, parse_seconds


def prefetch(
    guest: GuestName,
    /,
    *,
    to: Annotated[str, Parameter(help="The site that the guest will go to.")],
    keep_fresh: Annotated[
        str, Parameter(help="Send what has changed again every so often (30s, 2m), until it is cancelled.")
    ] = "",
    through: Annotated[str, Parameter(help="Other sites that carry a part of it: porto, or porto,bergen.")] = "",
    detach: Annotated[bool, Parameter(negative="", help="Do not wait for the end.")] = False,
    root: Root = None,
    json: Json = False,
) -> int:
    """Send a running guest's data to another site, so that its handoff takes seconds. The guest stays here.

    Ctrl-C ends it; what was sent is kept at both sites under a budget and an age. A handoff ends it too."""
    agent = client(root)
    options: dict[str, Any] = {"keep_fresh_s": parse_seconds(keep_fresh)} if keep_fresh else {}
    options |= {"through": handoff.words(through)}
    body = {"guest": guest, "to": to, "options": options}
    return handoff.run(agent, lambda: agent.post("/v1/prefetches", body), detach=detach, json=json)
