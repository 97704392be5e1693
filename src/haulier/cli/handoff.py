"""`haulier handoff`: hand a guest to another site, with progress; Ctrl-C cancels."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated, Any

from cyclopts import Parameter
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from haulier.agent.client import Client
from haulier.cli.common import GuestName, Json, Root, bars, client, console, parse_seconds, plain, print_json, size
from haulier.errors import Conflict, HandoffFailed, HaulierError, PeerError, by_code

POLL_S = 0.25
AGENT_AWAY_S = 60.0
"""The agent may be restarted while a handoff goes on: the handoff does not mind."""


class _Interrupts:
    """Counts Ctrl-C: the first asks for a cancel, the second detaches."""

    def __init__(self) -> None:
        self.count = 0
        self.news = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.news.set()


@contextlib.contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    caught = _Interrupts()
    before = signal.signal(signal.SIGINT, caught)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def words(text: str) -> list[str]:
    """Those of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def handoff(
    guest: GuestName,
    /,
    *,
    to: Annotated[str, Parameter(help="The site that the guest goes to.")],
    downtime: Annotated[str, Parameter(help="Downtime to aim for: 300ms, 1s, or milliseconds.")] = "300ms",
    check: Annotated[
        bool, Parameter(negative="", help="Compare all memory before the guest runs there (longer downtime).")
    ] = False,
    deadline: Annotated[str, Parameter(help="Give up after so long: 2m, 90s, or seconds; 0: never.")] = "0",
    allow: Annotated[
        str, Parameter(help="What a guest that outruns the link may suffer: auto-converge, post-copy.")
    ] = "",
    level: Annotated[int, Parameter(help="zstd level for memory; 0: by the link's rate.")] = 0,
    disk: Annotated[
        str, Parameter(help="full, or on-demand: data at rest stays here and follows when it is read.")
    ] = "full",
    transport: Annotated[
        str, Parameter(help="striping over a connection for each path, or mptcp [default: as site.toml says].")
    ] = "",
    paths: Annotated[
        str,
        Parameter(help="Those that cost something: cheap = only when no other works, all, deadline = only to keep it."),
    ] = "deadline",
    through: Annotated[
        str, Parameter(help="Other sites that carry a part of it: porto, or porto,bergen. They can read nothing of it.")
    ] = "",
    join: Annotated[
        str, Parameter(help="With the policy mptcp, clients join the guest's new address ahead of the move, or after.")
    ] = "ahead",
    detach: Annotated[bool, Parameter(negative="", help="Do not wait for the end.")] = False,
    root: Root = None,
    json: Json = False,
) -> int:
    """Hand a running guest to another site. Ctrl-C cancels: the guest then runs on here."""
    agent = client(root)
    milliseconds = round(parse_seconds(f"{downtime}ms" if downtime.strip().isdigit() else downtime) * 1000)
    options: dict[str, Any] = {"downtime_ms": milliseconds, "check": check, "deadline_s": parse_seconds(deadline)}
    options |= {"level": level, "disk": disk, "allow": words(allow)}
    options |= {"transport": transport, "paths": paths, "join": join, "through": words(through)}
    return run(agent, lambda: agent.start_handoff(guest, to, options), detach=detach, json=json)


def run(agent: Client, start: Callable[[], dict[str, Any]], *, detach: bool, json: bool) -> int:
    """Begins a handoff, or a prefetch, and stays with it until its end."""
    with _interrupts() as interrupts:
        now = start()
        if detach:
            _say(json, {"event": "started", **now}, f"{now['kind']} {now['id']} goes on; 'haulier status {now['id']}'")
            return 0
        end = _follow(agent, now, interrupts, json)
    if end is None:
        _say(json, {"event": "detached", "id": now["id"]}, f"handoff {now['id']} goes on; 'haulier status {now['id']}'")
        return 130
    return _result(end, json)


