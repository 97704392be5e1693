"""Containers handed over by haulier and by the published method (rsync, dump, rsync, restore), the same ones, in turn.

Applications: none, a game, 110 MB of random memory that changes, a server of a 180 MB file, and (not in --quick, which
would have to fetch OpenCV) face detection; the application's layer found at the target or not; and a trip back.

--only takes cells, APPLICATION[/MBPS[/AT]], each part with wildcards: memory/100, */10/no. With --parts FOLDER the rows
of each cell are kept there when it is done, and cells that are there already are not measured again; --steps N measures
so many cells more.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from experiments.parts import chosen  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.chunks.store import ChunkStore  # noqa: E402
from haulier.containers.importing import layers_of  # noqa: E402
from haulier.containers.layers import layer_id, make_layers, regions  # noqa: E402
from haulier.containers.model import ContainerSpec  # noqa: E402
from haulier.errors import GuestError, HaulierError  # noqa: E402
from haulier.lab import seed_method  # noqa: E402
from haulier.lab.container_clients import Download, Talk  # noqa: E402
from haulier.lab.containers import container_template  # noqa: E402
from haulier.lab.scenario import GUEST_ADDRESS, LabSite, Scenario, scenario, wan  # noqa: E402

HOST = GUEST_ADDRESS.partition("/")[0]
RTT_S = 0.04
SETTLE_S = 1.0
APPS = {"none": "base", "game": "game", "memory": "memory", "video": "video", "faces": "faces", "shop": "shop"}
FOUND, ABSENT, SHARED = "yes", "no", "libraries"
"""What the target has of the application: its layers; the base; the base, and another with the same libraries."""
QUICK = [
    ("none", 100, FOUND),
    ("game", 100, FOUND),
    ("game", 10, FOUND),
    ("memory", 100, FOUND),
    ("video", 100, FOUND),
    ("game", 100, ABSENT),
    ("shop", 100, SHARED),
]
Cell = tuple[str, int, str]


class Pinger:
    """Asks a service over one connection, again and again; the longest time without an answer."""

    def __init__(self, lab: Any) -> None:
        self._talk = Talk(lab, "client", HOST)
        self._over = threading.Event()
        self.longest = 0.0
        self.error = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.02):
            try:
                self._talk.ask("ping")
            except (OSError, HaulierError) as error:
                self.error = repr(error)
                return
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now

    def gap_ms(self) -> float | None:
        time.sleep(SETTLE_S)
        self._over.set()
        self._thread.join(30)
        return None if self.error else round(self.longest * 1000)


class _Streamed:
    def __init__(self, lab: Any) -> None:
        self._download = Download(lab, "client", HOST, "/video")
        while self._download.received < 1e6:
            time.sleep(0.05)

    def gap_ms(self) -> float | None:
        time.sleep(SETTLE_S)
        gap, error = self._download.longest_gap, self._download.error
        self._download.close()
        return None if error else round(gap * 1000)


class _Nobody:
    def gap_ms(self) -> float | None:
        return None


def client_of(app: str, lab: Any) -> Any:
    if app in ("none", "shop"):
        return _Nobody()
    return _Streamed(lab) if app == "video" else Pinger(lab)


@contextlib.contextmanager
def running(lab: Scenario, app: str, name: str) -> Iterator[Any]:
    """The application's container at oslo and its client."""
    words = ["--command", "sleep 1000000"] if app == "none" else []
    lab.oslo.facts(
        *("guest", "run", name, "--image", APPS[app], "--memory", "512M", "--address", GUEST_ADDRESS, *words),
        timeout=300,
    )
    lab.route("oslo")
    client = client_of(app, lab.lab)
    time.sleep(2 * SETTLE_S)
    try:
        yield client
    finally:
        for site in (lab.oslo, lab.lisbon, lab.oslo, lab.lisbon):
            with contextlib.suppress(HaulierError):
                site.haulier("guest", "remove", name, "--force")


def forget_layer(lab: Scenario, kept: tuple[str, ...]) -> None:
    """The target has the images `kept` and nothing else."""
    # What is on top of another goes first.
    while gone := [name for name in images_at(lab.lisbon) if name not in kept]:
        for name in gone:
            lab.lisbon.haulier("image", "remove", name, check=False)
        if set(gone) <= set(images_at(lab.lisbon)):
            raise GuestError(f"images stay at the target: {', '.join(gone)}")
    lab.lisbon.haulier("gc", timeout=300)
    layers = lab.lisbon.site.layers
    names = {name for image in kept for name in layers_of_image(lab, image)}
    for path in layers.iterdir() if layers.exists() else ():
        if path.name not in names:
            shutil.rmtree(path)


def images_at(site: LabSite) -> list[str]:
    return [image["name"] for image in site.facts("image", "list")["images"]]


def unpack_layers(lab: Scenario) -> None:
    """What the target has found it has as directories too, for both methods."""
    site = lab.lisbon.site
    with ChunkStore(site.store) as store:
        for name in store.manifest_names("image/"):
            layers = layers_of(store.manifest_meta(name)).layers
            make_layers(site.layers, store, ContainerSpec(layers=layers, command=("x",)), store.load_manifest(name))


def layers_of_image(lab: Scenario, image: str) -> list[str]:
    """Names of the directories of an image's layers."""
    with ChunkStore(lab.oslo.site.store) as store:
        spec = ContainerSpec(layers=layers_of(store.manifest_meta(f"image/{image}")).layers, command=("x",))
        return [layer_id(region) for region in regions(spec, store.load_manifest(f"image/{image}"))]


