"""Guests that write fast, over slow links: stock QEMU in each of its modes, and haulier, the same guest and work.

Stock: pre-copy with QEMU's defaults, XBZRLE, multifd with zstd, auto-converge, post-copy after the first pass; the
overlay is mirrored over NBD. haulier: as it is, and with --allow auto-converge or post-copy. Each run is given up after
150 s at 10 Mbps and 60 s at 50 Mbps (--quick, which is one dirty rate at 50 Mbps: 40 s); a way of stock QEMU that was
given up is not tried with a guest that writes faster on the same link, and (but for --quick) haulier is not allowed
what it does not need. "whole" is when all of the memory was there, for
post-copy; "lost" is what the guest did not get done meanwhile, of what it does when nothing moves it ("usual", pages a
second); "intact" is the guest's own look at its memory and files afterwards.

--only takes cells, WAY[/MBPS[/PAGES]], each part with wildcards: "stock xbzrle/50", "haulier*/10/1000". With --parts
FOLDER what ended is kept there and not measured again; --steps N measures so many cells more.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from experiments.parts import Parts, chosen  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.errors import HaulierError  # noqa: E402
from haulier.lab.clients import Answers, Workload  # noqa: E402
from haulier.lab.demo import stock_pair  # noqa: E402
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, scenario, template, wan  # noqa: E402
from haulier.lab.stock import StockMigration  # noqa: E402

RTT_S = 0.04
MEMORY_MIB = 64
DIRTY = (50, 300, 1000, 2500)
"""Pages a second."""
GIVE_UP_S = {10: 150.0, 50: 60.0}
"""By the link's Mbps; at 10 Mbps stock QEMU's first pass of plain pages alone takes 210 s."""
QUICK_S = 40.0
PORT = 4444


class Work:
    """Counts what the guest gets done, before and during."""

    def __init__(self, found: Scenario, pages_per_s: int) -> None:
        self.workload = Workload(found.lab, "client", GUEST_ADDRESS)
        self.workload.start(MEMORY_MIB, pages_per_s=pages_per_s, hot_pages=8000, files_per_s=0.2, file_kib=64)
        time.sleep(3)
        began, done = time.monotonic(), self._done()
        time.sleep(4)
        self.usual = (self._done() - done) / (time.monotonic() - began)

    def _done(self) -> float:
        return float(self.workload.stats()["rewritten"])

    @contextlib.contextmanager
    def lost(self, row: dict[str, Any]) -> Iterator[None]:
        began, done = time.monotonic(), self._done()
        yield
        with contextlib.suppress(HaulierError, OSError):
            got = (self._done() - done) / (time.monotonic() - began)
            row["lost"] = max(0.0, 1 - got / self.usual) if self.usual else 0.0


def said(whether: bool) -> str:
    return "yes" if whether else "NO"


def first_answer(answers: Answers, stopped: float | None) -> float | None:
    if stopped is None:
        return None
    first = answers.first_after(stopped)
    return None if first is None else (first - stopped) * 1000


def stock(mode: str, pages: int, mbps: int, give_up_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {}
    link = [wan(f"{mbps}mbit", f"{RTT_S / 2 * 1000:g}ms")]
    with scenario("bench-converge", template(512), link, agents=False) as found:
        found.route("oslo")
        with stock_pair(found) as (source, target), asking(found) as answers:
            work = Work(found, pages)
            row["usual"] = work.usual
            before = found.wan_bytes()
            with work.lost(row):
                address = found.lab.address("lisbon", found.lab.links_between("oslo", "lisbon")[0])
                began = time.time()
                migration = StockMigration(source, target, address, PORT, mode)
                result = migration.run(give_up_s, resumed=lambda: found.route("lisbon"))
            row |= {"done": "yes" if result.converged else "given up", "total s": result.total_s}
            if mode == "post-copy" and result.converged:
                ran = (result.stopped_at or 0.0) + (result.downtime_ms or 0.0) / 1000 - began
                row |= {"whole s": result.total_s, "total s": ran}
            row |= {"downtime ms": result.downtime_ms, "first answer ms": first_answer(answers, result.stopped_at)}
            row["MB"] = (found.wan_bytes() - before) / 1e6
            if result.converged:
                row["intact"] = said(work.workload.check(drop_caches=False))
    return row


def ours(pages: int, mbps: int, give_up_s: float, *words: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with scenario("bench-converge", template(512), [wan(f"{mbps}mbit", f"{RTT_S / 2 * 1000:g}ms")]) as found:
        found.start_guest()
        with asking(found) as answers:
            work = Work(found, pages)
            row["usual"] = work.usual
            before = found.wan_bytes()
            began = time.monotonic()
            report: dict[str, Any] = {}
            with work.lost(row):
                try:
                    deadline = ("--deadline", f"{give_up_s:g}s")
                    report = found.hand_over("web1", "oslo", "lisbon", *words, *deadline)["report"]
                    row["done"] = "yes"
                except HaulierError as error:
                    row |= {"done": "refused", "why": str(error)[-300:]}
            row["total s"] = report.get("total_s", time.monotonic() - began)
            if report.get("post_copy"):
                row["whole s"] = row["total s"] + (report["post_copy"].get("seconds") or 0.0)
                row["page ms"] = report["post_copy"]["worst_wait_ms"]
            row["downtime ms"] = report.get("downtime_ms")
            row["first answer ms"] = first_answer(answers, report.get("stopped_at"))
            row["MB"] = (found.wan_bytes() - before) / 1e6
            row["intact"] = said(work.workload.check(drop_caches=False))
    return row


@contextlib.contextmanager
def asking(found: Scenario) -> Iterator[Answers]:
    answers = Answers(found.lab, "client", GUEST_ADDRESS, found.work / "answers.jsonl")
    answers.start()
    try:
        yield answers
    finally:
        answers.stop()


OURS = ("haulier", "haulier --allow auto-converge", "haulier --allow post-copy")
THEIRS = ("default", "xbzrle", "best", "auto-converge", "post-copy")
WAYS = (*OURS, *(f"stock {mode}" for mode in THEIRS))
GIVEN_UP = "given up"
KEYS = (
    *("total, of haulier's", "how", "pages/s", "Mbps", "done", "total s", "whole s", "downtime ms"),
    *("first answer ms", "page ms", "MB", "lost", "usual", "intact"),
)


def cell(way: str, pages: int, mbps: int, give_up_s: float) -> dict[str, Any]:
    """One row of the table: what `way` (of WAYS) does with such a guest on such a link."""
    if way in OURS:
        row = ours(pages, mbps, give_up_s, *way.split()[1:])
    else:
        row = stock(way.removeprefix("stock "), pages, mbps, give_up_s)
    row = {"how": way, "pages/s": pages, "Mbps": mbps, **row}
    print(f"{time.strftime('%H:%M:%S')} {row}", file=sys.stderr, flush=True)
    return row


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Report:
    kept = Parts(parts, steps)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    bounds = {50: QUICK_S} if quick and not only else GIVE_UP_S
    for mbps, give_up_s in bounds.items():
        given_up: dict[str, int] = {}
        for pages in (DIRTY[3],) if quick and not only else DIRTY:
            for way in WAYS:
                name = f"{way}/{mbps}/{pages}"
                if not chosen(name, only):
                    continue
                so_far = [row for row in rows if row["Mbps"] == mbps and not quick]
                if known := without_running(way, pages, given_up, so_far):
                    rows.append({"how": way, "pages/s": pages, "Mbps": mbps, "done": known})
                    continue
                unit = partial(cell, way, pages, mbps, give_up_s)
                if (row := kept.attempt(f"convergence {give_up_s:g} s: {name}", unit, notes)) is None:
                    continue
                rows.append(row)
                if row["done"] == GIVEN_UP:
                    given_up[way] = pages
        notes.append(f"at {mbps} Mbps given up after {give_up_s:g} s")
    rates = " and ".join(str(mbps) for mbps in bounds)
    return Report(compared(rows), targets(rows), f"{rates} Mbps, {RTT_S * 1000:g} ms there and back", notes)


def without_running(way: str, pages: int, given_up: dict[str, int], rows: list[dict[str, Any]]) -> str:
    """Why a cell need not be run, if that is so; `rows`: those so far on that link."""
    if way in given_up:
        return f"no: nor at {given_up[way]} pages/s"
    plain = next((row for row in rows[::-1] if row["how"] == OURS[0] and row["pages/s"] == pages), None)
    if way in OURS[1:] and plain is not None and plain["done"] == "yes":
        return "as without"
    return ""


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their totals over that of haulier with the same guest and link, of what it is allowed the least
    with which it gets there. For what was given up that is a lower bound; a refusal has none."""
    best: dict[tuple[int, int], float] = {}
    for row in rows:
        if row["how"] in OURS and row["done"] == "yes":
            best.setdefault((row["pages/s"], row["Mbps"]), row["total s"])
    found = []
    for row in rows:
        mine, total = best.get((row["pages/s"], row["Mbps"])), row.get("total s")
        ratio = total / mine if mine and total and row["done"] != "refused" else None
        found.append({key: {**row, "total, of haulier's": ratio}.get(key) for key in KEYS})
    return found


def targets(rows: list[dict[str, Any]]) -> list[Target]:
    """What is allowed gets every guest there; what is refused, and what arrives, is whole."""
    mine = [row for row in rows if row["how"] in OURS]
    if not mine:
        return []
    missed = sum(row["done"] not in ("yes", "as without") for row in mine if row["how"] != OURS[0])
    hurt = sum(row.get("intact", "yes") != "yes" for row in mine)
    return [
        Target.at_most("haulier's runs that were allowed something and did not get there", missed, 0),
        Target.at_most("haulier's runs with a guest that is not whole afterwards", hurt, 0),
    ]
