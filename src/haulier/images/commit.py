"""An application layer out of a guest: what its overlay holds, read from the running QEMU or from its stopped file.

A running guest is read twice: all that the overlay holds while it runs on, then, its file systems frozen by the guest
agent, what changed meanwhile. It stands still for the second reading only. Without an agent it is paused for that, and
the layer is what the disk would be after a power cut.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.images import PREFIX as IMAGE_PREFIX
from haulier.chunks.manifest import Manifest
from haulier.chunks.packs import disk_error
from haulier.chunks.store import ChunkStore
from haulier.disks.rounds import ZEROS, DiskRounds, Round, clean_up
from haulier.errors import Corrupt, GuestError, HaulierError, UnknownThing
from haulier.guests.agent import AgentRefused
from haulier.guests.qemu import GuestPaths, Qemu
from haulier.units import CHUNK

Progress = Callable[[float, str], None]

AGENT_S: Final = 5.0
TRIM_S: Final = 120.0
FREEZE_S: Final = 30.0
THAW_S: Final = 120.0
"""A freeze that writes much first goes on for so long after nobody waits for it any more; the agent answers then."""
THAW_TRY_S: Final = 15.0
AGAIN_S: Final = 0.5
FREEZE: Final = b"freeze"
TOOL_S: Final = 3600.0


@dataclass
class Overlay:
    """What a guest's overlay holds: fingerprints by chunk index; all chunks are in the store it was read into."""

    changes: dict[int, bytes] = field(default_factory=dict)
    quiesced: bool = False
    """The guest's file systems were frozen, or it was shut down."""
    still_s: float = 0.0
    """For so long the guest, or its file systems, stood still."""


def save_layer(store: ChunkStore, name: str, parent: str, below: Manifest, overlay: Overlay, **meta: Any) -> Manifest:
    """Makes `image/<name>`: the disk `below` with what `overlay` holds. Durable on return."""
    manifest = below.replace(overlay.changes)
    facts = {"parent": parent, "created": time.time(), "quiesced": overlay.quiesced, **meta}
    store.save_manifest(IMAGE_PREFIX + name, manifest, facts)
    return manifest


def read_running(qemu: Qemu, store: ChunkStore, progress: Progress) -> Overlay:
    """Reads a running guest's overlay. Raises GuestError if it does not run on afterwards, or QEMU refuses."""
    found = Overlay()
    rounds = DiskRounds(qemu.qmp, "disk0", qemu.paths.rounds_sock)
    has_agent = False
    try:
        with contextlib.suppress(GuestError), qemu.guest_agent(AGENT_S) as agent:
            has_agent = True
            progress(0.02, "giving free blocks back")
            agent.fstrim(timeout=TRIM_S)
        with rounds.begin() as current:
            _take(found, current, store, lambda share: progress(0.05 + 0.8 * share, "reading what the guest wrote"))
        # A second round while it runs makes the one that it has to wait for short.
        with rounds.next(hold_back=False) as current:
            _take(found, current, store)
        progress(0.9, "reading what changed meanwhile")
        with _still(qemu, has_agent, found), rounds.next(hold_back=False) as current:
            _take(found, current, store)
    finally:
        with contextlib.suppress(HaulierError):
            rounds.abort()
    return found


def release(paths: GuestPaths) -> None:
    """Lets a guest run on that still stands still for a commit that is over: see `still_mark`. GuestError if not."""
    mark = still_mark(paths.root)
    with contextlib.suppress(UnknownThing):
        qemu = Qemu.adopt(paths, worker=True)
        try:
            clean_up(qemu.qmp)
            if qemu.status() == "paused":
                qemu.cont()
            _thaw(qemu, mark, 0.0)
        finally:
            qemu.close()
    mark.unlink(missing_ok=True)


def still_mark(root: Path) -> Path:
    """There while the guest whose directory is `root` is made to stand still for a commit.

    It says `FREEZE` from before its agent is told to freeze file systems until that has said that they are thawed.
    """
    return root / "still"


@contextlib.contextmanager
def _still(qemu: Qemu, has_agent: bool, found: Overlay) -> Iterator[None]:
    """The guest's file systems stand still meanwhile; where its agent cannot do that, all of it does."""
    mark = still_mark(qemu.paths.root)
    mark.touch()
    began = time.monotonic()
    try:
        found.quiesced = has_agent and _freeze(qemu, mark)
        if not found.quiesced:
            qemu.stop()
        yield
    finally:
        if not found.quiesced:
            qemu.cont()
        _thaw(qemu, mark, THAW_S)
        found.still_s = time.monotonic() - began
        mark.unlink(missing_ok=True)