def ours(lab: Scenario, app: str, back: bool) -> list[dict[str, Any]]:
    """Figures of a handoff by haulier, and if asked for of the way back."""
    found = []
    with running(lab, app, "bench1") as client:
        for source, target in (("oslo", "lisbon"), ("lisbon", "oslo"))[: 2 if back else 1]:
            before = lab.wan_bytes()
            done = lab.hand_over("bench1", source, target)
            report = done.get("report", done)
            found.append({"total": report["total_s"], "mb": (lab.wan_bytes() - before) / 1e6})
            found[-1] |= {"down": report["downtime_ms"], "gap": client.gap_ms() if len(found) == 1 else None}
            found[-1]["marks"] = report["switchover_ms"]
            if back:
                time.sleep(SETTLE_S)
    return found


def theirs(lab: Scenario, app: str, back: bool) -> list[dict[str, Any]]:
    """The same by the published method."""
    found = []
    with running(lab, app, "bench1") as client:
        done = seed_method.move(lab, "bench1", lab.oslo, lab.lisbon, HOST)
        found.append({"total": done.total_s, "mb": done.wire_bytes / 1e6, "down": done.downtime_ms})
        found[-1]["gap"] = client.gap_ms()
        seed_method.end(lab.lisbon, "bench1")
    return found


def row(app: str, mbps: int, found: str, one: dict[str, Any], other: dict[str, Any]) -> dict[str, object]:
    return {
        "downtime ratio": other["down"] / one["down"],
        "bytes ratio": other["mb"] / one["mb"],
        "time ratio": other["total"] / one["total"],
        "application": app,
        "layer at target": found,
        "Mbit/s": mbps,
        "haulier ms down": round(one["down"]),
        "rsync ms down": round(other["down"]),
        "haulier ms gap": one["gap"],
        "rsync ms gap": other["gap"],
        "haulier MB": one["mb"],
        "rsync MB": other["mb"],
        "haulier s": one["total"],
        "rsync s": other["total"],
        "switchover ms": one["marks"],
    }


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Report:
    apps = ["none", "game", "memory", "video", "faces"]
    cells: list[Cell] = [(app, mbps, at) for mbps in (100, 50, 10) for at in (FOUND, ABSENT) for app in apps]
    cells += [("shop", mbps, SHARED) for mbps in (100, 50, 10)]
    cells = [cell for cell in (QUICK if quick and not only else cells) if chosen("/".join(map(str, cell)), only)]
    return run_cells(cells, parts, steps)


def run_cells(cells: list[Cell], parts: Path | None = None, steps: int = 0) -> Report:
    """Both methods for each cell, those of one rate and one state of the target in one lab."""
    done: dict[Cell, list[dict[str, object]]] = {}
    for cell in cells if parts is not None else ():
        if (part := part_of(parts, cell)).exists():
            done[cell] = json.loads(part.read_text())
    due = [cell for cell in cells if cell not in done]
    due = due[: steps or None]
    made = container_template(faces=any(app == "faces" for app, _, _ in due))
    for mbps, at in dict.fromkeys(cell[1:] for cell in due):
        with scenario("bench-ct", made, [wan(f"{mbps}mbit", f"{RTT_S / 2 * 1000:g}ms")]) as lab:
            unpack_layers(lab)
            for cell in due:
                if cell[1:] == (mbps, at):
                    done[cell] = compare(lab, *cell)
                    if parts is not None:
                        parts.mkdir(parents=True, exist_ok=True)
                        part_of(parts, cell).write_text(json.dumps(done[cell]))
    rows = [row for cell in cells for row in done.get(cell, ())]
    rates = sorted({mbps for _, mbps, _ in cells}, reverse=True)
    return Report(rows, targets(rows), f"{', '.join(str(rate) for rate in rates)} Mbit/s, 40 ms round trip", NOTES)


def part_of(parts: Path, cell: Cell) -> Path:
    """Where the rows of a cell are kept."""
    return parts / f"containers-{'-'.join(map(str, cell))}.json"


def compare(lab: Scenario, app: str, mbps: int, at: str) -> list[dict[str, object]]:
    """The rows of one cell."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, method in (("rsync", theirs), ("haulier", ours)):
        if at != FOUND:
            forget_layer(lab, ("base",) if at == ABSENT else ("base", "servers"))
        found[name] = method(lab, app, back=at == FOUND)
    one, other = found["haulier"], found["rsync"]
    rows = [row(app, mbps, at, one[0], other[0])]
    if len(one) > 1:
        # The published method keeps nothing of the container: its way back is its way there.
        rows.append(row(app, mbps, BACK, one[1], other[0]))
    return rows


BACK = "way back"
NOTES = [
    "the published method's way back is taken to be as its way there: it keeps nothing of a container that left",
    "downtime: from the freeze until the processes run; gap: the longest time without an answer that a client saw",
    "libraries: the target has another application with the same libraries, in a layer that was built apart",
]


def targets(rows: list[dict[str, object]]) -> list[Target]:
    def of(name: str, chosen: list[dict[str, object]]) -> list[float]:
        return [float(str(r[name])) for r in chosen if r[name] is not None]

    there = [r for r in rows if r["layer at target"] in (FOUND, ABSENT)]
    again = [r for r in rows if r["layer at target"] in (BACK, SHARED)]
    found = [Target.at_most("longest downtime ms", max(of("haulier ms down", rows)), 500)]
    if gaps := of("haulier ms gap", rows):
        found.append(Target.at_most("longest gap of a client ms", max(gaps), 800))
    if there:
        found.append(Target.at_least("least bytes ratio, first trip", min(of("bytes ratio", there)), 1.0))
        found.append(Target.at_least("least time ratio, first trip", min(of("time ratio", there)), 1.0))
    if again:
        found.append(Target.at_least("least bytes ratio, back or shared libraries", min(of("bytes ratio", again)), 3))
    return found
