"""What one would use without haulier: QEMU's own live migration, with the overlay mirrored over NBD.

This is what libvirt does for ``--copy-storage-inc``: the target starts with an empty overlay on the same base image,
the source mirrors its top layer into an NBD export of the target, memory follows by pre-copy, and the mirror is ended
in pre-switchover. QEMU's defaults, the strongest it has for a slow link ("best": multifd with zstd), and what it has
against guests that write faster than the link carries: XBZRLE, auto-converge (also with "best"), post-copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from haulier.errors import GuestError
from haulier.guests.qemu import Qemu

MIRROR: Final = "stock-mirror"
MODES: Final = ("default", "best", "xbzrle", "auto-converge", "post-copy", "best, auto-converge")


@dataclass(frozen=True)
class StockResult:
    """One migration by QEMU itself. Times in seconds; `downtime_ms` from STOP at the source to RESUME at the target."""

    mode: str
    converged: bool
    total_s: float
    downtime_ms: float | None
    stopped_at: float | None
    memory_rounds: int
    disk_bytes: int
    memory_bytes: int
    normal_pages: int = 0
    """Pages that were sent and are not zero, those sent again counted again."""
    remaining_bytes: int = 0
    """Of memory, when it ended."""
    note: str = ""


class StockMigration:
    """Moves a guest from `source` to `target`, a QEMU that waits with ``-incoming defer -S`` and an empty overlay."""

    def __init__(
        self, source: Qemu, target: Qemu, address: str, port: int, mode: str, *, whole_disk: bool = False
    ) -> None:
        """`whole_disk`: all of the disk is mirrored, as if the target had nothing of it; else the overlay."""
        if mode not in MODES:
            raise ValueError(mode)
        self.source, self.target, self.mode = source, target, mode
        self._sync = "full" if whole_disk else "top"
        self.address, self.port = address, port

    def run(
        self,
        give_up_s: float,
        progress: Callable[[float, str], None] | None = None,
        resumed: Callable[[], None] | None = None,
    ) -> StockResult:
        """Migrate; given up after `give_up_s` seconds, and the guest then runs on at the source.

        `resumed` is called at once when the guest runs at the target: the place to lead clients there.
        """
        began = time.monotonic()
        self._began, self._give_up_s, self._progress = began, give_up_s, progress
        mark, target_mark = self.source.qmp.mark(), self.target.qmp.mark()
        self._prepare()
        try:
            self._mirror(began + give_up_s)
            self.source.migrate_uri(f"tcp:{self.address}:{self.port}")
            if self.mode == "post-copy":
                self._first_pass(began + give_up_s)
                self.source.qmp.execute("migrate-start-postcopy")
            self._wait("pre-switchover", began + give_up_s, mark)
            self._end_mirror()
            self.source.migrate_continue()
            if self.mode == "post-copy":
                self.target.wait_migration({"postcopy-active"}, 60, since=target_mark)
            else:
                self._wait("completed", began + give_up_s + 60, mark)
                self.target.wait_migration({"completed"}, 30, since=target_mark)
            self.target.wait_status({"paused", "running"}, 10)
            resumed_mark = self.target.qmp.mark()
            self.target.cont()
            resume = self.target.qmp.wait_event("RESUME", timeout=10, since=resumed_mark)
            if resumed is not None:
                resumed()
            if self.mode == "post-copy":
                self._wait("completed", began + give_up_s + 60, mark)
        except TimeoutError:
            return self._given_up(began)
        total = time.monotonic() - began
        stop = next(e for e in self.source.qmp.events(mark) if e.name == "STOP")
        return self._result(True, total, (resume.at - stop.at) * 1000, stop.at)

    def _prepare(self) -> None:
        target, source = self.target, self.source
        best = self.mode.startswith("best")
        capabilities = {"events": True, "pause_before_switchover": True, "multifd": best, "return_path": True}
        if self.mode == "xbzrle":
            capabilities["xbzrle"] = True
        elif self.mode.endswith("auto-converge"):
            capabilities["auto_converge"] = True
        elif self.mode == "post-copy":
            capabilities["postcopy_ram"] = True
        target.set_capabilities(late_block_activate=True, **capabilities)
        source.set_capabilities(late_block_activate=False, mapped_ram=False, **capabilities)
        if best:
            # Four channels: one zstd stream each; more only adds streams that know less.
            for qemu in (target, source):
                qemu.set_parameters(multifd_channels=4, multifd_compression="zstd", multifd_zstd_level=3)
        target.prepare_incoming(f"tcp:{self.address}:{self.port}")
        target.qmp.execute(
            "nbd-server-start",
            {"addr": {"type": "inet", "data": {"host": self.address, "port": str(self.port + 1)}}},
        )
        target.qmp.execute(
            "block-export-add",
            {"type": "nbd", "id": "stock", "node-name": "disk0", "name": "disk0", "writable": True},
        )

    def _mirror(self, deadline: float) -> None:
        execute = self.source.qmp.execute
        execute(
            "blockdev-add",
            {
                "driver": "nbd",
                "node-name": "stock-target",
                "server": {"type": "inet", "host": self.address, "port": str(self.port + 1)},
                "export": "disk0",
            },
        )
        execute(
            "blockdev-mirror",
            {"job-id": MIRROR, "device": "disk0", "target": "stock-target", "sync": self._sync, "auto-dismiss": False},
        )
        while not (job := self._job()).get("ready"):
            if not job:
                raise GuestError("QEMU's disk mirror ended early, and left no reason")
            self._in_time(deadline)

    def _job(self) -> dict[str, Any]:
        jobs = {job["device"]: job for job in self.source.qmp.execute("query-block-jobs")}
        return dict(jobs.get(MIRROR, {}))

    def _end_mirror(self) -> None:
        """Ends the mirror once all is written; a ready mirror that is cancelled leaves both sides equal."""
        self.source.qmp.execute("block-job-cancel", {"device": MIRROR})
        while (job := self._job()) and job.get("status") != "concluded":
            time.sleep(0.005)
        if job:
            self.source.qmp.execute("job-dismiss", {"id": MIRROR})
        self.source.qmp.execute("blockdev-del", {"node-name": "stock-target"})
        self.target.qmp.execute("nbd-server-stop")

    def _wait(self, status: str, deadline: float, mark: int) -> None:
        while True:
            for event in self.source.qmp.events(mark):
                if event.name == "MIGRATION" and event.data.get("status") == status:
                    return
            now = self.source.query_migrate()
            if now.get("status") == "failed":
                raise GuestError(f"QEMU's migration failed: {now.get('error-desc', 'no reason given')}")
            self._in_time(deadline)

    def _first_pass(self, deadline: float) -> None:
        while int(self.source.query_migrate().get("ram", {}).get("dirty-sync-count", 0)) < 2:
            self._in_time(deadline)

    def _in_time(self, deadline: float) -> None:
        # While memory fills the link the mirror may fail; without it the guest would arrive with an old disk.
        if (job := self._job()).get("status") == "concluded":
            raise GuestError(f"QEMU's disk mirror ended early: {job.get('error', 'no reason given')}")
        ram = self.source.query_migrate().get("ram", {})
        if self._progress is not None:
            left = (
                f"round {ram['dirty-sync-count']}, {ram['remaining'] >> 20} MiB left" if ram else "mirroring the disk"
            )
            self._progress((time.monotonic() - self._began) / self._give_up_s, left)
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)

    def _given_up(self, began: float) -> StockResult:
        total = time.monotonic() - began
        result = self._result(False, total, None, None, note="given up: it did not converge")
        self.source.resume_source()
        if self._job():
            self.source.qmp.execute("block-job-cancel", {"device": MIRROR, "force": True})
        return result

    def _result(
        self, converged: bool, total: float, downtime: float | None, stopped_at: float | None, note: str = ""
    ) -> StockResult:
        ram = self.source.query_migrate().get("ram", {})
        return StockResult(
            mode=self.mode,
            converged=converged,
            total_s=round(total, 3),
            downtime_ms=None if downtime is None else round(downtime, 1),
            stopped_at=stopped_at,
            memory_rounds=int(ram.get("dirty-sync-count", 0)),
            disk_bytes=int(self._job().get("offset", 0)),
            memory_bytes=int(ram.get("transferred", 0)),
            normal_pages=int(ram.get("normal", 0)),
            remaining_bytes=int(ram.get("remaining", 0)),
            note=note,
        )
