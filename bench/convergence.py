"""Guests that write fast, over slow links: stock QEMU in each of its modes, and haulier, the same guest and work.

Stock: pre-copy with QEMU's defaults, XBZRLE, multifd with zstd, auto-converge, post-copy after the first pass; the
overlay is mirrored over NBD. haulier: as it is, and with --allow auto-converge or post-copy. Given up after 40 s
(--quick: one dirty rate at 50 Mbps) or 180 s. "whole" is when all of the memory was there, for post-copy; "lost" is
what the guest did not get done meanwhile, of what it does when nothing moves it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from report import Report  # noqa: E402

from haulier.errors import HaulierError  # noqa: E402
from haulier.lab.clients import Answers, Workload  # noqa: E402
from haulier.lab.demo import stock_pair  # noqa: E402
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, scenario, template, wan  # noqa: E402
from haulier.lab.stock import MODES, StockMigration  # noqa: E402

RTT_S = 0.04
MEMORY_MIB = 64
DIRTY = (50, 300, 1000, 2500)
"""Pages a second."""
RATES = (10, 50)
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


def first_answer(answers: Answers, stopped: float | None) -> float | None:
    if stopped is None:
        return None
    first = answers.first_after(stopped)
    return None if first is None else (first - stopped) * 1000


def stock(mode: str, pages: int, mbps: int, give_up_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {"how": f"stock {mode}", "pages/s": pages, "Mbps": mbps}
    link = [wan(f"{mbps}mbit", f"{RTT_S / 2 * 1000:g}ms")]
    with scenario("bench-converge", template(512), link, agents=False) as found:
        found.route("oslo")
        with stock_pair(found) as (source, target), asking(found) as answers:
            work = Work(found, pages)
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
    return row


def ours(pages: int, mbps: int, give_up_s: float, *words: str) -> dict[str, Any]:
    row: dict[str, Any] = {"how": " ".join(("haulier", *words)), "pages/s": pages, "Mbps": mbps}
    with scenario("bench-converge", template(512), [wan(f"{mbps}mbit", f"{RTT_S / 2 * 1000:g}ms")]) as found:
        found.start_guest()
        with asking(found) as answers:
            work = Work(found, pages)
            before = found.wan_bytes()
            began = time.monotonic()
            report: dict[str, Any] = {}
            with work.lost(row):
                try:
                    deadline = ("--deadline", f"{give_up_s:g}s")
                    report = found.hand_over("web1", "oslo", "lisbon", *words, *deadline)["report"]
                    row["done"] = "yes"
                except HaulierError:
                    row["done"] = "refused"
            row["total s"] = report.get("total_s", time.monotonic() - began)
            if report.get("post_copy"):
                row["whole s"] = row["total s"] + (report["post_copy"].get("seconds") or 0.0)
                row["page ms"] = report["post_copy"]["worst_wait_ms"]
            row["downtime ms"] = report.get("downtime_ms")
            row["first answer ms"] = first_answer(answers, report.get("stopped_at"))
            row["MB"] = (found.wan_bytes() - before) / 1e6
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
WAYS = (*OURS, *(f"stock {mode}" for mode in MODES))


def cell(way: str, pages: int, mbps: int, give_up_s: float) -> dict[str, Any]:
    """One row of the table: what `way` (of WAYS) does with such a guest on such a link."""
    if way in OURS:
        row = ours(pages, mbps, give_up_s, *way.split()[1:])
    else:
        row = stock(way.removeprefix("stock "), pages, mbps, give_up_s)
    print(row, file=sys.stderr, flush=True)
    return row


def run(quick: bool, ways: tuple[str, ...] = WAYS) -> Report:
    rows: list[dict[str, Any]] = []
    give_up_s = 40.0 if quick else 180.0
    for mbps in RATES[1:] if quick else RATES:
        for pages in (DIRTY[3],) if quick else DIRTY:
            cells = {way: cell(way, pages, mbps, give_up_s) for way in ways}
            best = cells.get(OURS[2], next(iter(cells.values())))["total s"]
            rows += [{"total, of haulier's": found["total s"] / best, **found} for found in cells.values()]
    keys = [
        *("total, of haulier's", "how", "pages/s", "Mbps", "done", "total s", "whole s", "downtime ms"),
        *("first answer ms", "page ms", "MB", "lost"),
    ]
    return Report(
        [{key: row.get(key) for key in keys} for row in rows],
        link=f"{'50' if quick else '10 and 50'} Mbps, {RTT_S * 1000:g} ms there and back",
        notes=[f"given up after {give_up_s:g} s"],
    )
