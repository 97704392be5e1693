"""Chunks from three sites at once against the sum of what their links carry, and one of them killed in the middle.

Real agents in lab sites; the chunks are random, so what counts is what the links carry. The rate is that of chunk bytes
(headers of IP, TCP, TLS and frames are not counted) from the first question to the last chunk kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.support.fleet import Fleet, fleet  # noqa: E402

from haulier.agent.site import Site  # noqa: E402
from haulier.chunks.fingerprint import fingerprint  # noqa: E402
from haulier.chunks.store import ChunkStore  # noqa: E402
from haulier.fetch.fetching import fetch  # noqa: E402
from haulier.fetch.holders import sources_of  # noqa: E402
from haulier.lab.scenario import LabSite  # noqa: E402
from haulier.units import CHUNK  # noqa: E402

SOURCES = ("one", "two", "three")


def take(root: Path, wanted: Path, names: list[str], cached: float = 0.0) -> dict[str, Any]:
    """At the target: fetch into a store that has the first `cached` of them (0 to 1) already; what came by when."""
    site = Site.load(root)
    raw = wanted.read_bytes()
    fps = [raw[at : at + 32] for at in range(0, len(raw), 32)]
    came: list[tuple[float, int]] = []
    with ChunkStore(root / f"bench-{time.monotonic_ns()}") as store:
        if there := fps[: round(cached * len(fps))]:
            fetch(there, sources_of(site, only=names), store)
        began = time.monotonic()
        report = fetch(
            fps,
            sources_of(site, only=names),
            store,
            progress=lambda done, total: came.append((time.monotonic() - began, done)),
        )
    return {
        "seconds": report.seconds,
        "bytes": report.chunks * CHUNK,
        "by": {source.name: source.chunks for source in report.sources},
        "wasted": sum(source.wasted for source in report.sources),
        "came": came,
    }


def at_target(made: Fleet, wanted: Path, names: list[str], cached: float = 0.0) -> subprocess.Popen[str]:
    words = [sys.executable, str(HERE / "multisource.py"), str(made["target"].root), str(wanted), f"{cached:g}", *names]
    process: subprocess.Popen[str] = made.lab.popen("target", words, stdout=subprocess.PIPE, text=True)
    return process


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=600)
    return dict(json.loads(out.splitlines()[-1]))


def one(
    made: Fleet,
    wanted: Path,
    names: list[str],
    kill: LabSite | None = None,
    at: float = 0,
    *,
    cached: float = 0.0,
) -> dict[str, Any]:
    process = at_target(made, wanted, names, cached)
    if kill is not None:
        # The whole process goes without a word, as in a crash.
        timer = threading.Timer(at, kill.kill_agent, (signal.SIGKILL,))
        timer.start()
    found = result(process)
    if kill is not None:
        timer.join()
        kill.start_agent()
    return found


@contextlib.contextmanager
def holding(rates: Sequence[int], rtts: Sequence[int], seconds: int) -> Iterator[tuple[Fleet, Path]]:
    """A target, and three sites that hold as much as their links carry in so many seconds; a file of what to want."""
    links = [
        (name, "target", f"{rate}mbit", f"{rtt / 2}ms") for name, rate, rtt in zip(SOURCES, rates, rtts, strict=True)
    ]
    stored = [os.urandom(CHUNK) for _ in range(int(sum(rates) * 1e6 / 8 * seconds / CHUNK))]

    def prepare(name: str, root: Path) -> None:
        if name != "target":
            root.mkdir(parents=True, exist_ok=True)
            with ChunkStore(root / "store") as store:
                for chunk in stored:
                    store.put(chunk, lease="bench")

    with fleet(["target", *SOURCES], links, prepare=prepare) as made:
        wanted = made.work / "wanted"
        wanted.write_bytes(b"".join(fingerprint(chunk) for chunk in stored))
        yield made, wanted


def run(quick: bool) -> Any:
    from report import Report, Target

    rows: list[dict[str, object]] = []
    targets: list[Target] = []
    backend = ""
    cases = [
        ("equal: 3 x 40 Mbit/s, 20/50/80 ms", (40, 40, 40), (20, 50, 80), 0.90),
        ("unequal: 60/30/10 Mbit/s, 20/50/150 ms", (60, 30, 10), (20, 50, 150), 0.85),
    ]
    for what, rates, rtts, least in cases:
        total = sum(rates)
        with holding(rates, rtts, 16 if quick else 24) as (made, wanted):
            backend = made.lab.backend
            single = one(made, wanted, [SOURCES[0]]) if not quick else None
            whole = one(made, wanted, list(SOURCES))
            rate = whole["bytes"] * 8 / whole["seconds"] / 1e6
            rows.append(_row(what, rate / total, rate, whole))
            if single is not None:
                alone = single["bytes"] * 8 / single["seconds"] / 1e6
                rows.append(_row(f"  only the first, {rates[0]} Mbit/s", alone / rates[0], alone, single))
            targets.append(Target.at_least(f"{what}: share of the sum", rate / total, least))
            if least == 0.90:
                killed = one(made, wanted, list(SOURCES), made["two"], whole["seconds"] / 2)
                # From then on the other two have to bring what is left.
                share = rates[1] / total
                ideal = whole["seconds"] / 2 + whole["seconds"] / 2 / (1 - share)
                rate = killed["bytes"] * 8 / killed["seconds"] / 1e6
                rows.append(_row("  the second killed in the middle", rate / total, rate, killed))
                targets.append(
                    Target.at_most(
                        "killed in the middle: time against the share that it costs", killed["seconds"] / ideal, 1.10
                    )
                )
    return Report(rows=rows, targets=targets, link=f"three lab links ({backend})", notes=[f"load {os.getloadavg()}"])


def _row(what: str, ratio: float, rate: float, found: dict[str, Any]) -> dict[str, object]:
    return {
        "ratio": ratio,
        "what": what,
        "Mbit/s": rate,
        "seconds": found["seconds"],
        "MB": found["bytes"] / 1e6,
        "chunks by source": " ".join(f"{name}:{count}" for name, count in found["by"].items()),
        "wasted": found["wasted"],
    }


if __name__ == "__main__":
    print(json.dumps(take(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4:], float(sys.argv[3]))), flush=True)
