"""Pages to calibrate with: memory of this site's own golden snapshots, else this system's libraries."""

from __future__ import annotations

import contextlib
import sysconfig
from pathlib import Path
from typing import Final

from haulier.agent.site import Site
from haulier.errors import HaulierError, UnknownThing
from haulier.memory.base import MemoryBase
from haulier.units import MIB, PAGE

SAMPLE: Final = 12 * MIB
RUN: Final = 64


def sample(site: Site) -> tuple[bytes, str]:
    """Some megabytes of pages that are not zero, and what they are of. UnknownThing if this system has nothing."""
    for path in sorted(site.golden.glob("*/memory")) if site.golden.is_dir() else ():
        with contextlib.suppress(HaulierError, OSError):
            base = MemoryBase.from_mapped_ram(path)
            try:
                found = of_base(base)
            finally:
                base.close()
            if len(found) >= MIB:
                return found, "a golden snapshot's memory"
    found = _of_files(Path(sysconfig.get_paths()["stdlib"]))
    if len(found) < MIB:
        raise UnknownThing("there is nothing here to measure compression with: make a golden snapshot first")
    return found, "this system's libraries"


def of_base(base: MemoryBase) -> bytes:
    """Runs of pages, evenly spaced over the largest block."""
    name = max(base.blocks, key=lambda block: base.blocks[block])
    view = base.view(name)
    starts = [page for first, count in base.nonzero_runs(name) for page in range(first, first + count, RUN)]
    step = max(1, len(starts) * RUN * PAGE // SAMPLE)
    return b"".join(view[page : page + RUN].tobytes() for page in starts[::step])[:SAMPLE]


def _of_files(folder: Path) -> bytes:
    out, length = [], 0
    for path in sorted(folder.rglob("*")):
        if length >= SAMPLE:
            break
        if path.suffix in (".so", ".pyc", ".py") and path.is_file():
            with contextlib.suppress(OSError):
                data = path.read_bytes()
                out.append(data[: len(data) // PAGE * PAGE])
                length += len(out[-1])
    return b"".join(out)[:SAMPLE]
