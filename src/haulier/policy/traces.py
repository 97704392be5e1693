"""Traces of image use, made by a stated and seeded generator, for want of published ones of edge sites.

Images: sizes drawn evenly from small to large in extents (16 MiB of disk by default) whose stored size is 30 to 100 %
of that; `shared` of an image's extents are those of its distribution, one of a few. Popularity: Zipf with exponent
`alpha` over images; every `drift` events two images swap ranks. An event is a guest that arrives: it wants the first
part of its image whole (boot, programs) and each later extent with probability `tail`. A share `scans` of events reads
all of an image that is never read again: a backup, a verification, somebody's build.

In a fleet each site has its own order of popularity, a blend: with probability `together` an event follows the common
order, else the site's own; and `return_rate` of the guests come from, and go back to, a neighbouring site (VeCycle,
Middleware 2015: 68 % of the VMs visit just two servers), so the same image is then wanted next door.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from haulier.policy.replay import Access
from haulier.units import MIB

EXTENT: Final = 16 * MIB


@dataclass(frozen=True)
class Catalogue:
    """Images as lists of (key, stored bytes). The head of a list is what every guest of the image reads."""

    images: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def bytes(self) -> int:
        """Of all extents, each counted once."""
        return sum({key: size for image in self.images for key, size in image}.values())


def catalogue(
    seed: int, images: int = 200, extents: tuple[int, int] = (8, 48), distributions: int = 4, shared: float = 0.3
) -> Catalogue:
    """Images of `extents` (least, most) extents; those of one distribution begin with the same ones."""
    dice = random.Random(seed)
    keys = itertools.count()

    def fresh(count: int) -> list[tuple[int, int]]:
        return [(next(keys), int(EXTENT * dice.uniform(0.3, 1.0))) for _ in range(count)]

    bases = [fresh(int(extents[1] * shared)) for _ in range(distributions)]
    made = []
    for number in range(images):
        count = dice.randint(*extents)
        base = bases[number % distributions][: int(count * shared)]
        made.append(tuple(base + fresh(count - len(base))))
    return Catalogue(tuple(made))


class Zipf:
    """Ranks from 0 with probability proportional to 1 / (rank + 1) ** alpha."""

    def __init__(self, count: int, alpha: float) -> None:
        self._sums = list(itertools.accumulate((rank + 1) ** -alpha for rank in range(count)))

    def draw(self, dice: random.Random) -> int:
        return bisect.bisect_left(self._sums, dice.random() * self._sums[-1])


def accesses(
    seed: int,
    images: Catalogue,
    events: int,
    *,
    sites: int = 1,
    alpha: float = 0.9,
    scans: float = 0.1,
    tail: float = 0.4,
    head: float = 0.4,
    drift: int = 200,
    together: float = 0.6,
    return_rate: float = 0.3,
    neighbours: int = 4,
) -> Iterator[Access]:
    """See the module. Time counts events. Sites are neighbours in groups of `neighbours`."""
    dice = random.Random(seed)
    count = len(images.images)
    zipf = Zipf(count, alpha)
    common = list(range(count))
    dice.shuffle(common)
    own = [dice.sample(common, count) for _ in range(sites)]
    fresh = itertools.count(1 << 40)
    for now in range(events):
        if drift and now % drift == drift - 1:
            one, other = zipf.draw(dice), dice.randrange(count)
            common[one], common[other] = common[other], common[one]
        site = dice.randrange(sites)
        if dice.random() < scans:
            for _, size in images.images[dice.randrange(count)]:
                yield Access(now, site, next(fresh), size)
            continue
        order = common if dice.random() < together else own[site]
        chosen = images.images[order[zipf.draw(dice)]]
        wanted = [extent for at, extent in enumerate(chosen) if at < head * len(chosen) or dice.random() < tail]
        for key, size in wanted:
            yield Access(now, site, key, size)
        if sites > 1 and dice.random() < return_rate:
            group = site - site % neighbours
            there = group + dice.randrange(min(neighbours, sites - group))
            for key, size in wanted:
                yield Access(now, there, key, size)
