"""The controller against every fixed level and against perfect knowledge, on page streams of real guests.

Recorded: a face detection service, an in-memory database and a web server with new files, after their use
(bench/used.py), and an idle guest; --quick takes one guest with four loads in turn (idle; a table in memory that
changes; files that come and go; both). Each time all of its memory goes through the page codec against the golden
snapshot and the disk, and what would be compressed is kept, batch by batch, with the CPU time that the page codec took
before. Then zstd and xz are run for real on these batches, at each level, and under the controller with its changes of
level, and CPU time is measured, to which that of the page codec is added; link and share of a core are virtual: a batch
is encoded while the link sends the ones before it, and at most 0.3 s of link wait in between. One core means that half
of it is left beside the guest, two that all of it is. The changing link goes 5 -> 35 -> 5 Mbps at 5 and 10 s, a tenth
of the time that the published experiment takes; the hog leaves a quarter of the core for two seconds of four.

--only takes loads. With --parts FOLDER streams are kept there once they are recorded (so that what follows needs no
guest), and the cells of a load when they are done; --steps N plays so many loads more.

"oracle" picks the level for each batch knowing link, share and the batch's true cost at each level. The ratio is the
controller's time over the best of the fixed levels and the oracle; below 1.00 it beat both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import used  # noqa: E402
from experiments.parts import Parts, chosen  # noqa: E402
from recorded import Batch, Recorder, encode_all, read, write  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.chunks.blocks import StoreBlockFinder  # noqa: E402
from haulier.chunks.store import ChunkStore  # noqa: E402
from haulier.compress import xz  # noqa: E402
from haulier.compress.controller import Controller, Link, Profile, Share  # noqa: E402
from haulier.compress.profile import LEVELS, compressor, measure, trial  # noqa: E402
from haulier.compress.xz import name_of  # noqa: E402
from haulier.handoff import retained  # noqa: E402
from haulier.handoff.calibration import of_base  # noqa: E402
from haulier.handoff.journal import Journal  # noqa: E402
from haulier.handoff.residence import guest_paths, spec_of  # noqa: E402
from haulier.handoff.shared import blocks_of, golden_manifest  # noqa: E402
from haulier.lab.clients import Workload  # noqa: E402
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, scenario, template, wan  # noqa: E402
from haulier.memory.base import MemoryBase  # noqa: E402
from haulier.memory.proxy import LEAST_PACKED, LEAST_TRIED, SourceProxy  # noqa: E402

LOADS: dict[str, dict[str, Any]] = {
    "idle": {"memory_mib": 8, "pages_per_s": 0, "hot_pages": 1, "files_per_s": 0, "file_kib": 64},
    "table": {"memory_mib": 96, "pages_per_s": 200, "hot_pages": 1000, "files_per_s": 0, "file_kib": 64},
    "files": {"memory_mib": 16, "pages_per_s": 20, "hot_pages": 100, "files_per_s": 4, "file_kib": 1024},
    "mixed": {"memory_mib": 64, "pages_per_s": 100, "hot_pages": 500, "files_per_s": 2, "file_kib": 512},
}
KINDS = ("faces", "database", "web", "idle")
"""Of bench/used.py, and the lab's guest with nothing to do."""
RATES = (5, 10, 15, 20, 25, 50, 100, 300)
QUEUED_S = 0.3
MOST = 48 << 20
"""Plain bytes that are taken of one stream."""


def record(found: Scenario, load: dict[str, Any]) -> list[Batch]:
    """What is left of the lab's guest under a load of its workload."""
    workload = Workload(found.lab, "client", GUEST_ADDRESS)
    workload.start(load["memory_mib"], **{key: value for key, value in load.items() if key != "memory_mib"})
    time.sleep(10)
    site = found.oslo.site
    with Journal(site.journal) as journal, ChunkStore(site.store) as store:
        row = journal.guest("web1")
        spec = spec_of(row)
        manifest, golden = store.load_manifest(row.manifest), golden_manifest(store, spec.golden)
        finder = StoreBlockFinder(*blocks_of(store, manifest, golden, site.golden / spec.golden / "blocks.idx"))
        base = retained.open_base(site, "web1", spec.uuid, retained.GOLDEN + spec.golden)
        return left(guest_paths(site, "web1").ram, base, finder)


def record_used(name: str) -> list[Batch]:
    """What is left of a guest that has been used."""
    with used.guest(name) as one, used.shared() as (base, disk):
        return left(one.ram, base, disk)


def left(ram: Path, base: MemoryBase | None, finder: StoreBlockFinder) -> list[Batch]:
    with tempfile.TemporaryDirectory() as folder:
        proxy = SourceProxy(Path(folder) / "mirror", base, finder)
        proxy._compressor = recorder = Recorder()
        encode_all(proxy, ram, lambda: sum(len(batch.data) for batch in recorder.batches) >= MOST)
    return recorder.batches