def _freeze(qemu: Qemu, mark: Path) -> bool:
    """Whether the agent says that file systems are frozen. If it says nothing, they may be, or may come to be."""
    with contextlib.suppress(GuestError, OSError), qemu.guest_agent(AGENT_S) as agent:
        mark.write_bytes(FREEZE)
        try:
            frozen = agent.fsfreeze(FREEZE_S) > 0
        except AgentRefused:
            frozen = False
        if not frozen:
            mark.write_bytes(b"")
        return frozen
    return False


def _thaw(qemu: Qemu, mark: Path, patience_s: float) -> None:
    """Thaws what the guest's agent was told to freeze, whatever it said to that. GuestError if it does not say so."""
    deadline = time.monotonic() + patience_s
    while mark.read_bytes() == FREEZE:
        try:
            # In a conversation of its own: in the last one the answer to the freeze may be still to come.
            with qemu.guest_agent(THAW_TRY_S) as agent:
                agent.fsthaw()
            mark.write_bytes(b"")
        except GuestError as error:
            if time.monotonic() >= deadline or not qemu.alive():
                raise GuestError(
                    f"guest {qemu.spec.name!r} does not say that its file systems are thawed after a commit ({error}): "
                    "it is asked again and again; if it stands still for long, restart it"
                ) from error
            time.sleep(AGAIN_S)


def _take(
    found: Overlay, current: Round, store: ChunkStore, progress: Callable[[float], None] = lambda share: None
) -> None:
    total = max(1, len(current.chunks))
    for number, (index, data) in enumerate(current.items()):
        found.changes[index] = ZERO if data is ZEROS else store.put(data)
        if number % 256 == 0:
            progress(number / total)


def read_stopped(overlay: Path, below: Manifest, store: ChunkStore, progress: Progress) -> Overlay:
    """Reads the overlay file of a guest that does not run and whose disk lies on `below`.

    Raises Corrupt for a file that cannot be read, UnknownThing where `store` lacks a chunk that it holds a part of.
    """
    alone = "json:" + json.dumps(
        {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(overlay)}}
    )
    ranges = json.loads(_tool(["qemu-img", "map", "--output=json", alone]))
    held = [(int(r["start"]), int(r["start"]) + int(r["length"])) for r in ranges if r["present"]]
    found = Overlay(quiesced=True)
    total = max(1, sum(end - start for start, end in held))
    done = 0
    try:
        with tempfile.NamedTemporaryFile(dir=overlay.parent) as flat:
            _tool(["qemu-img", "convert", "-O", "raw", alone, flat.name])
            with open(flat.name, "rb") as file:
                for index, pieces in itertools.groupby(_pieces(held), lambda piece: piece[0] // CHUNK):
                    at, parts = index * CHUNK, list(pieces)
                    data = os.pread(file.fileno(), CHUNK, at).ljust(CHUNK, b"\0")
                    size = sum(end - start for start, end in parts)
                    if size < min(CHUNK, below.size - at):
                        # An overlay holds 2 KiB where the guest wrote so little: around it the disk is what lies below.
                        data = _over(store.get(below[index]), data, [(start - at, end - at) for start, end in parts])
                    found.changes[index] = store.put(data)
                    done += size
                    progress(0.1 + 0.8 * done / total, "reading what the guest wrote")
    except OSError as error:
        raise disk_error(error, overlay) from error
    return found


def _pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges (start, end), cut where chunks begin."""
    for start, end in ranges:
        while start < end:
            cut = min(end, (start // CHUNK + 1) * CHUNK)
            yield start, cut
            start = cut


def _over(below: bytes, above: bytes, parts: Iterable[tuple[int, int]]) -> bytes:
    """A chunk that is `above` in these ranges and `below` elsewhere."""
    out = bytearray(below)
    for start, end in parts:
        out[start:end] = above[start:end]
    return bytes(out)


def _tool(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TOOL_S, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        raise Corrupt(f"the guest's overlay cannot be read ({said}): run 'haulier verify' for it")
    return done.stdout
