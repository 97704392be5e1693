"""Parts of haulier that an experiment can switch off, to see what each earns: ``HAULIER_WITHOUT=recipes,order``.

Read by the worker at a handoff's source, `direct` by the one at its target; whatever is off, the target gets the same
guest, by more bytes or later.
"""

from __future__ import annotations

import os
from typing import Final

VARIABLE: Final = "HAULIER_WITHOUT"
RECIPES: Final = "recipes"
"""Chunks that the target lacks as lists of 4 KiB blocks that it has."""
DISK_FIRST: Final = "disk-first"
"""Memory waits until what the disk has more than its layers is there, and refers to that."""
ORDER: Final = "order"
"""Chunks that change again and again held back until the last round."""
DIRECT: Final = "direct"
"""Pages written into the memory of the target's QEMU beside its stream."""
PARTS: Final = (RECIPES, DISK_FIRST, ORDER, DIRECT)


def without(part: str) -> bool:
    """Is this part switched off? ValueError for a part that is none."""
    if part not in PARTS:
        raise ValueError(part)
    return part in os.environ.get(VARIABLE, "").split(",")
