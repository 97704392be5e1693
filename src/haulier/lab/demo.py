"""The demonstration: one running Debian guest, one slow link, moved by stock QEMU and by haulier.

``python -m haulier.lab.demo`` (or ``scripts/demo``, which sets everything up first). Each move starts from the same
guest state: a fresh clone of the same golden snapshot, the same workload with the same seed, the same time to settle.
The base image is at the target in every case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from haulier.disks.export import DiskExport
from haulier.errors import HaulierError, UsageError
from haulier.guests import launch
from haulier.guests.accel import probe
from haulier.guests.qemu import GuestPaths, Qemu, create_overlay
from haulier.guests.tap import create_tap, delete_tap, tap_name
from haulier.lab.clients import Answers, Workload
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, Template, scenario, template, versions, wan
from haulier.lab.stock import StockMigration, StockResult
from haulier.lab.tables import show
from haulier.lab.topology import parse_rate, parse_time

GUEST = "web1"
SETTLE_S = 8.0
WORK = {"pages_per_s": 150, "hot_pages": 2000, "files_per_s": 0.25, "file_kib": 256, "random_share": 0.1}
"""What the guest does all the time; a tenth of its working set cannot be compressed, the rest is like records with
text. It has read some of its own files before, as any guest has that was up for a while."""
WORK |= {"read_mib": 150, "seed": 7}
STOCK_PORT = 7600


class Demo:
    """One run of the demonstration."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.console = console
        self.rate_bps = parse_rate(options.rate)
        self.delay_s = parse_time(options.delay)
        self.memory_mib = _mebibytes(options.memory)
        self.result: dict[str, Any] = {}

    # -- the whole of it -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        accel = probe()
        self.console.print(f"guests run under [bold]{accel.kind.upper()}[/] ({accel.reason})")
        with self._bar("getting ready") as say:
            made = template(self.memory_mib, say)
        links = [wan(self.options.rate, self.options.delay)] * self.options.paths
        self.result = {
            "link": {
                "rate_bps": self.rate_bps,
                "rtt_ms": 2000 * self.delay_s,
                "paths": self.options.paths,
            },
            "guest": {
                "memory_mib": self.memory_mib,
                "disk_bytes": made.golden.meta.disk_size,
                "working_set_mib": self.options.working_set,
                "image": made.golden.meta.image,
            },
            "accelerator": accel.kind,
            "versions": versions(),
        }
        if not self.options.skip_stock:
            for mode, name in (("default", "stock_default"), ("best", "stock_best")):
                self.result[name] = self._stock(made, links, mode)
        self.result["haulier"] = self._haulier(made, links)
        return self.result

    # -- stock QEMU ------------------------------------------------------------------------------------------------

    def _stock(self, made: Template, links: list[str], mode: str) -> dict[str, Any]:
        what = {"default": "default pre-copy", "best": "multifd with zstd"}[mode]
        self.console.rule(f"stock QEMU, {what}")
        with scenario("demo", made, links, agents=False) as lab:
            self.result["link"]["backend"] = lab.lab.backend
            with stock_pair(lab) as (source, target):
                lab.route("oslo")
                workload = self._start_work(lab)
                answers = Answers(lab.lab, "client", GUEST_ADDRESS, lab.work / "answers.jsonl")
                answers.start()
                try:
                    before = lab.wan_bytes()
                    address = lab.lab.address("lisbon", lab.lab.links_between("oslo", "lisbon")[0])
                    move = StockMigration(source, target, address, STOCK_PORT, mode)
                    with self._bar(f"stock QEMU, {what}") as say:
                        found = move.run(
                            self.options.stock_timeout,
                            progress=say,
                            resumed=lambda: lab.route("lisbon"),
                        )
                    wire = lab.wan_bytes() - before
                    return self._stock_figures(found, wire, answers, workload)
                finally:
                    answers.stop()

    def _stock_figures(self, found: StockResult, wire: int, answers: Answers, workload: Workload) -> dict[str, Any]:
        first = answers.first_after(found.stopped_at) if found.stopped_at else None
        alive = workload.check() if found.converged else None
        figures = asdict(found) | {
            "wire_bytes": wire,
            "first_answer_ms": None
            if first is None or not found.stopped_at
            else round((first - found.stopped_at) * 1e3),
            "gave_up_after_s": None if found.converged else self.options.stock_timeout,
            "alive": alive,
        }
        verdict = f"{found.total_s:.1f} s" if found.converged else f"did not converge within {found.total_s:.0f} s"
        self.console.print(f"  {verdict}, {wire / 1e6:.1f} MB on the wire")
        return figures

    # -- haulier ---------------------------------------------------------------------------------------------------

    def _haulier(self, made: Template, links: list[str]) -> dict[str, Any]:
        self.console.rule("haulier")
        with scenario("demo", made, links, keep=self.options.keep) as lab:
            self.result["link"]["backend"] = lab.lab.backend
            began = time.monotonic()
            lab.start_guest(GUEST, memory=self.options.memory)
            self.console.print(f"guest {GUEST} runs at oslo, {time.monotonic() - began:.1f} s after it was asked for")
            workload = self._start_work(lab)
            answers = Answers(lab.lab, "client", GUEST_ADDRESS, lab.work / "answers.jsonl")
            answers.start()
            try:
                before = lab.wan_bytes()
                with self._bar("haulier handoff web1 --to lisbon") as say:
                    report = self._hand_over(lab, say)
                wire = lab.wan_bytes() - before
                first = answers.first_after(report["stopped_at"])
                checked = workload.check()
            finally:
                answers.stop()
            verified = lab.lisbon.facts("verify", GUEST, timeout=300)
            seen = answers.summary()
            check = report.get("check", {})
            figures = {
                "total_s": report["total_s"],
                "downtime_ms": report["downtime_ms"],
                "first_answer_ms": None if first is None else round((first - report["stopped_at"]) * 1e3),
                "longest_gap_ms": seen.get("longest_gap_ms"),
                "answers": seen.get("answers"),
                "wrong_answers": seen.get("wrong"),
                "wire_bytes": wire,
                "memory_equal": bool(check.get("memory_equal")),
                "disk_equal": bool(verified["ok"]),
                "alive": checked,
                "converged": True,
                "report": report,
            }
            if not (figures["memory_equal"] and figures["disk_equal"] and checked):
                raise HaulierError(f"the guest did not arrive whole: {figures}; look into {lab.work} (run with --keep)")
            return figures

    def _hand_over(self, lab: Scenario, say: Any) -> dict[str, Any]:
        client = lab.oslo.client
        started = client.start_handoff(GUEST, "lisbon", {"check": True})
        handoff = str(started["id"])
        while True:
            now = client.handoff(handoff)
            status = now.get("status") or {}
            say(status.get("progress", 0.0), status.get("phase", ""))
            if now.get("state") == "ended":
                break
            time.sleep(0.1)
        report = now.get("report") or {}
        if now.get("outcome") != "done":
            raise HaulierError(f"the handoff failed: {report.get('error') or now.get('detail')}")
        return dict(report)

    # -- the guest's work ------------------------------------------------------------------------------------------

    def _start_work(self, lab: Scenario) -> Workload:
        workload = Workload(lab.lab, "client", GUEST_ADDRESS)
        with self._bar(f"the guest fills {self.options.working_set} MiB of memory and begins its work") as say:
            say(0.1, "filling")
            self.result["guest"]["workload"] = WORK
            workload.start(self.options.working_set, **WORK)
            for step in range(20):
                say(0.5 + step / 40, "settling")
                time.sleep(SETTLE_S / 20)
        return workload

    @contextlib.contextmanager
    def _bar(self, title: str) -> Iterator[Any]:
        """A progress bar with ETA; gives say(share, text)."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=not self.console.is_terminal) as progress:
            task: TaskID = progress.add_task(title, total=1.0, text="")

            def say(share: float, text: str) -> None:
                progress.update(task, completed=share, text=text)

            yield say
            progress.update(task, completed=1.0, text="done")


@contextlib.contextmanager
def stock_pair(lab: Scenario) -> Iterator[tuple[Qemu, Qemu]]:
    """The same clone as haulier's guest at oslo, and a QEMU that waits for it at lisbon; no agents."""
    with stock_sites(lab) as (source, there, receive):
        create_overlay(there.overlay, source.spec.disk_size)
        yield source, receive()


