"""Handoff against live migration (adaptive VM handoff): a guest that looks at pictures, stock QEMU's modes, haulier.

Each run of stock QEMU starts from a fresh clone of the same golden snapshot, started and used alike. haulier's runs are
of one such clone that goes there and back: with nothing kept at either site (dropped before), on its way back, and
after a prefetch. `--quick` takes the lab's own small image with its own work in place of OpenCV.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from report import Target

from experiments import extrapolate, model, published
from experiments.measuring import checks, crossing, handoff
from experiments.model import Bars, Check, Experiment, Form, Kind, Row, best, ratio
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.store import ChunkStore
from haulier.guests.qemu import Qemu
from haulier.handoff.residence import guest_paths
from haulier.lab import looking
from haulier.lab.clients import Answers, Workload
from haulier.lab.demo import stock_pair
from haulier.lab.scenario import GUEST_ADDRESS, IMAGE, Scenario, Template, scenario, template, wan
from haulier.lab.stock import StockMigration
from haulier.units import CHUNK

RTT_MS = 50
PORT = 7600
GUEST = "web1"
RECORDS = "records"
"""The work of --quick."""
MODES = {
    "default": "default settings",
    "best": "multifd, zstd",
    "best, auto-converge": "multifd, zstd, auto-converge",
    "xbzrle": "XBZRLE",
    "auto-converge": "auto-converge",
    "post-copy": "post-copy after the first pass",
}
GIVE_UP_S = 40.0
"""Of modes that send each page as it is at least once: five minutes at 10 Mbps, of which the rate is measured."""
GIVE_UP_BEST_S = 180.0
WHOLE_DISK_S = 25.0
STRONGEST = "best"
ASKED_BEFORE = 30
"""Pictures that the service looks at before: it has been used."""
PAUSE_S = 5.0
"""Between two questions while it moves: after use, as in the paper, not in the middle of it."""
NO_SHARE_FULL = "QEMU, no-share, disk allocated to its full size"
NO_SHARE_USED = "QEMU, no-share, disk as allocated"
INCREMENTAL = "QEMU, incremental, "
OURS, BACK, AHEAD = "haulier", "haulier, sites that have met (way back)", "haulier, sites that have met (prefetch)"


@dataclass(frozen=True)
class Case:
    """One guest on one link."""

    app: str
    mbps: float
    memory_mib: int

    @property
    def setting(self) -> str:
        return f"{self.mbps:g} Mbps, {RTT_MS} ms, {self.memory_mib} MiB, {self.app.upper()}"

    @property
    def links(self) -> list[str]:
        return [wan(f"{self.mbps:g}mbit", f"{RTT_MS / 2:g}ms")]

    def template(self) -> Template:
        if self.app == RECORDS:
            return template(self.memory_mib)
        return template(self.memory_mib, application=looking.application(), size=looking.DISK_BYTES)


class Use:
    """What the guest does before and during: its service is asked, the lab's workload keeps and checks memory."""

    def __init__(self, lab: Scenario, case: Case, qemu: Qemu) -> None:
        self.workload = Workload(lab.lab, "client", GUEST_ADDRESS)
        self.looker = looking.Looker(lab.lab, "client", GUEST_ADDRESS.partition("/")[0])
        self._looks = case.app != RECORDS
        if self._looks:
            # Little: what has to travel is what the service has, and this is there to be checked.
            self.workload.start(4, pages_per_s=10, hot_pages=100, files_per_s=0.1, file_kib=64, random_share=0.1)
            self.looker.start(qemu, case.app)
            answer_s = self.looker.use(ASKED_BEFORE)
            print(f"{case.setting}: an answer takes {answer_s:.2f} s", file=sys.stderr, flush=True)
            self.looker.go_on(PAUSE_S)
        else:
            self.workload.start(48, pages_per_s=100, hot_pages=1000, files_per_s=0.2, file_kib=128, read_mib=40)
            time.sleep(3)
        self.answers = Answers(lab.lab, "client", GUEST_ADDRESS, lab.work / f"answers-{time.monotonic_ns()}.jsonl")
        self.answers.start()

    def first_answer_ms(self, stopped: float | None) -> float | None:
        if stopped is None:
            return None
        first = self.answers.first_after(stopped)
        return None if first is None else (first - stopped) * 1000

    def stop(self) -> dict[str, Any]:
        self.answers.stop()
        return self.looker.stop() if self._looks else {}


def non_zero(ram: Path) -> int:
    """Bytes of a guest's memory in pages that are not all zero."""
    memory = numpy.memmap(ram, dtype=numpy.uint64, mode="r").reshape(-1, 512)
    return sum(int(memory[at : at + 16384].any(axis=1).sum()) for at in range(0, len(memory), 16384)) * 4096


