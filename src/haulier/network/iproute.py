"""`ip` and `bridge` of iproute2, in the network namespace of the caller."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from haulier import tools
from haulier.errors import GuestError, HaulierError, Unsupported

PATIENCE_S: Final = 20.0


def run(words: Sequence[str], given: str | None = None) -> str:
    """Runs a command of iproute2; its output. HaulierError with what it said, Unsupported if it is not installed."""
    try:
        done = tools.run(words, given, timeout_s=PATIENCE_S, env=tools.environment() | {"LC_ALL": "C"})
    except Unsupported:
        raise Unsupported(f"{words[0]} is not installed: install iproute2") from None
    except GuestError as error:
        raise HaulierError(str(error)) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-300:]
        shown = given.strip().replace("\n", "; ") if given else ""
        raise HaulierError(f"{' '.join(words)} failed ({said}){': ' + shown[:500] if shown else ''}")
    return done.stdout


def batch(lines: Sequence[str], *options: str) -> None:
    """Lines of `ip`, one process for all, up to the first that fails."""
    if lines:
        run(["ip", *options, "-batch", "-"], "\n".join(lines) + "\n")


def facts(*words: str) -> list[dict[str, Any]]:
    """What `ip -j WORDS` tells; empty entries left out."""
    found = json.loads(run(["ip", "-j", *words]) or "[]")
    return [entry for entry in found if isinstance(entry, dict) and entry]