def _follow(agent: Client, now: dict[str, Any], interrupts: _Interrupts, json: bool) -> dict[str, Any] | None:
    """Until the end; None if the operator detached."""
    handoff = str(now["id"])
    cancelled = False
    heard = time.monotonic()
    show = _Lines() if json else _Bar()
    with show:
        while True:
            show.update(now)
            if now["state"] == "ended":
                return now
            if interrupts.count >= 2:
                return None
            if interrupts.count and not cancelled:
                cancelled = True
                show.note("cancelling; Ctrl-C again leaves it alone")
                try:
                    agent.cancel(handoff)
                except Conflict as error:
                    show.note(str(error))
            interrupts.news.wait(POLL_S)
            interrupts.news.clear()
            try:
                now = agent.handoff(handoff)
                heard = time.monotonic()
            except PeerError:
                if time.monotonic() - heard > AGENT_AWAY_S:
                    raise


class _Bar:
    """A progress bar on a terminal."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=bars,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=1.0, facts="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, now: dict[str, Any]) -> None:
        status = now["status"]
        eta = float(status.get("eta_s", -1.0))
        facts = f"{size(float(status.get('wire_bytes', 0)))}  {float(status.get('rate_bps', 0)) / 1e6:.1f} Mbit/s"
        if eta >= 0:
            facts += f"  ETA {eta:.0f} s"
        what = plain(f"{now['guest']} to {now['target']}: {status.get('message') or status.get('phase', 'starting')}")
        self._bar.update(self._task, description=what, completed=float(status.get("progress", 0.0)), facts=facts)

    def note(self, text: str) -> None:
        self._bar.console.print(plain(text), markup=False, highlight=False)


class _Lines:
    """A JSON line for each news."""

    def __init__(self) -> None:
        self._last: Any = None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, now: dict[str, Any]) -> None:
        if now["status"] != self._last and now["state"] != "ended":
            self._last = now["status"]
            print_json({"event": "progress", "id": now["id"], **now["status"]})

    def note(self, text: str) -> None:
        print_json({"event": "note", "message": text})


def _say(json: bool, facts: dict[str, Any], text: str) -> None:
    if json:
        print_json(facts)
    else:
        console.print(text, markup=False, highlight=False)


def _result(end: dict[str, Any], json: bool) -> int:
    report = end.get("report") or {}
    if end["outcome"] == "done":
        if json:
            print_json({"event": "result", **end})
        else:
            text = prefetched(end) if end.get("kind") == "prefetch" else summary(end)
            console.print(text, markup=False, highlight=False)
        return 0
    text = end["error"] or str(report.get("error") or f"handoff {end['id']} failed; see its worker.log")
    code = int(end["code"] or report.get("code") or HandoffFailed.exit_code)
    if json:
        print_json({"event": "result", **end})
        print(text, file=sys.stderr)
        return code
    kind: type[HaulierError] = by_code(code)
    raise kind(text)


def prefetched(end: dict[str, Any]) -> str:
    """One line about a prefetch that is done, or was ended."""
    report = end.get("report") or {}
    wire = report.get("wire") or {}
    sent = size(wire.get("sent", 0) + wire.get("received", 0))
    return plain(
        f"{sent} of guest {end['guest']} sent ahead to {end['target']} in {report.get('total_s', 0):.1f} s: "
        f"hand it over with 'haulier handoff {end['guest']} --to {end['target']}'"
    )


def summary(end: dict[str, Any]) -> str:
    """One or two lines about a handoff that is done."""
    report = end.get("report") or {}
    facts = []
    if "total_s" in report:
        facts.append(f"{report['total_s']:.1f} s")
    if "downtime_ms" in report:
        facts.append(f"{report['downtime_ms']:.0f} ms of downtime")
    if "wire" in report:
        facts.append(f"{size(report['wire']['sent'] + report['wire']['received'])} on the wire")
    left = int((report.get("disk") or {}).get("left_behind", 0))
    if left:
        facts.append(f"{size(left)} of its disk stay behind for now")
    if report.get("check"):
        facts.append("memory compared: equal" if report["check"].get("memory_equal") else "memory differed")
    text = f"guest {end['guest']} runs at {end['target']} (epoch {end['epoch']})"
    return plain(text + (": " + ", ".join(facts) if facts else ""))
