"""`haulier relay`: plain TCP to clients, MPTCP to a guest."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from haulier.cli.common import GuestName
from haulier.guests.model import check_name
from haulier.network.relay import Relay, prepare_host


def relay(
    guest: GuestName,
    /,
    *,
    listen: Annotated[str, Parameter(help="Where clients connect, for example 0.0.0.0:443.")],
    to: Annotated[str, Parameter(help="The guest's address of its site, and the port of its service.")],
    directory: Annotated[Path, Parameter(help="For the configuration and the socket.")] = Path("/run/haulier-relay"),
    show: Annotated[bool, Parameter(negative="", help="Print HAProxy's configuration, and run nothing.")] = False,
) -> None:
    """Run HAProxy at this host, an edge gateway: clients of plain TCP keep their connections when the guest moves.

    It needs no agent. It stays in the foreground; Ctrl-C ends it, and its connections.
    """
    made = Relay(check_name(guest), listen, to, directory.absolute())
    if show:
        print(made.config(), end="")
        return
    command = made.command()
    made.write()
    for said in prepare_host():
        print(f"haulier: {said}", file=sys.stderr)
    print(f"relaying {listen} to guest {guest} at {to}; its runtime API is {made.socket}", flush=True)
    os.execv(command[0], command)