Costs = list[tuple[int, float]]
"""For each batch: bytes on the wire, CPU seconds."""


def fixed(batches: list[Batch], level: int) -> Costs:
    compress, _ = compressor(level)
    out = []
    for data, encode_s in batches:
        began = time.thread_time()
        wire = len(compress(data))
        out.append((wire, encode_s + time.thread_time() - began))
    return out


Varying = Callable[[float], float]


@dataclass
class Pipe:
    """Virtual time: an encoder with a share of a core, a bounded queue, and a link."""

    link: Varying
    cpu: Varying
    now: float = 0.0
    free: float = 0.0
    """When the link has sent all so far."""

    def push(self, wire: int, cpu_s: float) -> None:
        self.now += cpu_s / self.cpu(self.now)
        # No more than so many seconds of link may wait.
        self.now = max(self.now, self.free - QUEUED_S)
        at = max(self.now, self.free)
        left = float(wire)
        while left > 0:
            rate = self.link(at)
            step = min(0.05, left / rate)
            at, left = at + step, left - rate * step
        self.free = at

    @property
    def queued_s(self) -> float:
        return max(0.0, self.free - self.now)

    @property
    def full(self) -> bool:
        return self.queued_s > QUEUED_S / 3


def play(costs: Costs, link: Varying, cpu: Varying) -> float:
    pipe = Pipe(link, cpu)
    for wire, cpu_s in costs:
        pipe.push(wire, cpu_s)
    return pipe.free


def oracle(tables: dict[int, Costs], link: Varying, cpu: Varying) -> float:
    pipe = Pipe(link, cpu)
    for each in zip(*tables.values(), strict=True):
        rate, share = link(pipe.now), cpu(pipe.now)
        wire, cpu_s = min(each, key=lambda cost: max(cost[0] / rate, cost[1] / share))
        pipe.push(wire, cpu_s)
    return pipe.free


class Codec:
    """What a handoff has: one stream of xz, in which levels follow each other, and one of zstd for each change."""

    def __init__(self, level: int) -> None:
        self._packer: xz.Packer | None = None
        self._zstd = 0
        self.set_level(level)

    def set_level(self, level: int) -> None:
        if not xz.is_xz(level):
            if level != self._zstd:
                self._zstd, (self._quick, _) = level, compressor(level)
            self.compress = self._quick
            return
        if self._packer is None:
            self._packer = xz.Packer(level)
        elif self._packer.level != level:
            self._packer.set_level(level)
        self.compress = self._packer.pack


def controlled(batches: list[Batch], profile: Profile, link: Varying, cpu: Varying) -> tuple[float, int, int]:
    """Seconds, bytes on the wire, and how often the mode changed."""
    pipe, seen, left = Pipe(link, cpu), Link(link(0.0)), Share(cpu(0.0))
    control = Controller(profile, link(0.0), cpu(0.0))
    level = control.begin(0.0).level
    codec = Codec(level)
    before, sent = b"", 0
    for batch, encode_s in batches:
        began = time.thread_time()
        wire = len(codec.compress(batch))
        sent += wire
        cpu_s = time.thread_time() - began
        share = left.note(encode_s + cpu_s, (encode_s + cpu_s) / cpu(pipe.now))
        pipe.push(wire, encode_s + cpu_s)
        if len(batch) >= LEAST_PACKED and level == control.choice.level:
            control.note(len(batch), wire, cpu_s, encode_s)
        full = pipe.full
        if before and len(batch) >= LEAST_TRIED and (levels := control.due(full)):
            began = time.thread_time()
            control.learn(trial(levels, before, batch))
            pipe.now += (time.thread_time() - began) / cpu(pipe.now)
        before = batch
        # What is acknowledged is never more than the link carries.
        now = link(pipe.now)
        rate = now if full else min(now, wire / max(1e-9, (encode_s + cpu_s) / share))
        carries = seen.note(rate, full, int(pipe.queued_s * now))
        decided = control.decide(pipe.now, max(1.0, carries), share).level
        level = decided if (filler := control.filler(pipe.queued_s)) is None else filler
        codec.set_level(level)
    return pipe.free, sent, len(control.changes) - 1


def scenes(quick: bool) -> dict[str, tuple[Varying, Varying]]:
    found: dict[str, tuple[Varying, Varying]] = {}
    for mbps in (5, 20, 100, 300) if quick else RATES:
        for cores, share in ((1, 0.5), (2, 1.0)):
            found[f"{mbps} Mbps, {cores} core{'s' * (cores > 1)}"] = (
                lambda now, rate=mbps * 125e3: rate,
                lambda now, share=share: share,
            )
    found["5-35-5 Mbps"] = (lambda now: (35 if 5 <= now < 10 else 5) * 125e3, lambda now: 1.0)
    for mbps in (25, 100):
        found[f"{mbps} Mbps, CPU hog"] = (
            lambda now, rate=mbps * 125e3: rate,
            lambda now: 0.25 if now % 4 < 2 else 1.0,
        )
    return found


