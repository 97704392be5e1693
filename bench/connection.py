"""One client's connections over real handoffs of a VM: a stream as fast as it goes, and an echo every 10 ms.

`keep`: the address stays at the old site, a tunnel leads on from there. `mptcp`: connections move to an address of the
new site, which the client joins before the move ("ahead") or once the guest is there ("after"). `hook`: the client's
route follows the guest. `relay`: the client speaks plain TCP to HAProxy beside it, which speaks MPTCP to the guest
(left out where haproxy and mptcpize are not installed). The client asks from a site of its own, a round trip of 10 ms
from either; that between the two sites is 20 ms, at 20 or 5 Mbit/s once the guest has moved (the handoff itself has
50). Needs root.

With `keep` each move has a client of its own, and leads away from home. With `mptcp` and `hook` one client stays, and
the guest moves there and back under it. --only takes rows (keep-20, mptcp-ahead, ...; wildcards too). With --parts
FOLDER what ten moves found is kept there, and is not measured again; --steps N measures so many parts more.

    python bench/connection.py picture RESULT.json OUT.svg     throughput and echo over time, as the client saw them
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

PORT, MPTCP_PORT = 7100, 7101
WARM_UP_S, BEFORE_S = 2.0, 2.0
SETTLED_S, AFTER_S = 3.0, 6.0
REST_S = 4.0
"""Then both sites start their next workers, on this one machine: what comes before the next move is not to show it."""
MOVES, PART = 20, 10
RTT_S = 0.03
"""There and back by way of both sites."""
SERVER = f"""
import os, socket, threading
def serve(s):
    try:
        s.setsockopt(6, 1, 1)
        if s.recv(1) == b"S":
            data = os.urandom(65536)
            while True: s.sendall(data)
        while True:
            got = s.recv(4096)
            if not got: return
            s.sendall(got)
    except OSError: pass
if os.fork() == 0:
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2): os.dup2(null, fd)
    def listen(port, protocol):
        l = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
        l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        l.bind(("0.0.0.0", port))
        l.listen(64)
        while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
    threading.Thread(target=listen, args=({MPTCP_PORT}, 262), daemon=True).start()
    listen({PORT}, 0)
