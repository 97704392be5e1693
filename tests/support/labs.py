"""Labs for tests: `with lab(text) as made: ...`, names that never collide, leftovers of killed runs removed."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from haulier.lab.lab import Lab, take_down

_serial = itertools.count(1)
_NAME = re.compile(r'^name\s*=\s*"([a-z0-9-]{1,16})"', re.MULTILINE)


def own_name(topology_text: str) -> str:
    """The text with the lab's name (its first line `name = ...`; none = "test") made this process's own."""
    match = _NAME.search(topology_text)
    body = topology_text
    stem = "test"
    first_table = topology_text.find("[[")
    if match and (first_table < 0 or match.start() < first_table):
        stem = match[1]
        body = topology_text[: match.start()] + topology_text[match.end() :]
    return f'name = "{stem}-p{os.getpid()}-{next(_serial)}"\n{body}'


def sweep() -> None:
    """Takes down labs of test processes that are gone (killed)."""
    for name in Lab.names():
        owner = re.search(r"-p([0-9]+)-[0-9]+$", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            take_down(name)


@contextmanager
def lab(topology_text: str, *, backend: str | None = None) -> Iterator[Lab]:
    """Brings a lab up from TOML text and takes it down at the end, whatever happened. Its real name is `made.name`."""
    sweep()
    made = Lab.up(own_name(topology_text), backend=backend)
    try:
        yield made
    finally:
        made.down()
