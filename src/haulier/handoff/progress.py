"""What a worker tells while it works: status.json for the agent, and the report at the end."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from haulier.durable import write_atomically
from haulier.handoff.messages import Status

INTERVAL_S = 0.2


class Progress:
    """Keeps status.json current and remembers how long each phase took."""

    def __init__(self, directory: Path, status: Status) -> None:
        self.status = status
        self.phases: list[dict[str, Any]] = []
        self._path = directory / "status.json"
        self._written = 0.0
        self._lock = threading.Lock()
        status.started = time.time()
        self.write(force=True)

    def phase(self, name: str, message: str = "") -> None:
        """Begins a phase; the one before ends."""
        now = time.time()
        if self.phases:
            last = self.phases[-1]
            last["seconds"] = round(now - last["at"], 4)
            last["wire_bytes"] = self.status.wire_bytes - last.pop("_wire")
        self.phases.append({"name": name, "at": now, "_wire": self.status.wire_bytes})
        self.status.phase = name
        self.status.message = message
        self.write(force=True)

    def left(self, disk: int, memory: int) -> None:
        """Wire bytes that are probably still to come; progress and ETA follow from the link's rate."""
        status = self.status
        status.disk_left, status.memory_left = disk, memory
        left = disk + memory
        done = status.wire_bytes
        status.progress = max(status.progress, min(0.99, done / (done + left))) if done + left else 0.0
        status.eta_s = left * 8 / status.rate_bps if status.rate_bps > 0 else -1.0
        self.write()

    def write(self, *, force: bool = False) -> None:
        with self._lock:
            now = time.time()
            if not force and now - self._written < INTERVAL_S:
                return
            self._written = now
            self.status.updated = now
            # Replaced in one step, not synced: a status that a power cut loses tells nothing that the journal does not.
            temporary = self._path.with_suffix(".new")
            temporary.write_bytes(msgspec.json.encode(self.status))
            temporary.replace(self._path)

    def finish(self) -> list[dict[str, Any]]:
        """Ends the last phase and returns all: name, start, seconds, wire bytes."""
        if self.phases and "_wire" in self.phases[-1]:
            last = self.phases[-1]
            last["seconds"] = round(time.time() - last["at"], 4)
            last["wire_bytes"] = self.status.wire_bytes - last.pop("_wire")
        return self.phases


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """report.json, durable."""
    write_atomically(directory / "report.json", msgspec.json.format(msgspec.json.encode(report)))
