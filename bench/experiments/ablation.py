"""haulier with one part switched off at a time, in bytes: what earns its place.

Of memory: all pages of one stopped guest through the handoff's own codec, the same pages for every variant. Of the
disk: whole handoffs of clones with the same work, with `HAULIER_WITHOUT`.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from experiments import model, paths
from experiments.live_migration import GUEST, OURS, RECORDS, Case, Use, adopted, ours
from experiments.measuring import checks, crossing, switched_off
from experiments.model import RUNS, Bars, Experiment, Form, Kind, Row, ratio
from haulier.chunks.blocks import StoreBlockFinder
from haulier.chunks.store import ChunkStore
from haulier.compress import xz
from haulier.compress.stream import LONG_LEVEL
from haulier.guests.command import RAM_ID
from haulier.handoff import retained
from haulier.handoff.journal import Journal
from haulier.handoff.residence import guest_paths, spec_of
from haulier.handoff.shared import blocks_of, golden_manifest
from haulier.lab import looking
from haulier.lab.scenario import IMAGE, Scenario, scenario
from haulier.memory import pages, series
from haulier.memory.ahead import AheadReader
from haulier.memory.proxy import AHEAD_PAGES, SourceProxy
from haulier.without import DIRECT, DISK_FIRST, ORDER, RECIPES

ALL = "all parts"
LEVEL = 5
SLOW_LINKS = xz.FIRST_LEVEL + 2
VARIANTS: dict[str, dict[str, Any]] = {
    ALL: {},
    "without the base (golden snapshot)": {"base": False},
    "without deduplication against the disk": {"finder": False},
    "without delta (XOR)": {"delta": False},
    "without differences of numbers that run on": {"numbers": False},
    "without base and delta": {"base": False, "delta": False},
    "without base, deduplication and delta: zstd alone": {"base": False, "finder": False, "delta": False},
    "with the long window, which this level leaves out": {"long": True},
    f"with level {LONG_LEVEL + 2} and the long window": {"long": True, "level": LONG_LEVEL + 2},
    f"with {xz.name_of(SLOW_LINKS)}, for slow links": {"level": SLOW_LINKS},
}
FEW = {way: VARIANTS[way] for way in list(VARIANTS)[:2]}
THROUGH_QEMU = "all pages through the target's QEMU"
WHOLE = {
    ALL: "",
    "without block recipes": RECIPES,
    "without order": ORDER,
    "memory beside the disk's delta, not after it": DISK_FIRST,
    THROUGH_QEMU: DIRECT,
}


def new() -> Experiment:
    return Experiment(
        "ablation",
        "What each part earns",
        "How many more bytes does haulier send with one of its parts switched off?",
    )


def units(form: Form) -> dict[str, Callable[[], Experiment]]:
    if form != Form.WHOLE:
        return {"memory records": partial(memory, Case(RECORDS, 50, 512), VARIANTS if form == Form.QUICK else FEW)}
    found: dict[str, Callable[[], Experiment]] = {f"memory {app}": partial(memory, Case(app, 10, 1024)) for app in APPS}
    found |= {f"handoff {way}": partial(handoff, way, off) for way, off in WHOLE.items()}
    found |= {f"FACES at 25 Mbps: {way}": partial(faces, way, WHOLE[way]) for way in (ALL, THROUGH_QEMU)}
    return found | {"striping": striping}


APPS = looking.SERVICES


def memory(case: Case, variants: Mapping[str, dict[str, Any]] = VARIANTS) -> Experiment:
    found = new()
    with scenario("bench-seeds", case.template(), case.links) as lab:
        lab.start_guest(GUEST, memory=f"{case.memory_mib}M", image=IMAGE if case.app == RECORDS else looking.NAME)
        with adopted(lab, "oslo") as qemu:
            use = Use(lab, case, qemu)
            try:
                qemu.qmp.execute("stop")
                for way, parts in variants.items():
                    began = time.thread_time()
                    sent, taken = encoded(lab, **parts)
                    figures = {"MB": sent / 1e6, "CPU s": time.thread_time() - began}
                    figures |= {f"pages {name}": float(count) for name, count in taken.items()}
                    found.rows.append(
                        Row(way, f"memory of {case.memory_mib} MiB, {case.app.upper()}", Kind.MEASURED, figures)
                    )
                qemu.qmp.execute("cont")
            finally:
                use.stop()
    return found


def encoded(
    lab: Scenario,
    *,
    base: bool = True,
    finder: bool = True,
    delta: bool = True,
    numbers: bool = True,
    long: bool | None = None,
    level: int = LEVEL,
) -> tuple[int, dict[str, int]]:
    """Bytes of batches for all of the guest's memory, and pages by kind."""
    site = lab.oslo.site
    with Journal(site.journal) as journal, ChunkStore(site.store) as store, tempfile.TemporaryDirectory() as folder:
        row = journal.guest(GUEST)
        spec = spec_of(row)
        manifest, golden = store.load_manifest(row.manifest), golden_manifest(store, spec.golden)
        index = site.golden / spec.golden / "blocks.idx"
        blocks = StoreBlockFinder(*blocks_of(store, manifest, golden, index)) if finder else None
        picture = retained.open_base(site, GUEST, spec.uuid, retained.GOLDEN + spec.golden) if base else None
        below = pages._XOR_BELOW if delta else 0
        with contextlib.ExitStack() as off:
            off.enter_context(mock.patch.object(pages, "_XOR_BELOW", below))
            if not numbers:
                off.enter_context(mock.patch.object(series, "SMALL", 0))
            proxy = SourceProxy(Path(folder) / "mirror", picture, blocks, level, long=long)
            reader = AheadReader(guest_paths(site, GUEST).ram, RAM_ID)
            proxy.name({RAM_ID: reader.pages * 4096})
            reader.plan_all()
            sent = 0
            while not reader.done:
                assert proxy.mirror is not None
                numbers, some = reader.take(proxy.mirror)
                for at in range(0, len(numbers), AHEAD_PAGES):
                    batches = proxy.ahead(RAM_ID, numbers[at : at + AHEAD_PAGES], some[at : at + AHEAD_PAGES])
                    sent += sum(len(batch.data) for batch in batches)
            taken = dict(proxy.counters.pages)
            reader.close()
            proxy.close()
    return sent, taken


