"""How few bytes a guest's memory can become: what each technique of the page codec earns, and what is left to earn.

The still memory of four guests that were used (bench/used.py) goes through the real codec, with everything on and with
one technique taken away at a time. "full" is the golden snapshot and the base disk; "sent before" has the blocks of the
disk as well that were written since, as they are there when memory follows the disk. "limit" is the better of zstd -19
--long and xz -9e over what the page logic leaves of "full", offline; the ratio is "full" over that limit. The aims in
MB are the figures of the study that this repeats, and 15 %.

--only takes guests; with --parts FOLDER what ended is kept there; --steps N measures so many guests more.
"""

from __future__ import annotations

import lzma
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import used  # noqa: E402
from codec import Disk  # noqa: E402
from experiments.parts import Parts, chosen  # noqa: E402
from recorded import Batch, Recorder, encode_all  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.compress import StreamCompressor, xz  # noqa: E402
from haulier.memory import BlockFinder, MemoryBase  # noqa: E402
from haulier.memory.proxy import SourceProxy  # noqa: E402
from haulier.units import PAGE  # noqa: E402

LEVEL = xz.FIRST_LEVEL + 4
"""What the controller takes for links of up to about 10 Mbps, where a core is free."""
STRONGEST = xz.FIRST_LEVEL + 6
"""For slower ones."""
QUICK_LEVEL = 5
"""Of zstd: from about 50 Mbps on."""
AIMS = {"faces": (12, 12), "database": (42, 42), "web": (65, 1.2), "churn": (18, 2.7)}
"""MB of "full" and of "sent before"."""


class Both:
    """Blocks of the base, and blocks that were written since."""

    def __init__(self, base: BlockFinder | None, delta: BlockFinder | None) -> None:
        self._finders = [finder for finder in (base, delta) if finder is not None]

    def find(self, pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        found = np.full(len(pages), -1, np.int64)
        for finder in self._finders:
            rest = np.flatnonzero(found < 0)
            if len(rest):
                found[rest] = finder.find(np.ascontiguousarray(pages[rest]))
        return found


def encode(
    ram: Path, base: MemoryBase | None, finder: BlockFinder | None, level: int = LEVEL, *, record: bool = False
) -> tuple[int, list[Batch]]:
    """Bytes on the wire of all of it; with `record` what would go into zstd, at whatever level."""
    with tempfile.TemporaryDirectory() as folder:
        proxy = SourceProxy(Path(folder) / "mirror", base, finder, QUICK_LEVEL if record else level)
        recorder = Recorder()
        if record:
            proxy._compressor = recorder
        encode_all(proxy, ram)
        return proxy.counters.wire_bytes, recorder.batches


def limit(batches: list[Batch], quick: bool) -> int:
    """Bytes that offline compression makes of it; the quick form leaves xz out."""
    plain = b"".join(batch.data for batch in batches)
    found = len(StreamCompressor(19, 27, True).compress(plain))
    return found if quick else min(found, len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)))


def measure(name: str, quick: bool) -> dict[str, Any]:
    """The row of one guest; it is measured when the lab is down."""
    with used.guest(name) as one, used.shared() as (base, disk):
        delta = Disk(np.ascontiguousarray(one.blocks)) if len(one.blocks) else None
        least = limit(encode(one.ram, base, disk, record=True)[1], quick)
        full = encode(one.ram, base, disk)[0]
        bytes_of = {
            "full": full,
            "limit": least,
            "sent before": encode(one.ram, base, Both(disk, delta))[0],
            "no golden": encode(one.ram, None, disk)[0],
            "no disk": encode(one.ram, base, None)[0],
            "full, xz level 6": encode(one.ram, base, disk, STRONGEST)[0],
            "full, zstd level 5": encode(one.ram, base, disk, QUICK_LEVEL)[0],
            "zstd alone": encode(one.ram, None, None, QUICK_LEVEL)[0],
            "new on disk": len(one.blocks) * PAGE,
        }
    return {
        "ratio": full / least,
        "xz level 6, ratio": bytes_of["full, xz level 6"] / least,
        "guest": name,
        **{key: value / 1e6 for key, value in bytes_of.items()},
    }


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Report:
    kept, rows = Parts(parts, steps), []
    notes = [f"MB, {xz.name_of(LEVEL)}, memory of one pass over a still picture"]
    for name in ("faces", "churn") if quick else AIMS:
        if not chosen(name, only):
            continue
        if (row := kept.attempt(f"bytes{' quick' * quick}: {name}", partial(measure, name, quick), notes)) is not None:
            rows.append(row)
            print(f"{time.strftime('%H:%M:%S')} {row}", file=sys.stderr, flush=True)
    targets = []
    for row in rows:
        name = row["guest"]
        targets += [
            Target.at_most(f"{name}: everything over the limit", row["ratio"], 1.15),
            Target.at_most(f"{name}: the same with xz level 6", row["xz level 6, ratio"], 1.15),
            Target.at_most(f"{name}: full, MB", row["full"], 1.15 * AIMS[name][0]),
            Target.at_most(f"{name}: sent before, MB", row["sent before"], 1.15 * AIMS[name][1]),
        ]
    return Report(rows, targets, notes=notes)
