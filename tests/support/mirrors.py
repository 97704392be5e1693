"""What maps files of guest memory holds descriptors until it is closed, and tests make hundreds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror


@pytest.fixture(autouse=True)
def mirrors_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes every mirror and every base that a test has made."""
    made: list[Mirror | MemoryBase] = []
    for kind in (Mirror, MemoryBase):
        begin: Any = kind.__init__

        def noted(self: Mirror | MemoryBase, *words: Any, begin: Any = begin) -> None:
            begin(self, *words)
            made.append(self)

        monkeypatch.setattr(kind, "__init__", noted)
    yield
    for one in made:
        one.close()
