"""What ended of a long run, kept in a folder: a run that was interrupted goes on with what is missing."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.model import Experiment, from_dict


class Enough(Exception):
    """As many units as were asked for have run; more are left."""


class Parts:
    """`folder`: where they are kept (None: nowhere). `steps`: units that may be run now (0: all)."""

    def __init__(self, folder: Path | None = None, steps: int = 0) -> None:
        self.folder, self._steps, self._run = folder, steps, 0

    def do(self, name: str, unit: Callable[[], Experiment]) -> Experiment:
        """What was kept of the unit `name`, else what it finds now. Raises Enough."""
        return from_dict(self.facts(name, lambda: unit().as_dict()))

    def kept(self, name: str) -> Any:
        """What was kept under that name; None if nothing was."""
        path = self.path(name)
        return json.loads(path.read_text()) if path is not None and path.exists() else None

    def facts(self, name: str, unit: Callable[[], Any]) -> Any:
        """The same for a unit that finds what JSON can hold, and not null. What raises is not kept."""
        if (old := self.kept(name)) is not None:
            return old
        if self.spent:
            raise Enough(name)
        self._run += 1
        found = unit()
        if (path := self.path(name)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps(found))
            temporary.rename(path)
        return found

    @property
    def spent(self) -> bool:
        """As many units as were asked for have run."""
        return bool(self._steps) and self._run >= self._steps

    def attempt(self, name: str, unit: Callable[[], Any], notes: list[str]) -> Any:
        """As `facts`; None for what is left for another run, or failed: the run goes on, and `notes` says so."""
        try:
            return self.facts(name, unit)
        except Enough:
            notes.append(f"not run yet: {name}")
        except Exception as error:
            traceback.print_exc()
            notes.append(f"failed: {name}: {type(error).__name__}: {error}")
        return None

    def path(self, name: str) -> Path | None:
        if self.folder is None:
            return None
        readable = "".join(letter if letter.isalnum() else "-" for letter in name)[:60]
        return self.folder / f"{readable}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}.json"


def chosen(name: str, only: Sequence[str]) -> bool:
    """Whether one of the patterns is that of a cell, A/B/C; a pattern may leave out what follows. No patterns: all."""
    padded = (pattern + "/*" * (name.count("/") - pattern.count("/")) for pattern in only)
    return not only or any(fnmatch.fnmatch(name, pattern) for pattern in padded)


def joined(whole: Experiment, some: Iterable[Experiment]) -> Experiment:
    """`whole` with all that its units found."""
    for one in some:
        whole.rows += one.rows
        whole.handoffs += one.handoffs
        whole.bars += one.bars
        whole.checks += one.checks
        whole.targets += one.targets
        whole.notes += one.notes
        whole.seconds += one.seconds
    return whole
