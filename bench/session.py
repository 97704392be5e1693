"""The bulk session against one plain TLS stream: throughput, and how long a small message waits behind bulk.

On loopback the processors are the limit. As root, also on lab links: 10 Mbit/s with 50 ms round trip, and two such
links at once (one way each 25 ms). The plain stream is a blocking TLS 1.3 socket fed by sendall; its small
messages go over a second connection, so that only the link's queue is in their way, not the stream's own buffers.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tests.support.certs import TestCa  # noqa: E402

from haulier.errors import HaulierError  # noqa: E402
from haulier.session import PathAddress, Session, TlsConfig  # noqa: E402

SECRET = b"benchmark secret"
MESSAGE = 256 * 1024
WARM_UP_S = 1.5
PORT = 7999

LINK = 'a = "here"\nb = "there"\nrate = "10mbit"\ndelay = "25ms"'
LAB = 'name = "bsession"\n[[site]]\nname = "here"\n[[site]]\nname = "there"\n'


# -- the two ends, each a process of its own


def tls_of(directory: Path, site: str) -> TlsConfig:
    return TlsConfig(directory / f"{site}.pem", directory / f"{site}.key", directory / "ca.pem")


def listen(directory: Path) -> None:
    """Takes whatever comes: channel 1 is dropped, channel 2 sent back; the plain streams likewise."""
    tls = tls_of(directory, "there")
    plain = socket.create_server(("0.0.0.0", PORT + 1))
    context = tls.context(server=True)

    def take(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(sock, server_side=True) as stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            echo = stream.recv(1) == b"e"
            buffer = bytearray(256 * 1024)
            count = 0
            while got := stream.recv_into(buffer):
                count += got
                if echo:
                    stream.sendall(buffer[:got])

    def accept() -> None:
        while True:
            threading.Thread(target=take, args=(plain.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    session = Session.listen(tls, SECRET, port=PORT)
    session.on(1, lambda message: None)
    session.on(2, lambda message: session.send(2, message, urgent=True))
    print("ready", flush=True)
    session.wait_over()


def measure(acked: Callable[[], int], echo: Callable[[], None], seconds: float, pings: bool) -> dict[str, Any]:
    """Rate and echo times while something else keeps the link busy."""
    waits: list[float] = []
    time.sleep(WARM_UP_S)
    start, before, cpu = time.monotonic(), acked(), time.process_time()
    while time.monotonic() - start < seconds:
        at = time.monotonic()
        if pings:
            echo()
            waits.append(time.monotonic() - at)
        time.sleep(0.083)
    took, count = time.monotonic() - start, acked() - before
    return {
        "bytes_per_s": count / took,
        "cpu_s_per_gb": (time.process_time() - cpu) / count * 1e9,
        "echo_s": median(waits) if waits else None,
        "echo_worst_s": max(waits, default=None),
    }


def connect(directory: Path, hosts: list[str], seconds: float, urgent: bool) -> dict[str, Any]:
    """The session under load."""
    session = Session.connect(tls_of(directory, "here"), SECRET, [PathAddress(host, PORT) for host in hosts])
    answered = threading.Event()
    session.on(2, lambda message: answered.set())
    session.wait_connected(10)
    idle: list[float] = []

    def echo() -> None:
        answered.clear()
        session.send(2, b"ping", urgent=urgent)
        answered.wait(30)

    for _ in range(5):
        at = time.monotonic()
        echo()
        idle.append(time.monotonic() - at)
    payload, sent = os.urandom(MESSAGE), 0

    def fill() -> None:
        nonlocal sent
        with contextlib.suppress(HaulierError):
            while True:
                session.send(1, payload)
                sent += MESSAGE

    filler = threading.Thread(target=fill)
    filler.start()
    found = measure(lambda: sent - session.unacked(1), echo, seconds, pings=seconds > 3)
    found |= {"idle_s": median(idle), "rate_bps": session.rate_bps(), "rtt_s": session.rtt_s()}
    found["resent"] = sum(path.resent for path in session.paths())
    session.abort("measured")
    return found


def plain(directory: Path, hosts: list[str], seconds: float, urgent: bool) -> dict[str, Any]:
    """One TLS stream under load, and a second one for small messages."""
    context = tls_of(directory, "here").context(server=False)

    def dial(kind: bytes) -> ssl.SSLSocket:
        stream = context.wrap_socket(socket.create_connection((hosts[0], PORT + 1)))
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.sendall(kind)
        return stream

    bulk, small = dial(b"b"), dial(b"e")
    payload = os.urandom(MESSAGE)

    def fill() -> None:
        with contextlib.suppress(OSError):
            while True:
                bulk.sendall(payload)

    def acked() -> int:
        return int.from_bytes(bulk.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[120:128], sys.byteorder)

    def echo() -> None:
        small.sendall(b"ping")
        small.recv(100)

    at = time.monotonic()
    echo()
    idle = time.monotonic() - at
    threading.Thread(target=fill, daemon=True).start()
    found = measure(acked, echo, seconds, pings=seconds > 3)
    bulk.shutdown(socket.SHUT_RDWR)
    return found | {"idle_s": idle}


# -- the benchmark


@contextlib.contextmanager
def peer(command: Callable[[str, list[str]], list[str]], directory: Path) -> Iterator[None]:
    words = [sys.executable, str(HERE / "session.py"), "listen", str(directory)]
    with subprocess.Popen(command("there", words), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the listening end did not start")
            yield
        finally:
            process.kill()


def one(
    command: Callable[[str, list[str]], list[str]],
    directory: Path,
    how: str,
    hosts: list[str],
    seconds: float,
    urgent: bool = False,
) -> dict[str, Any]:
    words = [sys.executable, str(HERE / "session.py"), how, str(directory), str(seconds), str(int(urgent)), *hosts]
    with peer(command, directory):
        done = subprocess.run(command("here", words), stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def locally(site: str, words: list[str]) -> list[str]:
    return words


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def run(quick: bool) -> Any:
    from report import Report, Target

    rounds, seconds = (1, 6.0) if quick else (3, 15.0)
    rows: list[dict[str, object]] = []
    targets: list[Target] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="haulier-bench-session-") as name:
        directory = Path(name)
        ca = TestCa(directory)
        ca.site("here"), ca.site("there")

        # loopback
        ours, theirs = [], []
        for _ in range(rounds + 1):
            theirs.append(one(locally, directory, "plain", ["127.0.0.1"], 2.5))
            ours.append(one(locally, directory, "connect", ["127.0.0.1"], 2.5))
        session = median(o["bytes_per_s"] for o in ours)
        stream = median(t["bytes_per_s"] for t in theirs)
        rows.append(row("loopback", session / stream, session, stream, ours, theirs))
        targets.append(Target.at_least("loopback, one path, MB/s", session / 1e6, 300))

        if os.geteuid() != 0:
            notes.append("the lab links need root: left out")
        else:
            on_links(directory, rounds, seconds, rows, targets, notes)
    return Report(rows=rows, targets=targets, link="loopback; then 10 Mbit/s, 25 ms one way", notes=notes)


def on_links(
    directory: Path,
    rounds: int,
    seconds: float,
    rows: list[dict[str, object]],
    targets: list[Any],
    notes: list[str],
) -> None:
    from report import Target
    from tests.support.labs import lab

    for count in (1, 2):
        with lab(LAB + f"[[link]]\n{LINK}\n" * count) as made:
            hosts = [made.address("there", link) for link in made.links_between("here", "there")]
            rate = 1.25e6 * count
            ours, theirs, hurried = [], [], []
            for _ in range(rounds):
                theirs.append(one(made.command, directory, "plain", hosts, seconds))
                ours.append(one(made.command, directory, "connect", hosts, seconds))
                hurried.append(one(made.command, directory, "connect", hosts, seconds, urgent=True))
            session = median(o["bytes_per_s"] for o in (*ours, *hurried))
            stream = median(t["bytes_per_s"] for t in theirs)
            what = f"{count} x 10 Mbit/s, 50 ms"
            rows.append(row(what, session / stream, session, stream, ours, theirs))
            rows.append(row(f"{what}, urgent", session / stream, session, stream, hurried, theirs))
            targets.append(Target.at_least(f"{what}: share of the link as payload", session / rate, 0.95))
            for label, found in (("small", ours), ("urgent", hurried)):
                extra = 1000 * median(o["echo_s"] - 0.050 for o in found)
                targets.append(Target.at_most(f"{what}: what a message that is {label} waits for bulk, ms", extra, 50))
            told = median(o["rate_bps"] for o in ours)
            notes.append(
                f"{what}: back end {made.backend}; the session says {told / 1e6:.2f} Mbit/s, "
                f"round trip {1000 * median(o['rtt_s'] for o in ours):.1f} ms, "
                f"resent {sum(o['resent'] for o in ours)} bytes"
            )


def row(
    what: str, ratio: float, session: float, stream: float, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> dict[str, object]:
    def middle(found: list[dict[str, Any]], key: str) -> float | None:
        values = [one[key] for one in found if one[key] is not None]
        return median(values) if values else None

    return {
        "ratio": ratio,
        "where": what,
        "session MB/s": session / 1e6,
        "plain MB/s": stream / 1e6,
        "session echo ms": milliseconds(middle(ours, "echo_s")),
        "worst": milliseconds(middle(ours, "echo_worst_s")),
        "plain echo ms": milliseconds(middle(theirs, "echo_s")),
        "sender CPU s/GB": middle(ours, "cpu_s_per_gb"),
        "plain": middle(theirs, "cpu_s_per_gb"),
    }


if __name__ == "__main__":
    directory = Path(sys.argv[2])
    if sys.argv[1] == "listen":
        listen(directory)
    else:
        how = {"connect": connect, "plain": plain}[sys.argv[1]]
        print(json.dumps(how(directory, sys.argv[5:], float(sys.argv[3]), sys.argv[4] == "1")), flush=True)
        os._exit(0)
