"""The table of verbs, and how errors become exit codes. Verbs are imported when they are used."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Final

from cyclopts import App, CycloptsError
from rich.console import Console

import haulier
from haulier.errors import HaulierError, NoRoom, UsageError

INTERRUPTED: Final = 130
"""What shells expect of a process that Ctrl-C ended."""

app = App(
    name="haulier",
    help="Hands running virtual machines from one edge site to another over slow links.",
    version=haulier.__version__,
)

VERBS: Final = {
    "agent": ("haulier.cli.agent:agent", "Run the daemon of this site."),
    "coordinator": ("haulier.cli.coordinator:coordinator_app", "Run or ask the coordinator: who holds what."),
    "site": ("haulier.cli.site:site_app", "Make a site, join a fleet, list its sites."),
    "image": ("haulier.cli.image:image_app", "Import images and make golden snapshots of them."),
    "guest": ("haulier.cli.guest:guest_app", "Run, list, stop and remove guests."),
    "plan": ("haulier.cli.plan:plan", "Say what a handoff would send and take, before anything moves."),
    "handoff": ("haulier.cli.handoff:handoff", "Hand a running guest to another site."),
    "prefetch": ("haulier.cli.prefetch:prefetch", "Send a guest's data ahead, so that its handoff is short."),
    "status": ("haulier.cli.status:status", "Show handoffs, running and past."),
    "fill": ("haulier.cli.fill:fill", "Bring what a guest left behind elsewhere."),
    "release": ("haulier.cli.fill:release", "Keep what a guest left behind no longer."),
    "cancel": ("haulier.cli.cancel:cancel", "Cancel a handoff; the guest runs on where it is."),
    "verify": ("haulier.cli.verify:verify", "Check a guest's disk, chunk by chunk."),
    "cache": ("haulier.cli.cache:cache_app", "The cache's budget and policy, and what is in it."),
    "gc": ("haulier.cli.gc:gc", "Free what nothing refers to and the cache has no room for."),
    "scrub": ("haulier.cli.scrub:scrub", "Read all chunks again, and heal what has decayed."),
    "calibrate": ("haulier.cli.calibrate:calibrate", "Measure what compression costs on this host."),
    "doctor": ("haulier.cli.doctor:doctor", "Say what this host can do, and what is wrong."),
    "relay": ("haulier.cli.relay:relay", "Run an edge gateway for clients that do not speak MPTCP."),
    "lab": ("haulier.cli.lab:lab_app", "Sites as network namespaces with shaped links, on this machine."),
}
for _name, (_where, _help) in VERBS.items():
    app.command(_where, name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb and exits: 0 when it worked, otherwise the error's own code (docs/cli.md)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        code = _fail(UsageError(f"{str(error).strip()} (see 'haulier {_verb(words)}--help')"), words)
    except HaulierError as error:
        code = _fail(error, words)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # the reader of a listing left; what is still buffered must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        code = _fail(refused(error), words)
    sys.exit(code if isinstance(code, int) else 0)


def refused(error: OSError) -> HaulierError:
    """What the system would not do, and what helps, where nobody nearer to it knew better."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if error.errno in (errno.EACCES, errno.EPERM):
        return HaulierError(f"{what}: run haulier as root, or as the user whose site it is")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"{what}: make room there")
    return HaulierError(f"{what}: see what is there, and give another path or host if that is not it")


def _verb(words: Sequence[str]) -> str:
    known = [word for word in words[:1] if word in VERBS]
    return "".join(f"{word} " for word in known)


def _fail(error: HaulierError, words: Sequence[str]) -> int:
    if "--json" in words:
        print(json.dumps({"error": str(error), "code": error.exit_code}), flush=True)
    else:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]haulier:[/] {_escape(str(error))}", highlight=False)
    return error.exit_code


def _escape(text: str) -> str:
    from rich.markup import escape

    # what a peer or a guest said must not steer the terminal
    return escape("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