@contextlib.contextmanager
def stock_sites(lab: Scenario, *, served: bool = True) -> Iterator[tuple[Qemu, GuestPaths, Callable[[], Qemu]]]:
    """The same clone as haulier's guest at oslo; the files that it will have at lisbon, where its disk is served, and
    what starts a QEMU there that waits for it, once its overlay is there. All that runs is ended with the block.

    Unless `served` lisbon does not have the disk: what serves it at its socket is the caller's to start.
    """
    assert isinstance(lab.template, Template)
    golden = lab.template.golden
    spec = golden.spec(GUEST, address=GUEST_ADDRESS, gateway="10.77.0.1", mac="52:54:00:77:00:10")
    tap = tap_name(GUEST)
    opened: list[Qemu] = []
    exports: list[DiskExport] = []
    where = {site: lab.lab.namespace(site) for site in ("oslo", "lisbon")}
    paths = {site: GuestPaths(lab.work / site / "stock", Path("/dev/shm/haulier-stock")) for site in where}
    there = paths["lisbon"]

    def receive() -> Qemu:
        opened.append(Qemu.start(spec, there, incoming=True, nic=tap, netns=where["lisbon"]))
        return opened[-1]

    try:
        for namespace in where.values():
            create_tap(tap, netns=namespace)
        source = launch.start_from_golden(
            golden, spec, paths["oslo"], store_dir=lab.work / "oslo" / "store", tap=tap, netns=where["oslo"]
        )
        opened.append(source)
        there.prepare()
        if served:
            exports.append(
                DiskExport.start(
                    lab.work / "lisbon" / "store", golden.manifest_name, there.nbd_sock, there.nbd_ctl, there.nbd_log
                )
            )
        yield source, there, receive
    finally:
        for qemu in opened:
            qemu.kill()
        with contextlib.suppress(HaulierError):
            exports.append(DiskExport.attach(paths["oslo"].nbd_ctl))
        for export in exports:
            with contextlib.suppress(HaulierError):
                export.stop()
        for namespace in where.values():
            with contextlib.suppress(HaulierError):
                delete_tap(tap, netns=namespace)
        shutil.rmtree("/dev/shm/haulier-stock", ignore_errors=True)


