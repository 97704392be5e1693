"""How much memory a handoff's worker takes."""

from __future__ import annotations

from pathlib import Path

from haulier.handoff import sparsefile


def footprint(mirror: Path, smaps: Path = Path("/proc/self/smaps_rollup")) -> dict[str, int]:
    """Bytes: `anonymous`, the process's own; `mirror`, what its mirror's file takes of the tmpfs.

    Pages of base and golden snapshot are page cache, shared with everybody who maps them, and are not counted.
    """
    own = 0
    try:
        for line in smaps.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "Anonymous":
                own = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        own = 0
    return {"anonymous": own, "mirror": sparsefile.size(mirror)}