def allocated(made: Template) -> int:
    """Bytes of the disk in chunks that are not all zero."""
    with ChunkStore(made.store) as store:
        return sum(1 for fp in store.load_manifest(made.golden.manifest_name).chunks() if fp != ZERO) * CHUNK


# -- stock QEMU


def stock(case: Case, mode: str, give_up_s: float) -> Row:
    """A migration with the overlay mirrored."""
    made = case.template()
    with scenario("bench-seeds", made, case.links, agents=False) as lab, stock_pair(lab) as (source, target):
        lab.route("oslo")
        use = Use(lab, case, source)
        try:
            memory = non_zero(source.paths.ram)
            with crossing(lab) as found:
                result = migration(lab, source, target, mode).run(give_up_s, resumed=lambda: lab.route("lisbon"))
            first = use.first_answer_ms(result.stopped_at) if result.converged else None
            alive = use.workload.check(drop_caches=False) if result.converged else None
        finally:
            clients = use.stop()
    sent_pages = min(memory, result.normal_pages * 4096)
    per_page = (found.bytes - result.disk_bytes) / sent_pages if sent_pages and result.memory_rounds else 1.0
    left = memory - sent_pages if result.memory_rounds < 2 else result.remaining_bytes
    stopped = extrapolate.Stopped(
        result.total_s, found.bytes, left, 0, per_page=min(1.1, per_page), done=result.converged
    )
    seconds, bytes_, kind = extrapolate.total(stopped)
    figures = {
        "total s": seconds,
        "downtime ms": result.downtime_ms,
        "first answer ms": first,
        "MB": bytes_ / 1e6,
        "CPU s": found.cpu_s if result.converged else None,
        "memory MB": memory / 1e6,
    }
    note = "" if result.converged else f"given up after {result.total_s:.0f} s, {found.bytes / 1e6:.0f} MB"
    if alive is False or clients.get("wrong"):
        note += f"; arrived wrong: {clients}"
    say(case, f"{INCREMENTAL}{mode}", figures, note)
    return Row(INCREMENTAL + MODES[mode], case.setting, kind, figures, note=note)


def migration(lab: Scenario, source: Qemu, target: Qemu, mode: str, whole_disk: bool = False) -> StockMigration:
    address = lab.lab.address("lisbon", lab.lab.links_between("oslo", "lisbon")[0])
    return StockMigration(source, target, address, PORT, mode, whole_disk=whole_disk)


def no_share(case: Case) -> list[Row]:
    """The whole disk mirrored, given up soon: the rate is what is measured. `finished` makes totals of it."""
    made = case.template()
    with scenario("bench-seeds", made, case.links, agents=False) as lab, stock_pair(lab) as (source, target):
        lab.route("oslo")
        with crossing(lab) as found:
            result = migration(lab, source, target, "default", whole_disk=True).run(WHOLE_DISK_S)
    rate = found.bytes / result.total_s
    rows = []
    for way, size in ((NO_SHARE_FULL, made.golden.meta.disk_size), (NO_SHARE_USED, allocated(made))):
        note = f"{size / 1e9:.2f} GB of disk at {rate * 8 / 1e6:.2f} Mbps, measured for {result.total_s:.0f} s"
        figures = {"disk MB": size / 1e6, "mirrored Mbps": rate * 8 / 1e6}
        rows.append(Row(way, case.setting, Kind.EXTRAPOLATED, figures, note=note))
        say(case, way, figures, note)
    return rows


def with_memory(row: Row, after: Row) -> Row:
    """A row of `no_share` with its total: the disk first, then memory as in `after`, an incremental run."""
    disk, rate, then = row.get("disk MB"), row.get("mirrored Mbps"), after.get("total s")
    if disk is None or not rate or then is None:
        return row
    total = extrapolate.whole_disk(int(disk * 1e6), rate * 1e6 / 8, then)
    figures = {**row.figures, "total s": total, "MB": disk + (after.get("MB") or 0.0)}
    return replace(row, figures=figures)


# -- haulier