"""


@dataclass(frozen=True)
class Row:
    """A policy, when clients join the new address, and Mbit/s between the sites after the move."""

    name: str
    label: str
    policy: str
    join: str
    tunnel_mbps: float
    relayed: bool = False


ROWS = (
    Row("keep-20", "keep, tunnel 20 Mbit/s", "keep", "ahead", 20.0),
    Row("keep-5", "keep, tunnel 5 Mbit/s", "keep", "ahead", 5.0),
    Row("mptcp-ahead", "mptcp, ahead", "mptcp", "ahead", 5.0),
    Row("mptcp-after", "mptcp, after", "mptcp", "after", 5.0),
    Row("hook", "hook", "hook", "ahead", 20.0),
    Row("relay", "mptcp, plain TCP by a relay", "mptcp", "ahead", 5.0, relayed=True),
)


class Client:
    """Two connections, and when what came on them."""

    def __init__(self, lab: Any, host: str, mptcp: bool = False) -> None:
        self.mptcp = mptcp
        self.received: list[tuple[float, int]] = []
        self.echoes: list[tuple[float, float]] = []
        self.errors: list[str] = []
        self._over = threading.Event()
        self.socks = [lab.call("client", lambda: self._dial(host, mptcp)) for _ in range(2)]
        self._threads = [
            threading.Thread(target=work, args=(sock,), daemon=True)
            for work, sock in zip((self._stream, self._echo), self.socks, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _dial(self, host: str, mptcp: bool) -> socket.socket:
        from haulier.session.mptcp import protocol

        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol(mptcp))
        sock.settimeout(60)
        sock.connect((host, MPTCP_PORT if mptcp else PORT))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _stream(self, sock: socket.socket) -> None:
        try:
            sock.sendall(b"S")
            while not self._over.is_set():
                got = len(sock.recv(1 << 16))
                if not got:
                    raise ConnectionError("the stream ended")
                self.received.append((time.time(), got))
        except OSError as error:
            self._fail(error)

    def _echo(self, sock: socket.socket) -> None:
        try:
            sock.sendall(b"E")
            while not self._over.wait(0.01):
                at = time.time()
                sock.sendall(b"12345678")
                left = 8
                while left:
                    got = len(sock.recv(left))
                    if not got:
                        raise ConnectionError("the echo ended")
                    left -= got
                self.echoes.append((at, time.time() - at))
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._over.is_set():
            self.errors.append(repr(error))

    def close(self) -> None:
        self._over.set()
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)

    # -- what it saw

    def mbps(self, start: float, end: float) -> float:
        return sum(n for at, n in self.received if start <= at < end) * 8 / (end - start) / 1e6

    def gap(self, start: float, end: float) -> float:
        times = [start, *(at for at, _ in self.received if start <= at < end), end]
        return max(b - a for a, b in itertools.pairwise(times))

    def echo_ms(self, start: float, end: float) -> float:
        found = [took for at, took in self.echoes if start <= at < end]
        return median(found) * 1000 if found else float("inf")

    def longest_echo(self, start: float, end: float) -> float:
        return max((took for at, took in self.echoes if start - 5 <= at < end), default=float("inf"))

    def full_after(self, start: float, end: float, mbps: float) -> float:
        """Seconds from `start` until half a second carried nine tenths of `mbps` or more."""
        steps = [start + n / 20 for n in range(int((end - 0.5 - start) * 20))]
        return next((at - start for at in steps if self.mbps(at, at + 0.5) >= 0.9 * mbps), float("inf"))

    def series(self, zero: float, start: float, end: float) -> dict[str, list[Any]]:
        """Throughput and echo by tenths of a second."""
        steps = [start + n / 10 for n in range(int((end - start) * 10))]
        echoes = [[took for at, took in self.echoes if step <= at < step + 0.1] for step in steps]
        return {
            "at": [round(step - zero, 2) for step in steps],
            "mbps": [round(self.mbps(step, step + 0.1), 2) for step in steps],
            "echo_ms": [round(max(found) * 1000, 1) if found else None for found in echoes],
        }


def start_server(stage: Any) -> None:
    from haulier.guests.agent import GuestAgent
    from haulier.handoff.residence import guest_paths

    with GuestAgent(guest_paths(stage.oslo.site, "web1").qga_sock, name="web1", timeout=30) as agent:
        agent.check(["/usr/bin/python3", "-c", SERVER])


# -- moves


class Moving:
    """The lab with its guest, made when it is first needed, and anew after a move that came to nothing."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._stage: Any = None

    def stage(self) -> Any:
        if self._stage is None:
            from haulier.lab.scenario import scenario, template, wan

            stage = self._open.enter_context(scenario("bench-connection", template(512), [wan("50mbit", "10ms")]))
            stage.give_pools()
            stage.start_guest()
            start_server(stage)
            self._stage = stage
        return self._stage

    def move(self, name: str, row: Row, count: int) -> list[dict[str, Any]]:
        print(f"== {name}", file=sys.stderr, flush=True)
        return move(self.stage(), row, count)

    def close(self) -> None:
        self._stage = None
        self._open.close()


def rate(stage: Any, mbps: float) -> None:
    (wan,) = stage.lab.links_between("oslo", "lisbon")
    stage.lab.link(wan).set(rate_bps=mbps * 1e6)


