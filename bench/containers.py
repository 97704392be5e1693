"""Containers and virtual machines handed over by haulier and by the published method (rsync, dump, rsync, restore), the
same ones, in turn.

Applications: none, a game, 110 MB of random memory that changes, a server of a 180 MB file, and (not in --quick, which
would have to fetch OpenCV) face detection; the application's layer found at the target or not; and a trip back. Virtual
machines have 256 MiB and the same applications. Where theirs is not found, each has an image with that application
alone, and the target has the lab's Debian.

--only takes cells, KIND[/APPLICATION[/MBPS[/AT]]], each part with wildcards: runc/memory/100, runc/*/10/no, vm. With
--parts FOLDER the rows of each cell are kept there when it is done, and cells that are there already are not measured
again; --steps N measures so many cells more.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from experiments.parts import Parts, chosen  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.chunks.images import PREFIX as IMAGE_PREFIX  # noqa: E402
from haulier.chunks.store import ChunkStore  # noqa: E402
from haulier.containers.importing import layers_of  # noqa: E402
from haulier.containers.layers import layer_id, make_layers, regions  # noqa: E402
from haulier.containers.model import ContainerSpec  # noqa: E402
from haulier.errors import GuestError, HaulierError, UsageError  # noqa: E402
from haulier.guests.qemu import Qemu  # noqa: E402
from haulier.handoff.residence import guest_paths  # noqa: E402
from haulier.lab import seed_method, serving  # noqa: E402
from haulier.lab.container_clients import Download, Talk  # noqa: E402
from haulier.lab.containers import container_template  # noqa: E402
from haulier.lab.demo import stock_sites  # noqa: E402
from haulier.lab.scenario import (  # noqa: E402
    GUEST_ADDRESS,
    IMAGE,
    Filled,
    LabSite,
    Scenario,
    Template,
    scenario,
    template,
    wan,
)
from haulier.lab.services import PORT  # noqa: E402

HOST = GUEST_ADDRESS.partition("/")[0]
RTT_S = 0.04
SETTLE_S = 1.0
APPS = {"none": "base", "game": "game", "memory": "memory", "video": "video", "faces": "faces", "shop": "shop"}
FOUND, ABSENT, SHARED = "yes", "no", "libraries"
"""What the target has of the application: its layers; the base; the base, and another with the same libraries."""
RUNC, VM = "runc", "vm"
SERVED = ("none", "game", "memory", "video", "faces")
RATES = (100, 50, 10)
QUICK = [
    (RUNC, "none", 100, FOUND),
    (RUNC, "game", 100, FOUND),
    (RUNC, "game", 10, FOUND),
    (RUNC, "memory", 100, FOUND),
    (RUNC, "video", 100, FOUND),
    (RUNC, "game", 100, ABSENT),
    (RUNC, "shop", 100, SHARED),
]
Cell = tuple[str, str, int, str]
"""Kind of guest, application, Mbit/s, what the target has."""
BASE_MIB = 512
"""Of the base image's snapshot that all other benchmarks have: of other sizes there is none at a time."""
LISTENS_S = 180.0
"""Importing OpenCV takes half a minute under emulation."""


def figure(longest: float, error: str) -> float | None:
    """A client's gap in ms; none of one that lost its connection."""
    if error:
        print(f"a client lost its connection: {error}", file=sys.stderr, flush=True)
    return None if error else round(longest * 1000)


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
        return figure(self.longest, self.error)


class _Streamed:
    """Fetches the file, again when it has it: its longest time without a byte, the time for asking again included."""

    def __init__(self, lab: Any) -> None:
        self._lab = lab
        self._over = threading.Event()
        self._error = ""
        self._longest = 0.0
        self._download = Download(lab, "client", HOST, "/video")
        while self._download.received < 1e6 and not self._download.error:
            time.sleep(0.05)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            one = self._download
            while not (one.digest or one.error or self._over.wait(0.02)):
                pass
            self._longest = max(self._longest, one.longest_gap)
            self._error = self._error or one.error
            if self._over.is_set() or self._error:
                return
            one.close()
            asked = time.monotonic()
            try:
                self._download = Download(self._lab, "client", HOST, "/video")
            except HaulierError as error:
                self._error = repr(error)
                return
            self._longest = max(self._longest, time.monotonic() - asked)

    def gap_ms(self) -> float | None:
        time.sleep(SETTLE_S)
        self._over.set()
        self._thread.join(90)
        self._download.close()
        return figure(self._longest, self._error)


class _Nobody:
    def gap_ms(self) -> float | None:
        return None


def client_of(app: str, lab: Any) -> Any:
    if app in ("none", "shop"):
        return _Nobody()
    return _Streamed(lab) if app == "video" else Pinger(lab)


def wait_for(lab: Scenario, app: str) -> None:
    """Until the application's service listens."""
    if app == "none":
        return
    port = 80 if app == "video" else PORT
    deadline = time.monotonic() + LISTENS_S
    while True:
        with contextlib.suppress(OSError):
            lab.lab.call("client", lambda: socket.create_connection((HOST, port), timeout=2)).close()
            return
        if time.monotonic() > deadline:
            raise GuestError(f"the service {app} does not listen at {HOST}:{port}")
        time.sleep(0.2)


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
        remove(lab, name)