def handoff(way: str, off: str) -> Experiment:
    """A whole handoff of a guest that has written files, some of them copies of its system's."""
    found, case = new(), Case(RECORDS, 50, 512)
    with switched_off(off), scenario("bench-seeds", case.template(), case.links) as lab:
        lab.start_guest(GUEST, memory="512M")
        with adopted(lab, "oslo") as qemu:
            with qemu.guest_agent(60) as agent:
                copy = "mkdir /var/tmp/c; cp -r /usr/lib/python3 /usr/lib/python3.* /var/tmp/c/; sync"
                agent.check(["/bin/sh", "-c", copy], timeout=300)
            use = Use(lab, case, qemu)
        try:
            with crossing(lab) as crossed:
                report = lab.hand_over(GUEST, "oslo", "lisbon")["report"]
        finally:
            use.stop()
    found.checks += checks(way, report, crossed, None)
    disk = report["disk"]["origin"]
    figures = {"MB": crossed.bytes / 1e6, "disk MB": disk["wire_bytes"] / 1e6, "total s": report["total_s"]}
    figures |= {"downtime ms": report["downtime_ms"], "CPU s": crossed.cpu_s}
    figures["chunks as recipes"] = disk["chunks_recipe"]
    found.rows.append(Row(way, "whole handoff, system's files copied before", Kind.MEASURED, figures))
    return found


def faces(way: str, off: str) -> Experiment:
    """Handoffs of a guest that looks at pictures, over a link that asks for all of the CPU. Several in each run: what
    is to be told is less than one handoff differs from the next."""
    found, case = new(), Case("faces", 25, 1024)
    with switched_off(off):
        made = ours(case, [OURS] * RUNS)
    found.rows += [Row(way, f"whole handoff, {case.setting}", row.kind, row.figures) for row in made.rows]
    found.checks += [replace(check, name=f"{way}: {check.name}") for check in made.checks]
    return found


def striping() -> Experiment:
    """Two paths, and one of them taken away: the rows of the experiment about paths, under other names."""
    found, swept = new(), paths.sweep(25, (32,), 1)
    found.checks += swept.checks
    for row in swept.rows:
        way = ALL if row.way == paths.WAYS[2] else "without striping (one of the two paths)"
        figures = {name: row.get(name) for name in ("MB", "total s", "downtime ms")}
        found.rows.append(Row(way, f"two paths: {row.setting}", Kind.MEASURED, figures))
    return found


def finished(found: Experiment) -> Experiment:
    rows = model.ours(found.rows)
    found.bars, found.targets, made = [], [], []
    for setting in dict.fromkeys(row.setting for row in rows):
        some = [row for row in rows if row.setting == setting]
        whole = next((row.get("MB") for row in some if row.way == ALL), None)
        for row in some:
            figures = {"of all parts' bytes": ratio(row.get("MB"), whole), **row.figures}
            made.append(Row(row.way, row.setting, row.kind, figures, row.runs, row.note))
        found.bars.append(Bars(f"MB: {setting}", [(row.way, row.get("MB"), row.kind) for row in some]))
    found.rows = [
        *made,
        Row("without hinting of free pages", "the lab's images zero what is freed", Kind.NOT_BUILT, {}),
    ]
    return found
