"""Several paths between two sites: one TCP connection, one MPTCP connection, and striping over a connection each.

All three are haulier's session, between two sites of a lab as root; what is counted is payload that the other site has
acknowledged. A steady case is judged against the sum of what one TCP connection carries on each path alone; then a path
dies and returns, and a path's rate collapses.

--only takes cases by their names, wildcards too ("20+5*", "*dies*"). With --parts FOLDER each case is kept there, and
is not measured again; --steps N measures so many cases more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.support.certs import TestCa  # noqa: E402

from haulier.errors import HaulierError  # noqa: E402
from haulier.lab.lab import Lab  # noqa: E402
from haulier.network import addresses, mptcp  # noqa: E402
from haulier.session import PathAddress, Session, TlsConfig  # noqa: E402

SECRET = b"benchmark secret"
PORT = 7999
MESSAGE = 64 * 1024
SAMPLE_S = 0.05
WARM_UP_S = 3.0


@dataclass(frozen=True)
class Way:
    """One link: Mbit/s and the round trip in ms."""

    mbps: float
    rtt_ms: float
    loss: float = 0.0

    def toml(self) -> str:
        return (
            f'[[link]]\na = "here"\nb = "there"\nrate = "{self.mbps}mbit"\ndelay = "{self.rtt_ms / 2}ms"\n'
            f"loss = {self.loss}\n"
        )


@dataclass(frozen=True)
class Change:
    """At `at` seconds the link `which` becomes what `settings` say."""

    at: float
    which: int
    settings: dict[str, Any]


# -- the two ends, each a process of its own


def tls_of(directory: Path, site: str) -> TlsConfig:
    return TlsConfig(directory / f"{site}.pem", directory / f"{site}.key", directory / "ca.pem")


def listen(directory: Path, how: str) -> None:
    """Takes whatever comes and drops it."""
    session = Session.listen(
        tls_of(directory, "there"), SECRET, bind=("0.0.0.0", "::"), port=PORT, mptcp=how == "mptcp"
    )
    session.on(1, lambda message: None)
    print("ready", flush=True)
    session.wait_over()


def connect(directory: Path, how: str, seconds: float, hosts: list[str]) -> None:
    """Sends as much as goes, and notes what has been acknowledged when."""
    here = {
        uplink.interface: uplink for uplink in addresses.uplinks() if uplink.version == (6 if ":" in hosts[0] else 4)
    }
    ways = []
    for host in hosts:
        uplink = here[addresses.leaving_by(host)]
        ways.append((uplink, host))
    steps = mptcp.plan(ways[0][1], ways[1:]) if how == "mptcp" else []
    mptcp.apply(steps)
    peers = [PathAddress(host, PORT, uplink.interface, uplink.address) for uplink, host in ways]
    session = Session.connect(tls_of(directory, "here"), SECRET, peers, mptcp=how == "mptcp")
    session.wait_connected(10)
    payload, sent = os.urandom(MESSAGE), 0

    def fill() -> None:
        nonlocal sent
        with contextlib.suppress(HaulierError):
            while True:
                session.send(1, payload)
                sent += MESSAGE

    threading.Thread(target=fill, daemon=True).start()
    began = time.monotonic()
    print("begun", flush=True)
    samples = []
    while (now := time.monotonic() - began) < seconds:
        samples.append((round(now, 3), sent - session.unacked(1)))
        time.sleep(SAMPLE_S)
    found = {
        "samples": samples,
        "transport": session.transport(),
        "paths": [(p.name, p.rate_bps / 1e6, p.rtt_s, p.loss, p.resent) for p in session.paths()],
    }
    session.abort("measured")
    mptcp.undo(steps)
    print(json.dumps(found), flush=True)


# -- one run


def mbps(samples: Sequence[tuple[float, int]], start: float, end: float) -> float:
    """Payload acknowledged between two moments."""
    inside = [sample for sample in samples if start <= sample[0] <= end]
    (t0, n0), (t1, n1) = inside[0], inside[-1]
    return (n1 - n0) * 8 / (t1 - t0) / 1e6


@contextlib.contextmanager
def peer(made: Lab, directory: Path, how: str) -> Iterator[None]:
    words = [sys.executable, str(HERE / "multipath.py"), "listen", str(directory), how]
    with made.popen("there", words, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the listening end did not start")
            yield
        finally:
            process.kill()


def one(
    made: Lab,
    directory: Path,
    how: str,
    hosts: list[str],
    seconds: float,
    changes: Sequence[Change] = (),
    watch: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """One transfer of so many seconds, with changes of the links in between."""
    links = made.links_between("here", "there")
    words = [sys.executable, str(HERE / "multipath.py"), "connect", str(directory), how, str(seconds), *hosts]
    with peer(made, directory, how), made.popen("here", words, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout.readline() != "begun\n":
            raise RuntimeError("the connecting end did not start")
        began = time.monotonic()
        for change in changes:
            while (left := began + change.at - time.monotonic()) > 0:
                time.sleep(min(left, 0.05))
                if watch is not None:
                    watch(time.monotonic() - began)
            made.link(links[change.which]).set(**change.settings)
        while watch is not None and time.monotonic() - began < seconds - 1:
            watch(time.monotonic() - began)
            time.sleep(0.05)
        out = process.communicate(timeout=seconds + 30)[0]
    if process.returncode:
        raise RuntimeError("the connecting end failed")
    return dict(json.loads(out.splitlines()[-1]))


@contextlib.contextmanager
def links(paths: Sequence[Way]) -> Iterator[Lab]:
    from tests.support.labs import lab

    sites = 'name = "bpaths"\nipv6 = true\n[[site]]\nname = "here"\n[[site]]\nname = "there"\n'
    with lab(sites + "".join(path.toml() for path in paths)) as made:
        yield made


# -- the cases


def steady(directory: Path, paths: Sequence[Way], seconds: float, *, ipv6: bool = False) -> dict[str, Any]:
    """One TCP on each path alone, MPTCP, striping."""
    found: dict[str, Any] = {}
    with links(paths) as made:
        names = made.links_between("here", "there")
        hosts = [(made.address6 if ipv6 else made.address)("there", name) for name in names]

        def rate(how: str, hosts: list[str]) -> float:
            run = one(made, directory, how, hosts, WARM_UP_S + seconds)
            found.setdefault("transport", {})[how] = run["transport"]
            return mbps(run["samples"], WARM_UP_S, WARM_UP_S + seconds)

        singles: list[float] = []
        for number, host in enumerate(hosts):
            same = next((singles[n] for n in range(number) if paths[n] == paths[number]), None)
            singles.append(rate("tcp", [host]) if same is None else same)
        found |= {"tcp": max(singles), "sum": sum(singles), "nominal": sum(path.mbps for path in paths)}
        found["mptcp"] = rate("mptcp", hosts)
        found["striping"] = rate("striping", hosts)
    return found


def dying(directory: Path, how: str, which: int) -> dict[str, float]:
    """10+10; a path dies after 5 s and returns after 10."""
    used_again: list[float] = []
    with links([Way(10, 20), Way(10, 20)]) as made:
        names = made.links_between("here", "there")
        hosts = [made.address("there", name) for name in names]
        quiet: list[int] = []

        def watch(now: float) -> None:
            if now < 10.0:
                quiet[:] = [made.wire_bytes(names[which])[0]]
            elif not used_again and made.wire_bytes(names[which])[0] > quiet[0] + 100_000:
                used_again.append(now - 10.0)

        changes = [Change(5, which, {"up": False}), Change(10, which, {"up": True})]
        run = one(made, directory, how, hosts, 18, changes, watch)
    samples = run["samples"]
    return {
        "before": mbps(samples, 3, 5),
        "during": mbps(samples, 6, 10),
        "first second": mbps(samples, 5, 6),
        "after": mbps(samples, 13, 18),
        "used again s": used_again[0] if used_again else float("inf"),
    }


def collapsing(directory: Path, how: str) -> dict[str, float]:
    """25+20 at 40 ms; after 5 s the first has 3, after 12 s 25 again."""
    with links([Way(25, 40), Way(20, 40)]) as made:
        hosts = [made.address("there", name) for name in made.links_between("here", "there")]
        changes = [Change(5, 0, {"rate_bps": 3e6}), Change(12, 0, {"rate_bps": 25e6})]
        samples = one(made, directory, how, hosts, 18, changes)["samples"]
    return {
        "before": mbps(samples, 3, 5),
        "first second": mbps(samples, 5, 6),
        "during": mbps(samples, 6, 12),
        "after": mbps(samples, 14, 18),
    }


STEADY: dict[str, tuple[Way, ...]] = {
    "10+10, 20 ms": (Way(10, 20), Way(10, 20)),
    "20+5, 20 ms": (Way(20, 20), Way(5, 20)),
    "20+10, 20 and 80 ms": (Way(20, 20), Way(10, 80)),
    "50+50, 40 ms": (Way(50, 40), Way(50, 40)),
    "10+20+5, 20 to 60 ms": (Way(10, 20), Way(20, 40), Way(5, 60)),
}


def cases(directory: Path, quick: bool) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    seconds = 5.0 if quick else 15.0
    found: dict[str, Callable[[], Any]] = {}
    for loss in (0.0, 0.01):
        for what, paths in STEADY.items():
            if quick and loss and not what.startswith(("10+10", "20+10")):
                continue
            label = f"{what}, {loss:.0%} loss" if loss else what
            found[label] = partial(steady, directory, [Way(path.mbps, path.rtt_ms, loss) for path in paths], seconds)
    found["10+10, 20 ms, IPv6"] = partial(steady, directory, STEADY["10+10, 20 ms"], seconds, ipv6=True)
    for which in (0, 1):
        found[f"{DIES} {which + 1} dies and returns"] = partial(both, dying, directory, which)
    found[COLLAPSES] = partial(both, collapsing, directory)
    return found


DIES, COLLAPSES = "10+10, path", "25+20, the first falls to 3"
MOMENTS = {
    DIES: (("first second", 9.65), ("during", 9.65), ("after", 19.3)),
    COLLAPSES: (("before", 43.4), ("first second", 22.2), ("during", 22.2), ("after", 43.4)),
}
"""When, and 96.5 % of the rates that there are then."""


def both(case: Callable[..., dict[str, float]], directory: Path, *words: int) -> dict[str, dict[str, float]]:
    return {how: case(directory, how, *words) for how in ("mptcp", "striping")}


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Any:
    from experiments.parts import Parts, chosen
    from report import Report

    if os.geteuid() != 0:
        return Report(rows=[], notes=["labs need root: nothing was measured"])
    kept = Parts(parts, steps)
    report: Any = Report(
        rows=[],
        targets=[],
        link="pairs and threes of lab links, as each row says",
        notes=["the sum is that of one TCP on each path alone; where paths change, 96.5 % of the links' rates"],
    )
    with tempfile.TemporaryDirectory(prefix="haulier-bench-paths-") as name:
        directory = Path(name)
        ca = TestCa(directory)
        ca.site("here"), ca.site("there")
        for label, measure in cases(directory, quick).items():
            if not chosen(label, only):
                continue
            name = f"multipath{' quick' * quick}: {label}"
            if (found := kept.attempt(name, partial(said, label, measure), report.notes)) is not None:
                enter(report, label, found)
    return report


def said(label: str, measure: Callable[[], Any]) -> Any:
    print(f"== multipath: {label}", file=sys.stderr, flush=True)
    return measure()


def enter(report: Any, label: str, found: dict[str, Any]) -> None:
    """A case's rows, targets and notes."""
    from report import Target

    def row(when: str, sum_: float, tcp: float | None, multi: float, stripe: float) -> None:
        report.rows.append(
            {
                "striping / sum": stripe / sum_,
                "MPTCP / sum": multi / sum_,
                "paths, Mbit/s": label,
                "when": when,
                "sum": sum_,
                "one TCP": tcp,
                "MPTCP": multi,
                "striping": stripe,
            }
        )

    moments = next((each for start, each in MOMENTS.items() if label.startswith(start)), ())
    if not moments:
        row("steady", found["sum"], found["tcp"], found["mptcp"], found["striping"])
        share = found["striping"] / found["sum"]
        report.targets.append(Target.at_least(f"{label}: striping, share of the sum", share, 0.95))
        if not found["transport"]["mptcp"].startswith("MPTCP"):
            report.notes.append(f"{label}: asked for MPTCP, got {found['transport']['mptcp']}")
        return
    multi, stripe = found["mptcp"], found["striping"]
    for when, sum_ in moments:
        row(when, sum_, None, multi[when], stripe[when])
    if label == COLLAPSES:
        share = stripe["during"] / 22.2
        report.targets.append(Target.at_least(f"{label}: striping, share of what remains", share, 0.90))
    else:
        again = stripe["used again s"]
        report.notes.append(f"{label}: used again after {again:.2f} s (MPTCP: {multi['used again s']:.2f} s)")
        report.targets.append(Target.at_most(f"{label}: used again after, s", again, 2.0))


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        listen(Path(sys.argv[2]), sys.argv[3])
    else:
        connect(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5:])
        os._exit(0)