def remove(lab: Scenario, name: str) -> None:
    """The guest is at neither site, wherever it was."""
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
    with running(lab, app, "bench1") as client:
        return there_and_back(lab, client, 2 if back else 1)


def there_and_back(lab: Scenario, client: Any, ways: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for source, target in (("oslo", "lisbon"), ("lisbon", "oslo"))[:ways]:
        before = lab.wan_bytes()
        done = lab.hand_over("bench1", source, target)
        report = done.get("report", done)
        found.append({"total": report["total_s"], "mb": (lab.wan_bytes() - before) / 1e6})
        found[-1] |= {"down": report["downtime_ms"], "gap": client.gap_ms() if len(found) == 1 else None}
        found[-1]["marks"] = report["switchover_ms"]
        if ways > 1:
            time.sleep(SETTLE_S)
    return found


def theirs(lab: Scenario, app: str, back: bool) -> list[dict[str, Any]]:
    """The same by the published method."""
    with running(lab, app, "bench1") as client:
        found = of_seed(seed_method.move(lab, "bench1", lab.oslo, lab.lisbon, HOST)) | {"gap": client.gap_ms()}
        seed_method.end(lab.lisbon, "bench1")
    return [found]


def of_seed(done: seed_method.SeedResult) -> dict[str, Any]:
    return {"total": done.total_s, "mb": done.wire_bytes / 1e6, "down": done.downtime_ms}


# -- virtual machines


@dataclass(frozen=True)
class BaseOnly(Template):
    """As the template for oslo, which has the base image beside it; lisbon has the base alone."""

    base: Template

    def copy_to(self, root: Path) -> None:
        if root.name == "lisbon":
            self.base.copy_to(root)
            return
        super().copy_to(root)
        name = IMAGE_PREFIX + IMAGE
        with ChunkStore(self.base.store, create=False) as base, ChunkStore(root / "store") as store:
            manifest = base.load_manifest(name)
            for fp in manifest.unique():
                store.put(base.get(fp), fp)
            store.save_manifest(name, manifest, base.manifest_meta(name))


def used(lab: Scenario, app: str, qemu: Qemu) -> Any:
    """The application runs in the guest, and has been used a moment; its client."""
    lab.route("oslo")
    if app != "none":
        serving.start(qemu, app)
        wait_for(lab, app)
    client = client_of(app, lab.lab)
    time.sleep(2 * SETTLE_S)
    return client


def our_vm(lab: Scenario, app: str, back: bool) -> list[dict[str, Any]]:
    """Figures of a handoff by haulier, and if asked for of the way back; its disk is checked where it is then."""
    assert isinstance(lab.template, Template)
    lab.start_guest("bench1", memory=f"{serving.MEMORY_MIB}M", image=lab.template.golden.meta.image)
    try:
        qemu = Qemu.adopt(guest_paths(lab.oslo.site, "bench1"))
        try:
            client = used(lab, app, qemu)
        finally:
            qemu.close()
        found = there_and_back(lab, client, 2 if back else 1)
        checked = (lab.oslo if back else lab.lisbon).facts("verify", "bench1", timeout=300)
        if not checked["ok"]:
            raise GuestError(f"the guest did not arrive whole: {checked['problems']}")
        return found
    finally:
        remove(lab, "bench1")


def their_vm(lab: Scenario, app: str) -> list[dict[str, Any]]:
    """The same by the published method."""
    with contextlib.ExitStack() as stack:
        layer = None
        if isinstance(lab.template, BaseOnly):
            whole = lab.template.golden.manifest_name
            layer = stack.enter_context(contextlib.closing(seed_method.Layer(lab, IMAGE_PREFIX + IMAGE, whole)))
        qemu, there, receive = stack.enter_context(stock_sites(lab, served=layer is None))
        client = used(lab, app, qemu)
        done, _ = seed_method.move_vm(lab, qemu, there, receive, HOST, layer)
        found = of_seed(done) | {"gap": client.gap_ms()}
        if layer is not None:
            layer.check()
        return [found]


# -- rows


def row(kind: str, app: str, mbps: int, found: str, one: dict[str, Any], other: dict[str, Any]) -> dict[str, object]:
    return {
        "downtime ratio": other["down"] / one["down"],
        "bytes ratio": other["mb"] / one["mb"],
        "time ratio": other["total"] / one["total"],
        "kind": kind,
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
    cells: list[Cell] = [(RUNC, app, mbps, at) for mbps in RATES for at in (FOUND, ABSENT) for app in SERVED]
    cells += [(RUNC, "shop", mbps, SHARED) for mbps in RATES]
    cells += [(VM, app, mbps, at) for mbps in RATES for at in (FOUND, ABSENT) for app in SERVED]
    cells = [cell for cell in (QUICK if quick and not only else cells) if chosen(name_of(cell), only)]
    if not cells:
        raise UsageError(f"no cell is called {', '.join(only)}: say KIND/APPLICATION/MBPS/AT, as runc/memory/100/yes")
    return run_cells(cells, parts, steps)


def run_cells(cells: list[Cell], parts: Path | None = None, steps: int = 0) -> Report:
    """Both methods for each cell, those of one kind, one rate and one state of the target in one lab."""
    kept, notes = Cells(parts), list[str]()
    done: dict[Cell, list[dict[str, object]]] = {
        cell: rows for cell in cells if (rows := kept.kept(name_of(cell))) is not None
    }
    due = [cell for cell in cells if cell not in done]
    due, later = due[: steps or None], due[steps:] if steps else []
    faces = any(cell[1] == "faces" for cell in due)
    while due:
        first = due[0]
        kind, _, mbps, _ = first
        with scenario("bench-ct", made_for(first, faces), [wan(f"{mbps}mbit", f"{RTT_S / 2 * 1000:g}ms")]) as lab:
            if kind == RUNC:
                unpack_layers(lab)
            for cell in [cell for cell in due if lab_of(cell) == lab_of(first)]:
                due.remove(cell)
                name, began = name_of(cell), time.monotonic()
                if (rows := kept.attempt(name, partial(compare, lab, *cell), notes)) is None:
                    # The rest is measured in a lab of its own.
                    break
                done[cell] = rows
                print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    rows = [row for cell in cells for row in done.get(cell, ())]
    rates = sorted({cell[2] for cell in cells}, reverse=True)
    setting = f"{', '.join(str(rate) for rate in rates)} Mbit/s, 40 ms round trip"
    notes += [f"not run yet: {name_of(cell)}" for cell in later]
    return Report(rows, targets(rows), setting, NOTES + notes)


def lab_of(cell: Cell) -> tuple[object, ...]:
    """What is the same of cells that are measured in one lab."""
    kind, app, mbps, at = cell
    return kind, mbps, at, app if lacks_application(cell) else ""


def lacks_application(cell: Cell) -> bool:
    """Whether it is a virtual machine whose application the target lacks; where there is none, nothing is lacking."""
    kind, app, _, at = cell
    return kind == VM and at == ABSENT and app != "none"


def made_for(cell: Cell, faces: bool) -> Filled:
    """What sites start from."""
    kind, app, _, _ = cell
    if lacks_application(cell):
        made = template(serving.MEMORY_MIB, application=serving.application(app))
        return BaseOnly(made.root, made.golden, template(BASE_MIB))
    if kind == VM:
        return template(serving.MEMORY_MIB, application=serving.application())
    return container_template(faces=faces)


def name_of(cell: Cell) -> str:
    return "/".join(map(str, cell))


class Cells(Parts):
    """Rows of cells, by their names alone: no two of these are alike."""

    def path(self, name: str) -> Path | None:
        return self.folder / f"containers-{name.replace('/', '-')}.json" if self.folder is not None else None


def compare(lab: Scenario, kind: str, app: str, mbps: int, at: str) -> list[dict[str, object]]:
    """The rows of one cell."""
    found: dict[str, list[dict[str, Any]]] = {}
    if kind == VM:
        found = {"rsync": their_vm(lab, app), "haulier": our_vm(lab, app, back=at == FOUND)}
    for name, method in (("rsync", theirs), ("haulier", ours)) if kind == RUNC else ():
        if at != FOUND:
            forget_layer(lab, ("base",) if at == ABSENT else ("base", "servers"))
        found[name] = method(lab, app, back=at == FOUND)
    one, other = found["haulier"], found["rsync"]
    rows = [row(kind, app, mbps, at, one[0], other[0])]
    if len(one) > 1:
        # The published method keeps nothing of the guest: its way back is its way there.
        rows.append(row(kind, app, mbps, BACK, one[1], other[0]))
    return rows


BACK = "way back"
NOTES = [
    "the published method's way back is taken to be as its way there: it keeps nothing of a guest that left",
    "downtime: from the freeze until the processes run; gap: the longest time without an answer that a client saw",
    "libraries: the target has another application with the same libraries, in a layer that was built apart",
]


def targets(rows: list[dict[str, object]]) -> list[Target]:
    def of(name: str, chosen: list[dict[str, object]]) -> list[float]:
        return [float(str(r[name])) for r in chosen if r[name] is not None]

    there = [r for r in rows if r["layer at target"] in (FOUND, ABSENT)]
    again = [r for r in rows if r["layer at target"] in (BACK, SHARED)]
    if not rows:
        return []
    found = [Target.at_most("longest downtime ms", max(of("haulier ms down", rows)), 500)]
    if gaps := of("haulier ms gap", rows):
        found.append(Target.at_most("longest gap of a client ms", max(gaps), 800))
    if there:
        found.append(Target.at_least("least bytes ratio, first trip", min(of("bytes ratio", there)), 1.0))
        found.append(Target.at_least("least time ratio, first trip", min(of("time ratio", there)), 1.0))
    if again:
        found.append(Target.at_least("least bytes ratio, back or shared libraries", min(of("bytes ratio", again)), 3))
    return found
