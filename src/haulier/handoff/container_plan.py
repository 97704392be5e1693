"""The forecast of a container's handoff. Reads memory and the files that it wrote; dumps nothing, stops nothing."""

from __future__ import annotations

import stat
import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from haulier.agent.site import Site
from haulier.compress import StreamCompressor
from haulier.containers import files
from haulier.containers.container import Container
from haulier.containers.memory import Places, areas_of, picture_pages, read_processes
from haulier.containers.preflight import scan
from haulier.containers.upper import load_signatures, signature
from haulier.errors import Unsupported
from haulier.guests.model import GuestSpec
from haulier.handoff import retained
from haulier.memory import sparse
from haulier.memory.picture import PICTURE
from haulier.units import CHUNK, PAGE

SAMPLE_PAGES: Final = 4096
BETWEEN_S: Final = 0.5
FIXED_DOWN_S: Final = 0.28
"""Freeze, dump, restore: what does not depend on the link."""
FIXED_S: Final = 1.5


def sample(site: Site, spec: GuestSpec, container: Container, memory_base: str) -> dict[str, Any]:
    """Pages by kind, wire bytes of a page that has to be sent, pages changed a second, bytes of files to send.

    Unsupported for what open files tell already.
    """
    problems = scan(container.pids())
    if problems:
        raise Unsupported(f"guest {spec.name!r} cannot be handed over: {'; '.join(problems)}")
    count = picture_pages(spec.memory_mib)
    base = retained.open_base(site, spec.name, spec.uuid, memory_base)
    kept = retained.kept(site, spec.name, retained.PLACES) if memory_base else b""
    places = Places.decode(kept, count) if kept else Places(count)
    view = base.view(PICTURE) if base is not None and kept else None
    total = zero = same = 0
    chosen: list[NDArray[np.uint8]] = []
    first: dict[tuple[Any, int], bytes] = {}
    for piece in read_processes(areas_of(container.pids())):
        total += len(piece.pages)
        filled = sparse.nonzero(np.ascontiguousarray(piece.contents))
        zero += int((~filled).sum())
        if view is not None:
            old = view[places.numbers(piece.key, piece.pages)]
            equal = (old == piece.contents).all(axis=1) & filled
            same += int(equal.sum())
            filled &= ~equal
        if sum(map(len, chosen)) < SAMPLE_PAGES and filled.any():
            chosen.append(piece.contents[filled][:512])
        step = max(1, len(piece.pages) // 8)
        for page, contents in zip(piece.pages[::step].tolist(), piece.contents[::step], strict=True):
            first[(piece.key, page)] = contents.tobytes()
    began = time.monotonic()
    time.sleep(BETWEEN_S)
    changed = seen = 0
    for piece in read_processes(areas_of(container.pids())):
        step = max(1, len(piece.pages) // 8)
        for page, contents in zip(piece.pages[::step].tolist(), piece.contents[::step], strict=True):
            was = first.get((piece.key, page))
            if was is not None:
                seen += 1
                changed += was != contents.tobytes()
    seconds = time.monotonic() - began
    compressor = StreamCompressor(3, 24, True)
    sampled = sum(map(len, chosen))
    wire = sum(len(compressor.compress(np.ascontiguousarray(some).reshape(-1).data)) for some in chosen)
    return {
        "pages": total,
        "zero": zero,
        "same": same,
        "sent": total - zero - same,
        "wire_per_page": wire / sampled if sampled else 0.0,
        "dirty_pages_s": changed / max(1, seen) * total / seconds,
        "files": _files(container),
    }


def _files(container: Container) -> int:
    """Bytes of files that changed since they were last equal to the manifest."""
    known = load_signatures(container.paths.signatures)
    return sum(
        status.st_size
        for path, status in files.walk(container.paths.upper)
        if stat.S_ISREG(status.st_mode) and known.get(path) != signature(status)
    )


def forecast(found: dict[str, Any], missing: int, rate_bps: float, rtt_s: float) -> dict[str, Any]:
    """As `plan` gives it for VMs. Rounds form a geometric series; pages that change again go as small differences."""
    memory = found["sent"] * found["wire_per_page"] + found["pages"] * 0.05
    disk = found["files"] * 0.4 + missing * 0.4
    per_dirty = max(16.0, found["wire_per_page"] * 0.05)
    dirty_bps = found["dirty_pages_s"] * per_dirty * 8
    wire = disk + memory / (1 - min(0.8, dirty_bps / rate_bps))
    last = found["dirty_pages_s"] * 0.3 * per_dirty + 8_000
    downtime = FIXED_DOWN_S + 1.5 * rtt_s + last * 8 / rate_bps + found["pages"] * PAGE / 600e6
    seconds = FIXED_S + 6 * rtt_s + wire * 8 / rate_bps + downtime
    return {
        "bytes": {
            "total": round(wire),
            "disk": round(disk),
            "memory": round(wire - disk),
            "memory_pages": {
                "zero": found["zero"],
                "same": found["same"],
                "block": 0,
                "xor": 0,
                "literal": found["sent"],
            },
            "disk_chunks": -(-found["files"] // CHUNK),
            "missing_at_target": missing,
        },
        "seconds": _interval(seconds, 0.3),
        "downtime_ms": _interval(downtime * 1000, 0.4),
        "rate_bps": rate_bps,
        "rtt_s": rtt_s,
        "dirty_bps": found["dirty_pages_s"] * PAGE * 8,
        "mode": {"level": 9 if rate_bps < 40e6 else 2},
    }


def _interval(value: float, spread: float) -> dict[str, float]:
    return {"low": round(value * (1 - spread), 2), "likely": round(value, 2), "high": round(value * (1 + spread), 2)}