def _mebibytes(text: str) -> int:
    units = {"M": 1, "MiB": 1, "G": 1024, "GiB": 1024}
    for unit, factor in units.items():
        if text.endswith(unit) and text[: -len(unit)].isdigit():
            return int(text[: -len(unit)]) * factor
    raise UsageError(f"memory {text!r}: give a size like 512M or 1G")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rate", default="10mbit", help="of the link (default 10mbit)")
    parser.add_argument("--delay", default="25ms", help="of the link, one way (default 25ms: 50 ms there and back)")
    parser.add_argument("--memory", default="512M", help="of the guest (default 512M)")
    parser.add_argument("--working-set", type=int, default=100, help="MiB that the guest works on (default 100)")
    parser.add_argument("--paths", type=int, default=1, choices=(1, 2, 3), help="links between the sites (default 1)")
    parser.add_argument("--skip-stock", action="store_true", help="leave stock QEMU out")
    parser.add_argument("--stock-timeout", type=float, default=240.0, help="seconds after which stock QEMU is given up")
    parser.add_argument("--keep", action="store_true", help="keep the sites' directories for a look")
    parser.add_argument("--svg", metavar="FILE", help="draw the tables into FILE")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        if os.geteuid() != 0:
            raise UsageError("the demonstration makes network namespaces: run it as root")
        result = Demo(options, console).run()
    except HaulierError as error:
        console.print(f"[red]error:[/] {error}")
        return error.exit_code
    if options.svg:
        shown = Console(record=True, width=110, file=io.StringIO())
        show(result, shown)
        # Without its font faces: they would be fetched from a host of somebody else's.
        svg = re.sub(r"@font-face \{.*?\}\n", "", shown.export_svg(title="scripts/demo"), flags=re.DOTALL)
        Path(options.svg).write_text(svg)
    show(result, console)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"all figures: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