def streams(names: Sequence[str] = KINDS, folder: Path | None = None) -> dict[str, list[Batch]]:
    """Recorded batches by what the guest did; those that are in the folder are taken from there."""
    with tempfile.TemporaryDirectory() as work:
        kept = folder if folder is not None else Path(work)
        lacking = [name for name in names if not path_of(kept, name).exists()]
        if loads := [name for name in lacking if name in LOADS]:
            with scenario("bench-adaptive", template(512), [wan("100mbit", "5ms")]) as found:
                found.start_guest()
                for name in loads:
                    write(path_of(kept, name), record(found, LOADS[name]))
        for name in lacking:
            if name not in LOADS:
                write(path_of(kept, name), record_used(name))
        return {name: read(path_of(kept, name)) for name in names}


def path_of(folder: Path, name: str) -> Path:
    return folder / f"stream-{name}"


def calibrated() -> Profile:
    """As `haulier calibrate` measures it at the sites: by memory of their golden snapshot."""
    base = MemoryBase.from_mapped_ram(template(512).golden.path / "memory")
    try:
        return measure(of_base(base))
    finally:
        base.close()


@dataclass(frozen=True)
class Cell:
    """One recorded stream in one scene; seconds until all of it was at the target."""

    load: str
    scene: str
    ours: float
    oracle: float
    fixed: dict[int, float]
    """By level."""
    wire: int
    """Bytes of ours."""
    changes: int

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Cell:
        """From JSON, which has only text for keys."""
        return cls(**{**kept, "fixed": {int(level): took for level, took in kept["fixed"].items()}})


def cells(recorded: dict[str, list[Batch]], quick: bool) -> Iterator[Cell]:
    """Every recorded stream in every scene."""
    profile = calibrated()
    for load, batches in recorded.items():
        if quick:
            batches = batches[: len(batches) // 3]
        tables = {level: fixed(batches, level) for level in LEVELS}
        for name, (link, cpu) in scenes(quick).items():
            took = {level: play(costs, link, cpu) for level, costs in tables.items()}
            mine, wire, changes = controlled(batches, profile, link, cpu)
            yield Cell(load, name, mine, oracle(tables, link, cpu), took, wire, changes)


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Report:
    kept = Parts(parts, steps)
    notes: list[str] = []
    recorded = streams(tuple(LOADS) if quick else KINDS, parts)
    found: list[Cell] = []
    for name, batches in recorded.items():
        if not chosen(name, only):
            continue
        unit = partial(played, {name: batches}, quick)
        played_now = kept.attempt(f"adaptive{' quick' * quick}: {name}", unit, notes)
        found += [Cell.of(each) for each in played_now or ()]
    return told(found, notes)


def played(recorded: dict[str, list[Batch]], quick: bool) -> list[dict[str, Any]]:
    found = []
    for cell in cells(recorded, quick):
        print(f"{time.strftime('%H:%M:%S')} {cell}", file=sys.stderr, flush=True)
        found.append(asdict(cell))
    return found


def told(found: Sequence[Cell], notes: Sequence[str] = ()) -> Report:
    rows: list[dict[str, Any]] = []
    times: dict[int, list[float]] = {level: [] for level in LEVELS}
    ours: list[float] = []
    changing: dict[str, list[float]] = {"ours": [], **{str(level): [] for level in LEVELS}}
    for cell in found:
        took = cell.fixed
        best = min(took, key=lambda level: took[level])
        least = min(took[best], cell.oracle)
        for level in LEVELS:
            times[level].append(took[level] / least)
        ours.append(cell.ours / least)
        if "core" not in cell.scene:
            changing["ours"].append(cell.ours)
            for level in LEVELS:
                changing[str(level)].append(took[level])
        rows.append(
            {
                "ratio": ours[-1],
                "load": cell.load,
                "scene": cell.scene,
                "ours s": cell.ours,
                "best fixed s": took[best],
                "mode": name_of(best),
                "oracle s": cell.oracle,
                "level 5 s": took[5],
                "MB": cell.wire / 1e6,
                "worst s": max(took.values()),
                "changes": cell.changes,
            }
        )
    mean = {level: sum(found) / len(found) for level, found in times.items()}
    single = min(mean, key=lambda level: mean[level])
    mine = sum(ours) / len(ours)
    steady = sum(changing[str(single)])
    return Report(
        rows,
        [
            Target.at_most("mean regret", mine, 1.05),
            Target.at_most("worst regret", max(ours), 1.15),
            Target.at_most(f"mean regret over that of the best single level ({single})", mine / mean[single], 1.0),
            Target.at_least(f"gain over level {single} where things change", 1 - sum(changing["ours"]) / steady, 0.15),
        ],
        link="virtual",
        notes=[
            *notes,
            *(f"{name_of(level)}: mean regret {mean[level]:.3f}, worst {max(times[level]):.2f}" for level in LEVELS),
        ],
    )
