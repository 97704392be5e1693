"""Belady's optimum: the bound that no policy passes, because it knows the future.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966: what is
used again last goes first. It is the optimum of the hit ratio when all sizes are equal, as those of chunks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from haulier.policy.model import Key
from haulier.policy.ranked import Ranked

_NEVER: Final = 1 << 62


def next_uses(keys: Sequence[Key]) -> list[int]:
    """For each access, the position of the next one of the same key; a huge number where there is none."""
    following: dict[Key, int] = {}
    found = [_NEVER] * len(keys)
    for at in range(len(keys) - 1, -1, -1):
        found[at] = following.get(keys[at], _NEVER)
        following[keys[at]] = at
    return found


def optimum(keys: Sequence[Key], sizes: Sequence[int], capacity: int) -> list[bool]:
    """Which accesses hit. What would go at once does not come in (with equal sizes: the exact optimum)."""
    ranked = Ranked()
    held: dict[Key, int] = {}
    used = 0
    hits: list[bool] = []
    for key, size, following in zip(keys, sizes, next_uses(keys), strict=True):
        hits.append(key in held)
        if key in held:
            ranked.set(key, -following)
            continue
        if size > capacity:
            continue
        held[key] = size
        used += size
        ranked.set(key, -following)
        while used > capacity:
            gone, _ = ranked.pop()
            used -= held.pop(gone)
    return hits