def ours(case: Case, plan: Sequence[str]) -> Experiment:
    """Handoffs of one guest there and back: with nothing kept, on the way back, after a prefetch."""
    made = case.template()
    all_ = new()
    with scenario("bench-seeds", made, case.links) as lab:
        memory = f"{case.memory_mib}M"
        lab.start_guest(GUEST, memory=memory, image=IMAGE if case.app == RECORDS else looking.NAME)
        with adopted(lab, "oslo") as qemu:
            use = Use(lab, case, qemu)
        source = "oslo"
        try:
            for number, way in enumerate(plan):
                if way != BACK and number:
                    for site in lab.sites.values():
                        site.haulier("gc", "--all", timeout=300)
                one(lab, case, use, way, source, all_, f"{way} #{plan[: number + 1].count(way)}")
                source = lab.other(source).name
                time.sleep(3)
        finally:
            clients = use.stop()
        wrong = float(clients.get("wrong", 0) + bool(clients.get("lost")))
        all_.checks.append(Check(f"{case.setting}: clients' wrong answers and lost connections", wrong, 0.0))
    return all_


@contextlib.contextmanager
def adopted(lab: Scenario, site: str) -> Iterator[Qemu]:
    qemu = Qemu.adopt(guest_paths(lab.sites[site].site, GUEST))
    try:
        yield qemu
    finally:
        qemu.close()


def one(lab: Scenario, case: Case, use: Use, way: str, source: str, all_: Experiment, title: str) -> None:
    target = lab.other(source).name
    note = ""
    if way == AHEAD:
        began = time.monotonic()
        lab.sites[source].haulier("prefetch", GUEST, "--to", target, timeout=900)
        note = f"after a prefetch of {time.monotonic() - began:.1f} s, the guest being used all the while"
        time.sleep(3)
    with crossing(lab) as found:
        report = lab.hand_over(GUEST, source, target, "--check", "--allow", "auto-converge")["report"]
    if slowed := max((each["percent"] for each in report["measures"]), default=0):
        note += f"; slowed by up to {slowed} % at the end"
    first = use.first_answer_ms(report["stopped_at"])
    # The guest's own look at its memory; its disk chunk by chunk.
    good = use.workload.check(drop_caches=False)
    verified = lab.sites[target].facts("verify", GUEST, timeout=300)
    figures = {
        "total s": report["total_s"],
        "downtime ms": report["downtime_ms"],
        "first answer ms": first,
        "MB": found.bytes / 1e6,
        "of these after the first pass MB": again(report) / 1e6,
        "link used %": 100 * found.bytes * 8 / (case.mbps * 1e6 * report["total_s"]),
        "CPU s": found.cpu_s,
    }
    all_.rows.append(Row(way, case.setting, Kind.MEASURED, figures, note=note))
    name = f"{case.setting}: {title}"
    all_.handoffs.append(handoff(name, report, found.bytes, found.packets))
    all_.checks += checks(name, report, found, bool(verified["ok"]) and good)
    say(case, title, figures, note)


def again(report: Mapping[str, Any]) -> int:
    """Bytes of the session once QEMU had been over all of the memory: what was dirtied meanwhile, and after that."""
    line = report["timeline"]
    first = next((point["wire"] for point in line if point["round"] >= 2), line[-1]["wire"] if line else 0)
    return max(0, int(report["wire"]["sent"] + report["wire"]["received"] - first))


def say(case: Case, way: str, figures: dict[str, Any], note: str) -> None:
    short = {name: round(value, 1) for name, value in figures.items() if value is not None}
    print(f"{case.setting}: {way}: {short} {note}", file=sys.stderr, flush=True)


# -- the experiment


TITLE = "Handoff against live migration"
QUESTION = (
    "How long does a guest with 1 GB of memory and an 8 GB disk take over a slow link, by stock QEMU and by haulier?"
)


def cases(form: Form) -> list[Case]:
    if form != Form.WHOLE:
        return [Case(RECORDS, 50, 512)]
    return [Case(app, mbps, 1024) for mbps in (10, 5, 15, 20, 25) for app in looking.SERVICES]


def units(form: Form) -> dict[str, Callable[[], Experiment]]:
    """Each a few minutes; the ways of one guest and link follow each other. Elsewhere than at 10 Mbps only the best
    of stock QEMU's modes: the others send each page at least once as it is, at any rate."""
    found: dict[str, Callable[[], Experiment]] = {}
    for case in cases(form):
        name = f"{case.app} {case.mbps:g} Mbps"
        whole = form == Form.WHOLE and case.mbps == 10
        found[f"{name}, haulier"] = partial(ours, case, PLAN[form])
        if whole:
            found[f"{name}, no-share"] = partial(no_share_unit, case)
        if form != Form.LEAST:
            for mode in MODES if whole else (STRONGEST if form == Form.QUICK else "best, auto-converge",):
                found[f"{name}, stock {mode}"] = partial(stock_unit, case, mode)
    return found


PLAN = {
    Form.WHOLE: (OURS, BACK, AHEAD),
    Form.QUICK: (OURS, BACK, AHEAD),
    Form.LEAST: (OURS, BACK),
}