def move(stage: Any, row: Row, count: int) -> list[dict[str, Any]]:
    """So many moves, as a client sees each. The guest is at oslo before and after."""
    from haulier.lab.scenario import hook_script

    rate(stage, 50)
    # A hook that fails leads nobody: what is seen is the policy's doing.
    hook = stage.work / "moved-hook"
    hook.write_text(hook_script(stage.lab) if row.policy == "hook" else "#!/bin/sh\nexit 1\n")
    stage.route("oslo")
    stage.oslo.facts("guest", "net", "web1", row.policy)
    found: list[dict[str, Any]] = []
    at, to, client = "oslo", "lisbon", None
    open_ = contextlib.ExitStack()
    if row.relayed:
        open_.enter_context(relay(stage))
    try:
        for number in range(count):
            if client is None:
                client = dial(stage, row, at)
            found.append(one(stage, row, client, at, to) | {"number": number})
            if number:
                found[-1].pop("series")
            at, to = to, at
            if row.policy == "keep" or client.errors:
                client.close()
                client = None
            if row.policy == "keep":
                stage.hand_over("web1", at, to)
                at, to = to, at
    finally:
        if client is not None:
            client.close()
        open_.close()
        rate(stage, 50)
    if at != "oslo":
        stage.hand_over("web1", at, to)
    # The connections that were just closed here may be open in the guest for a while: they must not meet the next row.
    deadline = time.monotonic() + 60
    while stage.oslo.facts("doctor", "--network")["tunnels"] and time.monotonic() < deadline:
        time.sleep(1)
    return found


def site_address(stage: Any, at: str) -> str:
    return str(stage.sites[at].facts("guest", "show", "web1")["spec"]["site_address"])


@contextlib.contextmanager
def relay(stage: Any) -> Iterator[None]:
    """HAProxy where the client is, as `haulier relay` runs it."""
    words = ["--listen", f"127.0.0.1:{PORT}", "--to", f"{site_address(stage, 'oslo')}:{MPTCP_PORT}"]
    command = [sys.executable, "-m", "haulier", "relay", "web1", *words, "--directory", str(stage.work / "relay")]
    with stage.lab.popen("client", command) as process:
        try:
            deadline = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    stage.lab.call("client", lambda: socket.create_connection(("127.0.0.1", PORT), 1)).close()
                    break
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


def dial(stage: Any, row: Row, at: str) -> Client:
    """A client whose stream flows at its full rate."""
    from haulier.lab.scenario import GUEST_ADDRESS

    host = site_address(stage, at) if row.policy == "mptcp" else GUEST_ADDRESS.partition("/")[0]
    client = Client(stage.lab, "127.0.0.1") if row.relayed else Client(stage.lab, host, mptcp=row.policy == "mptcp")
    time.sleep(WARM_UP_S + BEFORE_S)
    return client


def one(stage: Any, row: Row, client: Client, at: str, to: str) -> dict[str, Any]:
    """One move."""
    from haulier.session.mptcp import subflows

    begun = time.time()
    report = stage.hand_over("web1", at, to, "--join", row.join)["report"]
    rate(stage, row.tunnel_mbps)
    running = report["running_at"]
    time.sleep(max(0.0, running + SETTLED_S + AFTER_S - time.time()))
    end = time.time()
    rate(stage, 50)
    time.sleep(REST_S)
    before = client.mbps(begun - BEFORE_S, begun)
    return {
        "downtime_s": report["downtime_ms"] / 1000,
        "total_s": report["total_s"],
        "gap_s": client.gap(begun, end),
        "longest_echo_s": client.longest_echo(begun, end),
        "before": before,
        "full_after_s": client.full_after(running, end, before),
        "subflows": [subflows(sock) for sock in client.socks] if client.mptcp else [],
        "tunnels": len(stage.oslo.facts("doctor", "--network")["tunnels"]),
        "clients": stage.sites[to].facts("status", report["handoff"])["report"].get("clients", {}),
        "during": client.mbps(begun, report["stopped_at"]),
        "after": client.mbps(running + SETTLED_S, end),
        "echo_before_ms": client.echo_ms(begun - BEFORE_S, begun),
        "echo_during_ms": client.echo_ms(begun, report["stopped_at"]),
        "echo_after_ms": client.echo_ms(running + SETTLED_S, end),
        "alive": not client.errors and client.mbps(end - 2, end) > 0,
        "errors": list(client.errors),
        "series": client.series(running, begun - 3, end),
    }


