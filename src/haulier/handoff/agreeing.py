"""Two sites agree on what a picture of memory holds that an earlier attempt left at both.

    S>T  Compare    digests of regions of the source's picture
    T>S  Unlike     numbers of the regions that differ, and digests of their pages at the target
    S>T  GiveUp     which of these pages differ: zero from now on, at both sites
    T>S  GivenUp    done; the stream may come

After that both pictures are equal, whatever was on its way when the attempt was cut, or decayed on a disk since.
"""

from __future__ import annotations

import numpy as np

from haulier.errors import Corrupt
from haulier.handoff.attempts import PREFIX
from haulier.handoff.control import Control
from haulier.handoff.messages import Compare, GivenUp, GiveUp, Unlike
from haulier.memory import salvage
from haulier.memory.base import MemoryBase

ANSWER_S = 120.0


def at_source(base: MemoryBase | None, picture: str, control: Control) -> int:
    """Makes the source's picture equal to the target's; how many pages were given up for that."""
    if base is None or not picture.startswith(PREFIX):
        return 0
    control.send(Compare(salvage.regions(base)))
    answer = control.wait(Unlike, ANSWER_S)
    numbers = np.frombuffer(answer.regions, "<u4").astype(np.int64)
    mine = np.frombuffer(salvage.pages_of(base, numbers), np.uint64)
    if len(answer.pages) != mine.nbytes:
        raise Corrupt("the other site compared another number of pages: run the same haulier at both sites")
    unlike = mine != np.frombuffer(answer.pages, np.uint64)
    given_up = salvage.give_up(base, numbers, unlike)
    control.send(GiveUp(np.packbits(unlike).tobytes()))
    control.wait(GivenUp, ANSWER_S)
    return given_up


class TargetComparison:
    """The target's end: an answer to each message, in turn."""

    def __init__(self, base: MemoryBase) -> None:
        self._base = base
        self._numbers: np.typing.NDArray[np.int64] | None = None
        self._pages = 0

    def compare(self, message: Compare) -> Unlike:
        self._numbers = salvage.differing(salvage.regions(self._base), message.regions)
        digests = salvage.pages_of(self._base, self._numbers)
        self._pages = len(digests) // 8
        return Unlike(self._numbers.astype("<u4").tobytes(), digests)

    def give_up(self, message: GiveUp) -> GivenUp:
        if self._numbers is None or len(message.pages) != -(-self._pages // 8):
            raise Corrupt("the source's messages came in a wrong order: run the same haulier at both sites")
        unlike = np.unpackbits(np.frombuffer(message.pages, np.uint8), count=self._pages).astype(np.bool_)
        salvage.give_up(self._base, self._numbers, unlike)
        return GivenUp()