def stock_unit(case: Case, mode: str) -> Experiment:
    found = new()
    found.rows.append(stock(case, mode, GIVE_UP_BEST_S if mode.startswith("best") else GIVE_UP_S))
    return found


def no_share_unit(case: Case) -> Experiment:
    found = new()
    found.rows += no_share(case)
    return found


def new() -> Experiment:
    return Experiment("live-migration", TITLE, QUESTION)


def finished(found: Experiment) -> Experiment:
    """Medians, ratios, aims and bars, from the rows alone."""
    rows = model.ours(found.rows)
    default = {row.setting: row for row in rows if row.way == INCREMENTAL + MODES["default"]}
    measured = [with_memory(row, default[row.setting]) if row.setting in default else row for row in rows]
    found.targets = []
    found.bars = []
    for setting in dict.fromkeys(row.setting for row in measured):
        rows = [row for row in measured if row.setting == setting]
        mine = next((row for row in rows if row.way == OURS), None)
        if mine is None:
            continue
        found.targets += targets(setting, rows, mine)
        at_ten = setting.startswith("10 Mbps")
        theirs = [row for row in published.LIVE_MIGRATION if at_ten and row.setting == published.SETTING]
        bars = [(row.way, row.get("total s"), row.kind) for row in [*rows, *theirs]]
        found.bars.append(Bars(f"total, seconds: {setting}", bars, log=True))
        down = [(row.way, row.get("downtime ms"), row.kind) for row in [*rows, *theirs] if row.get("downtime ms")]
        found.bars.append(Bars(f"downtime, ms: {setting}", down))
    found.rows = measured + published.LIVE_MIGRATION
    found.notes = [*found.notes, *NOTES]
    return found


def targets(setting: str, rows: Sequence[Row], mine: Row) -> list[Target]:
    total = {row.way: row.get("total s") for row in rows}
    at_ten = setting.startswith("10 Mbps")
    wanted = [(NO_SHARE_FULL, 127.0), (INCREMENTAL + MODES["default"], 15.0)] if at_ten else []
    made = [
        Target.at_least(f"{setting}: times the speed of {way}", value, least)
        for way, least in wanted
        if (value := ratio(total.get(way), mine.get("total s"))) is not None
    ]
    if (value := ratio(total.get(NO_SHARE_USED), mine.get("total s"))) is not None:
        made.append(Target.at_least(f"{setting}: times the speed of {NO_SHARE_USED} (no aim set)", value, 0.0))
    strongest = best(rows, "total s", lambda row: row.way.startswith(INCREMENTAL))
    if strongest is not None and (value := ratio(strongest.get("total s"), mine.get("total s"))) is not None:
        name = f"{setting}: times the speed of the strongest, {strongest.way}"
        made.append(Target.at_least(name if at_ten else f"{name} (aim set at 10 Mbps)", value, 3.0 if at_ten else 0.0))
    made.append(Target.at_most(f"{setting}: downtime ms", mine.get("downtime ms") or 0.0, 400.0))
    for way in (BACK, AHEAD):
        if (value := total.get(way)) is not None:
            made.append(Target.at_most(f"{setting}: {way}, s", value, 15.0))
    return made


NOTES = [
    "Both sites have the image (Debian with OpenCV installed) and its golden snapshot, in which the service has not "
    "been started; in the paper the application was part of what travelled, and in its 'no-share' nothing was there.",
    "Guests run emulated (TCG) on two cores that both sites, the link and the clients share; the paper had KVM. The "
    "image zeroes freed memory (init_on_free), which spares stock QEMU as much as haulier.",
    "Extrapolated totals are lower bounds: pages that were not sent once, or were left at the end, are counted once.",
    f"'No-share' mirrors the whole disk: {WHOLE_DISK_S:g} s of it are measured, the rest is size over rate, and then "
    "what the incremental run with default settings took. At 'full size' a disk of 8 GiB counts as full, as theirs.",
    "The service draws each picture anew: 320 x 240 greys whose amplitude falls as 1/f, a sensor's noise of two "
    "levels, and what is to be found; answers, log and JPEG files stay, the picture is let go. Beside it the lab's own "
    "service has 4 MiB that know what they must be, changes 10 pages a second and writes 64 KiB every ten seconds.",
    f"QEMU's modes but for multifd with zstd are given up after {GIVE_UP_S:g} s.",
    f"While it moves the guest looks at a picture every {PAUSE_S:g} s. haulier is allowed to slow the guest where it "
    "writes faster than the link carries; rows say where it did.",
    "libvirt is not installed here: its --copy-storage-inc is what 'incremental' does (an overlay mirrored over NBD).",
]
