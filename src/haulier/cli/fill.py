"""`haulier fill` and `haulier release`: what an operator decides about data left behind."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from haulier.agent.client import path_segment
from haulier.cli.common import Json, Root, client, console, plain, print_json, size
from haulier.cli.progress import wait


def fill(
    guest: str,
    /,
    *,
    mode: Annotated[
        str, Parameter(help="full: all of it, now; background: as much as leaves the guest alone; off: what is read.")
    ] = "full",
    root: Root = None,
    json: Json = False,
) -> None:
    """Bring what a guest of this site left behind elsewhere; with the default mode, wait until all of it is here.

    Parameters
    ----------
    guest
        A guest that came with --disk on-demand.
    """
    agent = client(root)
    facts = wait(agent, agent.post(f"/v1/guests/{path_segment(guest)}/fill", {"mode": mode}), json)
    if json:
        print_json(facts)
        return
    left = int(facts["left_bytes"])
    text = f"all of guest {guest} is here" if not left else f"{size(left)} of guest {guest} are elsewhere ({mode})"
    console.print(plain(text), highlight=False)


def release(
    guest: str,
    /,
    *,
    force: Annotated[
        bool, Parameter(negative="", help="Let go of what this site keeps without asking: what is missing is lost.")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Have what a guest left behind no longer be kept for it. Refused while the guest lacks any of it.

    Parameters
    ----------
    guest
        A guest that went from here, or came here, with --disk on-demand.
    """
    facts = client(root).post(f"/v1/guests/{path_segment(guest)}/release", {"force": force})
    if json:
        print_json(facts)
    else:
        console.print(plain(f"nothing is kept for guest {guest} any more"), highlight=False)
