"""Programs of the host, run to their end: what keeps one from it is an error like any other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

from haulier.errors import GuestError, Unsupported

PATIENCE_S: Final = 30.0


def run(
    words: Sequence[str],
    given: str | None = None,
    *,
    timeout_s: float = 0.0,
    env: Mapping[str, str] | None = None,
    stdout: int = subprocess.PIPE,
    stderr: int | IO[Any] = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Runs a program, with `given` on its standard input; what it said and its exit code are the caller's to look at.

    `timeout_s`: 0 = `PATIENCE_S`; `env`: None = `environment()`. Raises Unsupported if it is not installed, GuestError
    if it cannot be started or does not end in time; it is killed then.
    """
    patience_s = timeout_s or PATIENCE_S
    try:
        return subprocess.run(
            list(words),
            input=given,
            stdin=subprocess.DEVNULL if given is None else None,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
            timeout=patience_s,
            check=False,
            env=environment() if env is None else env,
        )
    except subprocess.TimeoutExpired:
        raise GuestError(f"{' '.join(words)} did not end within {patience_s:g} s: see whether the host hangs") from None
    except FileNotFoundError:
        raise Unsupported(f"{words[0]} is not installed: run scripts/setup") from None
    except OSError as error:
        raise GuestError(f"{words[0]} cannot be run: {error}") from error


def environment() -> dict[str, str]:
    """This process's, with the directories of programs for root: an agent under systemd may have a PATH without."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
