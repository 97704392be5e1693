"""What a benchmark hands to bench/run: rows for the table (the ratio in the first column) and targets."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata


@dataclass(frozen=True)
class Target:
    """`ok` says whether `value` meets `target`; both in the unit that `name` ends with."""

    name: str
    value: float
    target: float
    ok: bool

    @classmethod
    def at_least(cls, name: str, value: float, target: float) -> Target:
        return cls(name, value, target, value >= target)

    @classmethod
    def at_most(cls, name: str, value: float, target: float) -> Target:
        return cls(name, value, target, value <= target)


@dataclass(frozen=True)
class Report:
    """`rows` are alike: same keys in the same order, the ratio first. `link` says what lay between the two sites."""

    rows: Sequence[Mapping[str, object]]
    targets: Sequence[Target] = ()
    link: str = "none"
    notes: Sequence[str] = field(default_factory=list)

    def more(self) -> dict[str, object]:
        """Keys that this benchmark's document has beside those of every one."""
        return {}


def as_json(name: str, report: Report) -> dict[str, object]:
    """The document that bench/run writes."""
    return {
        "bench": name,
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "link": report.link,
        "rows": [dict(row) for row in report.rows],
        "targets": [asdict(target) for target in report.targets],
        "notes": list(report.notes),
        **report.more(),
    }


def machine() -> dict[str, object]:
    cpu = ""
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_bytes": memory, "kernel": platform.release()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("haulier", "numpy", "blake3", "xxhash", "backports.zstd"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        line = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
        found["qemu"] = line.split("\n", 1)[0].removeprefix("QEMU emulator version ")
    except (OSError, subprocess.CalledProcessError):
        pass
    return found
