"""What is measured around a handoff in a lab: bytes and packets of the links, CPU of the sites; and what a report says
of itself, checked against that."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report import Report

from experiments.model import Check, Experiment, Handoff
from haulier.units import CHUNK
from haulier.without import VARIABLE

PACKET_HEADERS = 52
"""IPv4, TCP, and TCP's time stamps."""
AGREE = 0.03
FRAMES = 128 << 10
"""Bytes of frames' headers, acknowledgements and pings, which no origin has, however little is sent."""
POINTS = 150
"""Of a plot, at most."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Crossing:
    """What went over the links between the two sites meanwhile, both ways. CPU: of all processes in both sites."""

    seconds: float = 0.0
    bytes: int = 0
    packets: int = 0
    cpu_s: float = 0.0
    points: list[dict[str, float]] = field(default_factory=list)

    @property
    def headers(self) -> int:
        return self.packets * PACKET_HEADERS


class CpuMeter:
    """CPU seconds of the processes in network namespaces, those that ended meanwhile too (by the last look)."""

    def __init__(self, namespaces: list[str]) -> None:
        self._inodes = {(Path("/run/netns") / name).stat().st_ino for name in namespaces}
        self._first: dict[tuple[int, int], int] = {}
        self._last: dict[tuple[int, int], int] = {}
        self._fresh = False
        self.look()
        self._fresh = True

    def look(self) -> None:
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, IndexError, ValueError):
                if os.stat(f"/proc/{entry.name}/ns/net").st_ino not in self._inodes:
                    continue
                words = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()
                key, used = (int(entry.name), int(words[19])), int(words[11]) + int(words[12])
                self._first.setdefault(key, 0 if self._fresh else used)
                self._last[key] = used

    def seconds(self) -> float:
        return sum(used - self._first[key] for key, used in self._last.items()) / TICKS


@contextlib.contextmanager
def crossing(lab: Any) -> Iterator[Crossing]:
    """Measures while the block runs; the figures are there when it ends. `lab`: a scenario."""
    found = Crossing()
    meter = CpuMeter([lab.lab.namespace(site) for site in ("oslo", "lisbon")])
    bytes_, packets, began = lab.wan_bytes(), lab.wan_packets(), time.monotonic()
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.5):
            with contextlib.suppress(Exception):
                meter.look()
                found.points.append({"at": time.monotonic() - began, "wire": float(lab.wan_bytes() - bytes_)})

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.seconds = time.monotonic() - began
        over.set()
        thread.join(10)
        meter.look()
        found.bytes, found.packets = lab.wan_bytes() - bytes_, lab.wan_packets() - packets
        found.cpu_s = meter.seconds()


def origins(report: Mapping[str, Any], bytes_: int, packets: int) -> dict[str, float]:
    """Bytes on the wire by what they carried; they add up to `bytes_`, what the interfaces counted."""
    memory, disk, wire = report["memory"], report["disk"]["origin"], report["wire"]
    found = {f"memory: {name}": float(count) for name, count in memory["kinds"]["wire"].items()}
    named = {"chunks": disk["sent_bytes"], "recipes": disk["recipe_bytes"], "patches": disk["patch_bytes"]}
    found |= {f"disk: {name}": float(count) for name, count in named.items()}
    found["disk: references"] = float(max(0, disk["wire_bytes"] - sum(named.values())))
    session = wire["sent"] + wire["received"]
    said = talk(report)
    found |= {f"control: {name}": float(count) for name, count in said.items()}
    found["session: frames"] = float(session - memory["wire_bytes"] - disk["wire_bytes"] - sum(said.values()))
    found["packet headers"] = float(packets * PACKET_HEADERS)
    found["agents' talk"] = float(bytes_ - packets * PACKET_HEADERS - session)
    return found


def talk(report: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that the two workers said to each other besides memory and disk, by channel."""
    return {name: count for name, count in report["wire"]["channels"].items() if name not in ("memory", "disk")}


def raw(report: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of the guest by how the target came by them."""
    disk = report["disk"]["origin"]
    found = {f"memory: {name}": float(count) for name, count in report["memory"]["kinds"]["raw"].items()}
    for name in ("at_target", "recipe", "patch", "sent"):
        found[f"disk: {name.replace('_', ' ')}"] = float(disk[f"chunks_{name}"] * CHUNK)
    return found


def handoff(title: str, report: Mapping[str, Any], bytes_: int, packets: int) -> Handoff:
    """A report as its plot wants it."""
    began = report["phases"][0]["at"]
    phases = [
        {"name": phase["name"], "at": round(phase["at"] - began, 4), "seconds": phase["seconds"]}
        | {"wire_bytes": phase["wire_bytes"]}
        for phase in report["phases"]
        if "seconds" in phase
    ]
    line = report["timeline"]
    step = max(1, -(-len(line) // POINTS))
    points = [
        {"at": each["at"], "wire": each["wire"], "rate_bps": each["rate_bps"], "left": each["left"]}
        for each in [*line[::step], *line[-1:]]
    ]
    return Handoff(
        title=title,
        total_s=report["total_s"],
        downtime_ms=report["downtime_ms"],
        phases=phases,
        points=points,
        origins=origins(report, bytes_, packets),
        raw=raw(report),
    )


def checks(title: str, report: Mapping[str, Any], found: Crossing, disk_equal: bool | None) -> list[Check]:
    """Bytes against counters, phases against the total, and the guest against itself."""
    session = report["wire"]["sent"] + report["wire"]["received"]
    kinds = sum(report["memory"]["kinds"]["wire"].values())
    by_origin = kinds + report["disk"]["origin"]["wire_bytes"] + sum(talk(report).values())
    unnamed = abs(session - by_origin) - FRAMES
    counted = found.bytes - found.headers
    # Until the source is released; what comes after ("finish") is clearing away, and no part of the total.
    phases = sum(each.get("seconds", 0.0) for each in report["phases"] if each["name"] != "finish")
    made = [
        Check(f"{title}: session's bytes and headers against interface counters", off(session, counted), AGREE),
        Check(f"{title}: bytes by origin against the session's", max(0.0, unnamed) / session, AGREE),
        Check(f"{title}: phases against the total", off(phases, report["until_released_s"]), AGREE),
    ]
    if "check" in report:
        made.append(Check(f"{title}: memory differs", 0.0 if report["check"]["memory_equal"] else 1.0, 0.0))
    if disk_equal is not None:
        made.append(Check(f"{title}: disk differs", 0.0 if disk_equal else 1.0, 0.0))
    return made


def lacking(found: Experiment, report: Report) -> None:
    """A benchmark goes on where something of it fails, and notes that (`Parts.attempt`): a failed check here."""
    failed = [note for note in report.notes if note.startswith("failed: ")]
    found.notes += failed
    found.checks += [Check(note.removeprefix("failed: "), 1.0, 0.0) for note in failed]


def off(value: float, expected: float) -> float:
    """By what share of `expected` `value` is off."""
    return abs(value - expected) / abs(expected) if expected else (0.0 if not value else 1.0)


@contextlib.contextmanager
def switched_off(part: str) -> Iterator[None]:
    """Agents that are started in it leave that part out."""
    os.environ[VARIABLE] = part
    try:
        yield
    finally:
        del os.environ[VARIABLE]
