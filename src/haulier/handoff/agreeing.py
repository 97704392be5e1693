"""Two sites agree on what a picture of memory holds that an earlier attempt left at both.

    S>T  Compare    digests of regions of the source's picture
    T>S  Unlike     numbers of the regions that differ, and digests of their pages at the target
    S>T  GiveUp     which of these pages differ: zero from now on, at both sites
    T>S  GivenUp    done; the stream may come

Where more than `salvage.MOST_UNLIKE` regions differ, no digests of pages go: all of the picture is given up. After
that both pictures are equal, whatever was on its way when the attempt was cut, or decayed on a disk since.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt
from haulier.handoff.attempts import PREFIX
from haulier.handoff.control import Control
from haulier.handoff.messages import Compare, GivenUp, GiveUp, Unlike
from haulier.memory import salvage
from haulier.memory.base import MemoryBase
from haulier.units import PAGE

ANSWER_S = 120.0


def at_source(base: MemoryBase | None, picture: str, control: Control) -> int:
    """Makes the source's picture equal to the target's; how many pages were given up for that."""
    if base is None or not picture.startswith(PREFIX):
        return 0
    control.send(Compare(salvage.regions(base)))
    answer = control.wait(Unlike, ANSWER_S)
    numbers = _numbers(answer.regions)
    if len(numbers) > salvage.MOST_UNLIKE:
        base.clear_all()
        control.send(GiveUp(b""))
        control.wait(GivenUp, ANSWER_S)
        return sum(base.blocks.values()) // PAGE
    mine = np.frombuffer(salvage.pages_of(base, numbers), np.uint64)
    if len(answer.pages) != mine.nbytes:
        raise Corrupt("the other site compared another number of pages: run the same haulier at both sites")
    unlike = mine != np.frombuffer(answer.pages, np.uint64)
    given_up = salvage.give_up(base, numbers, unlike)
    control.send(GiveUp(np.packbits(unlike).tobytes()))
    control.wait(GivenUp, ANSWER_S)
    return given_up


def _numbers(regions: bytes) -> NDArray[np.int64]:
    """Regions by number, as they stand in `Unlike`; Corrupt unless each stands there once and in order."""
    if len(regions) % 4 == 0:
        numbers = np.frombuffer(regions, "<u4").astype(np.int64)
        if (np.diff(numbers) > 0).all():
            return numbers
    raise Corrupt("the other site's list of regions of memory makes no sense: run the same haulier at both sites")


class TargetComparison:
    """The target's end: an answer to each message, in turn."""

    def __init__(self, base: MemoryBase) -> None:
        self._base = base
        self._numbers: NDArray[np.int64] | None = None
        self._pages = 0

    def compare(self, message: Compare) -> Unlike:
        found = salvage.differing(salvage.regions(self._base), message.regions)
        self._numbers = found[: salvage.MOST_UNLIKE + 1]
        if len(found) > salvage.MOST_UNLIKE:
            self._pages = 0
            return Unlike(self._numbers.astype("<u4").tobytes(), b"")
        digests = salvage.pages_of(self._base, self._numbers)
        self._pages = len(digests) // 8
        return Unlike(self._numbers.astype("<u4").tobytes(), digests)

    def give_up(self, message: GiveUp) -> GivenUp:
        if self._numbers is None or len(message.pages) != -(-self._pages // 8):
            raise Corrupt("the source's messages came in a wrong order: run the same haulier at both sites")
        if len(self._numbers) > salvage.MOST_UNLIKE:
            self._base.clear_all()
            return GivenUp()
        unlike = np.unpackbits(np.frombuffer(message.pages, np.uint8), count=self._pages).astype(np.bool_)
        salvage.give_up(self._base, self._numbers, unlike)
        return GivenUp()