# -- rows


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Any:
    from experiments.parts import Parts, chosen
    from report import Report

    if os.geteuid() != 0:
        return Report(rows=[], notes=["labs need root: nothing was measured"])
    kept, moving = Parts(parts, steps), Moving()
    notes: list[str] = []
    found: dict[Row, list[dict[str, Any]]] = {}
    wanted, part = (2, 2) if quick else (MOVES, PART)
    with contextlib.closing(moving):
        for row in ROWS:
            if not chosen(row.name, only):
                continue
            if row.relayed and not (shutil.which("haproxy") and shutil.which("mptcpize")):
                notes.append("no relay: haproxy and mptcpize are not installed")
                continue
            for number in range(wanted // part):
                name = f"connection{' quick' * quick}: {row.name} {number + 1}"
                moves = kept.attempt(name, partial(moving.move, name, row, part), notes)
                if moves is not None:
                    found.setdefault(row, []).extend(moves)
                    continue
                with contextlib.suppress(Exception):
                    moving.close()
    return Report(
        rows=[summary(row, each) for row, each in found.items() if each],
        targets=list(targets({row: each for row, each in found.items() if each})),
        link="50 Mbit/s and 20 ms during the handoff, then as the rows say",
        notes=[
            *notes,
            *remarks(found),
            "the echo shares its link with the stream, so it waits in the same queue",
            "the client is 10 ms from either site, the sites 20 ms apart",
        ],
    )


def middle(found: Sequence[dict[str, Any]], key: str) -> float:
    return float(median(each[key] for each in found))


def worst(found: Sequence[dict[str, Any]], key: str) -> float:
    return float(max(each[key] for each in found))


def summary(row: Row, found: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Medians, and the worst of what should be short."""
    return {
        "after / before": middle(found, "after") / middle(found, "before"),
        "policy": row.label,
        "moves": len(found),
        "alive": sum(each["alive"] for each in found),
        "downtime s": middle(found, "downtime_s"),
        "worst downtime": worst(found, "downtime_s"),
        "gap s": middle(found, "gap_s"),
        "worst gap": worst(found, "gap_s"),
        "longest echo s": middle(found, "longest_echo_s"),
        "worst echo": worst(found, "longest_echo_s"),
        "full again s": middle(found, "full_after_s"),
        "worst full again": worst(found, "full_after_s"),
        "Mbit/s before": middle(found, "before"),
        "during": middle(found, "during"),
        "after": middle(found, "after"),
        "worst after": min(each["after"] for each in found),
        "echo ms before": middle(found, "echo_before_ms"),
        "echo during": middle(found, "echo_during_ms"),
        "echo after": middle(found, "echo_after_ms"),
        "series": next((each["series"] for each in found if "series" in each), {}),
    }


def targets(found: dict[Row, list[dict[str, Any]]]) -> Iterator[Any]:
    from report import Target

    for row, moves in found.items():
        label = row.label
        yield Target.at_least(f"{label}: moves whose connections lived", sum(m["alive"] for m in moves), len(moves))
        extra = [move["gap_s"] - move["downtime_s"] for move in moves]
        allowed = 0.1 + 2 * RTT_S
        yield Target.at_most(f"{label}: gap beyond the downtime, median, s", median(extra), allowed)
        yield Target.at_most(f"{label}: gap beyond the downtime, worst, s", max(extra), allowed)
        if row.policy == "keep":
            continue
        yield Target.at_most(f"{label}: full throughput again, median, s", middle(moves, "full_after_s"), 2.0)
        yield Target.at_most(f"{label}: full throughput again, worst, s", worst(moves, "full_after_s"), 2.0)
        ratio = middle(moves, "echo_after_ms") / middle(moves, "echo_before_ms")
        yield Target.at_most(f"{label}: echo after / before, both by direct paths", ratio, 1.25)
        if row.policy == "mptcp":
            yield Target.at_most(f"{label}: tunnels left", worst(moves, "tunnels"), 0)
            for other, detour in found.items():
                if other.policy == "keep":
                    at_least = 13.0 if other.tunnel_mbps == 5 else 1.0
                    name = f"{label}: throughput after, against {other.label}"
                    yield Target.at_least(name, middle(moves, "after") / middle(detour, "after"), at_least)


def remarks(found: dict[Row, list[dict[str, Any]]]) -> Iterator[str]:
    for row, moves in found.items():
        yield from (f"{row.label}: move {move['number']}: {error}" for move in moves for error in move["errors"])
        if row.policy == "mptcp":
            took = [move["clients"].get("moved_s", 0.0) for move in moves]
            left = sum(move["clients"].get("left", 0) > 0 for move in moves)
            swapped = f"addresses swapped in {median(took):.2f} s, at worst {max(took):.2f}"
            yield f"{row.label}: {swapped}; {left} moves left connections at the old one"


# -- a picture of it

COLOURS = ("#8250df", "#bc4c00", "#1f6feb", "#1a7f37", "#6e7781", "#bf3989")
WIDTH, PANEL, LEFT = 760, 200, 56
FROM_S, TO_S = -3.0, 9.0


def picture(result: dict[str, Any]) -> str:
    """An SVG of two panels, throughput and echo, with a line for each row of the result."""
    rows = [row for row in result["rows"] if row.get("series")]
    out: list[str] = []
    for number, row in enumerate(rows):
        x, y = LEFT + 10 + number % 3 * 230, 22 + number // 3 * 18
        out.append(f'<rect x="{x}" y="{y - 9}" width="14" height="4" fill="{COLOURS[number % len(COLOURS)]}"/>')
        out.append(f'<text x="{x + 20}" y="{y}">{row["policy"]}</text>')
    panels = (("mbps", "Mbit/s of the stream", 110.0, mean), ("echo_ms", "slowest echo, ms", 400.0, max))
    for place, (key, title, high, of) in enumerate(panels):
        top = 60 + place * (PANEL + 46)
        out.append(f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 16}" height="{PANEL}" fill="#f6f8fa"/>')
        out += [f'<text x="{LEFT}" y="{top - 6}" font-weight="bold">{title}</text>', *_scale(top, high)]
        for number, row in enumerate(rows):
            points = _points(row["series"], key, of)
            line = " ".join(f"{_x(at):.1f},{top + PANEL - min(value, high) / high * PANEL:.1f}" for at, value in points)
            colour = COLOURS[number % len(COLOURS)]
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    height = 60 + 2 * (PANEL + 46)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    head += 'font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *out, "</svg>\n"])


def _x(at: float) -> float:
    return LEFT + (at - FROM_S) / (TO_S - FROM_S) * (WIDTH - LEFT - 16)


def _points(series: dict[str, Any], key: str, of: Any) -> list[tuple[float, float]]:
    """Three tenths of a second at a time; an echo that took long is as old as its answer, so some tenths have none."""
    known = [
        (at, value) for at, value in zip(series["at"], series[key], strict=True) if value is not None and at < TO_S
    ]
    return [
        (at, of([value for other, value in known if at - 0.15 <= other <= at + 0.15]))
        for at, _ in known
        if at >= FROM_S
    ]


def _scale(top: int, high: float) -> list[str]:
    out = []
    for step in range(5):
        value, y = high * step / 4, top + PANEL - PANEL * step / 4
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{y}" y2="{y}" stroke="#d0d7de" stroke-width="0.5"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.0f}</text>')
    for second in range(int(FROM_S), int(TO_S) + 1, 3):
        label = "0: the guest runs at the new site" if second == 0 else f"{second} s"
        out.append(f'<text x="{_x(second):.0f}" y="{top + PANEL + 16}" text-anchor="middle">{label}</text>')
    dash = 'stroke="#57606a" stroke-dasharray="3"'
    return [*out, f'<line x1="{_x(0):.0f}" x2="{_x(0):.0f}" y1="{top}" y2="{top + PANEL}" {dash}/>']


if __name__ == "__main__" and sys.argv[1:2] == ["picture"]:
    Path(sys.argv[3]).write_text(picture(json.loads(Path(sys.argv[2]).read_text())))
