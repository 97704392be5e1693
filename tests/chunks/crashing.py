"""Runs a store's life in forked children that die at one step each, and looks at what they leave behind.

    python -m tests.chunks.crashing DIRECTORY kill|power [store|cache]

A step is every call that changes what is on disk: appends, syncs, commits, punches, removals. The children die by
SIGKILL. With `power`, packs also lose all that was not synced. What a child was told is durable it writes down in a
pipe. `cache` is the life of a cache: evictions by a policy, pins, scrubbing and healing. Prints one line of JSON:
{"steps": n, "failures": [...]}.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haulier.chunks import collect, packs
from haulier.chunks.books import read_memory, write_memory
from haulier.chunks.collect import Cached
from haulier.chunks.index import Index
from haulier.chunks.manifest import Manifest
from haulier.chunks.places import Places
from haulier.chunks.scrub import Pass, condemn, scrub_step, write_pass
from haulier.chunks.store import ChunkStore
from haulier.policy.choice import choose
from haulier.policy.model import Item
from haulier.units import CHUNK
from tests.chunks.samples import chunk, flip, name, place


def manifest_of(seeds: range | list[int]) -> Manifest:
    return Manifest(len(seeds) * CHUNK, b"".join(map(name, seeds)))


def live(folder: Path, told: Callable[[str], None]) -> None:
    """A store's life: puts, manifests, a replacement, collections with holes and with compaction."""
    store = ChunkStore(folder, pack_size=6 * CHUNK, reserve=0)
    for n in range(10):
        store.put(chunk(n), lease="work")
    store.commit()
    told("chunks 0 10")
    store.save_manifest("a", manifest_of(range(10)))
    told("manifest a 0 10")
    store.drop_lease("work")
    for n in range(10, 14):
        store.put(chunk(n))
    store.save_manifest("b", manifest_of(range(8, 14)))
    told("manifest b 8 14")
    store.save_manifest("a", manifest_of([0, 3]))
    told("replaced a 0 3")
    store.gc()
    told("collected")
    store.put(chunk(5), lease="late")
    store.commit()
    told("chunks 5 6")
    store.drop_manifest("b")
    told("dropped b")
    store.gc()
    told("collected")
    store.close()
    told("closed")


def give_up(store: ChunkStore, need: int) -> None:
    """What the agent does when the budget is exceeded."""

    def victims(found: list[Cached]) -> set[bytes]:
        items = [Item(row.fp, row.room, hits=row.hits, came=row.came, used=row.used) for row in found]
        choice = choose("s3-fifo", items, need, capacity=8 * CHUNK, now=time.time(), memory=read_memory(store))
        gone = [fp for fp in choice.victims if isinstance(fp, bytes)]
        moved = {fp: uses for fp, uses in choice.moved.items() if isinstance(fp, bytes)}
        write_memory(store, choice.memory, moved, gone, len(found) - len(gone))
        return set(gone)

    store.gc(choose=victims)


def live_cache(folder: Path, told: Callable[[str], None]) -> None:
    """A cache's life: what nothing refers to comes, is used, is evicted, is pinned, decays and is healed."""
    store = ChunkStore(folder, pack_size=6 * CHUNK, reserve=0)
    for n in range(8):
        store.put(chunk(n), lease="work")
    store.save_manifest("guest", manifest_of(range(8)))
    told("guest")
    for n in range(8, 20):
        store.put(chunk(n))
    store.save_manifest("image", manifest_of(range(6, 20)), pinned=False)
    told("image")
    store.touch(name(n) for n in (9, 10, 9))
    store.flush_uses()
    give_up(store, 5 * CHUNK)
    told("evicted")
    store.pin_manifest("image", True)
    told("pinned")
    give_up(store, 50 * CHUNK)
    told("evicted more")
    flip(*place(store, name(3)))
    told("flipped")
    state = Pass()
    bad = scrub_step(store, state, 1 << 30, now=1.0).bad
    write_pass(store, state)
    for fp in condemn(store, bad):
        store.put(chunk(3), fp, lease="heal")
    store.commit()
    told("healed")
    store.drop_lease("heal")
    store.pin_manifest("image", False)
    store.drop_lease("work")
    give_up(store, 50 * CHUNK)
    told("emptied")
    store.close()
    told("closed")


class Death:
    """Counts steps, and dies before the chosen one."""

    def __init__(self, at: int, power: Path | None) -> None:
        self.at = at
        self.power = power
        self.count = 0
        self.synced: dict[int, int] = {}

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            if self.power is not None:
                for file in self.power.iterdir():
                    info = file.stat()
                    os.truncate(file, min(self.synced.get(info.st_ino, 0), info.st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    def sync(self, fd: int) -> None:
        self.step()
        info = os.fstat(fd)
        self.synced[info.st_ino] = info.st_size

    def before(self, owner: Any, attribute: str) -> None:
        real = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return real(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    def arm(self) -> None:
        for owner, attribute in (
            (os, "pwritev"),
            (os, "pwrite"),
            (os, "ftruncate"),
            (collect, "punch"),
            (packs, "sync"),
            (Path, "unlink"),
            (Places, "advance"),
        ):
            self.before(owner, attribute)
        os.fdatasync = self.sync
        real = Index.__init__

        def init(index: Index, path: Path) -> None:
            real(index, path)
            index._writer.set_trace_callback(lambda sql: self.step() if sql.startswith(("BEGIN", "COMMIT")) else None)

        Index.__init__ = init  # type: ignore[method-assign]


def run(folder: Path, at: int, power: bool, life: Callable[..., None]) -> tuple[list[str], bool]:
    """(what the child was told, whether it died) with death before step `at`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            told = os.fdopen(writer, "w")
            Death(at, folder / "packs" if power else None).arm()
            life(folder, lambda text: print(text, file=told, flush=True))
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"error {error!r}\n".encode())
            os._exit(1)
    os.close(writer)
    with open(reader) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    return lines, os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def verify(folder: Path, told: list[str]) -> list[str]:
    """What is wrong with what a dead child left."""
    wrong = [line for line in told if line.startswith("error")]
    with ChunkStore(folder, pack_size=6 * CHUNK, reserve=0) as store:
        for when in ("at once", "after a collection", "after more work"):
            if when == "after a collection":
                store.gc()
            if when == "after more work":
                store.put(chunk(77), lease="more")
                store.commit()
                if store.get(name(77)) != chunk(77):
                    wrong.append("a chunk put later does not come back")
            report = store.check()
            if not report.ok:
                wrong.append(f"{when}: {report}")
            for label in store.manifest_names():
                for fp in store.load_manifest(label).unique():
                    if not store.has(fp):
                        wrong.append(f"{when}: {label} lacks {fp.hex()[:8]}")
                    else:
                        store.get(fp)
        names = store.manifest_names()
        text = " ".join(told)
        if "manifest a" in text and "a" not in names:
            wrong.append("manifest a is gone")
        if "manifest b" in text and "dropped b" not in text and "b" not in names and told[-1] != "chunks 5 6":
            wrong.append("manifest b is gone")
        if "dropped b" in text and "b" in names:
            wrong.append("manifest b is back")
        if "replaced a" in text and store.load_manifest("a") != manifest_of([0, 3]):
            wrong.append("manifest a is an old one")
        if "chunks 5 6" in text and not store.has(name(5)):
            wrong.append("a leased chunk is gone")
        if told[-1:] == ["chunks 0 10"] and not all(store.has(name(n)) for n in range(10)):
            wrong.append("leased chunks are gone")
        if "dropped b" in text:
            store.drop_lease("late")
            store.drop_lease("more")
            store.gc()
            if store.stats().chunks != 2:
                wrong.append(f"{store.stats()} and should be 2 chunks")
            if store.stats().disk > 4 * CHUNK:
                wrong.append(f"{store.stats()} takes more than 2 chunks' space")
    return wrong


def verify_cache(folder: Path, told: list[str]) -> list[str]:
    """What is wrong with the cache that a dead child left."""
    wrong = [line for line in told if line.startswith("error")]
    with ChunkStore(folder, pack_size=6 * CHUNK, reserve=0) as store:
        report = store.check()
        if report.wrong_references or report.damaged_manifests or ("healed" in told and not report.ok):
            wrong.append(f"at once: {report}")
        if not {*report.corrupt, *report.missing} <= {name(3).hex()}:
            wrong.append(f"more than what decayed: {report}")
        if not report.ok and "evicted more" not in told:
            wrong.append(f"nothing had decayed: {report}")
        if not report.ok:
            store.check(repair=True)
            store.put(chunk(3), lease="heal")
            store.commit()
        give_up(store, CHUNK)
        if not store.check().ok:
            wrong.append(f"after mending: {store.check()}")
        for label in store.manifest_names():
            for fp in store.load_manifest(label).unique():
                if store.has(fp):
                    store.get(fp)
                elif store.is_pinned(label) and (label == "guest" or "pinned" not in told):
                    wrong.append(f"{label} lacks {fp.hex()[:8]}")
        if "guest" in told and "guest" not in store.manifest_names():
            wrong.append("the guest's manifest is gone")
        if "image" in told and "image" not in store.manifest_names():
            wrong.append("the image's manifest is gone")
        for lease in store.leases():
            store.drop_lease(lease)
        if "guest" in told:
            if "image" in store.manifest_names():
                store.pin_manifest("image", False)
            give_up(store, 50 * CHUNK)
            if store.room().chunks != 8 or store.room().cached:
                wrong.append(f"{store.room()} and should be 8 chunks")
            if store.stats().disk > 12 * CHUNK:
                wrong.append(f"{store.stats()} takes more than 8 chunks' space")
    return wrong


LIVES = {"store": (live, verify), "cache": (live_cache, verify_cache)}


def main() -> None:
    base = Path(sys.argv[1])
    life, look = LIVES[sys.argv[3] if len(sys.argv) > 3 else "store"]
    failures = []
    at, died = 0, True
    while died:
        at += 1
        folder = base / str(at)
        told, died = run(folder, at, sys.argv[2] == "power", life)
        failures += [f"step {at}: {text}" for text in look(folder, told)]
        if not died and told[-1:] != ["closed"]:
            failures.append(f"step {at}: ended with {told[-1:]}")
            break
        shutil.rmtree(folder)
    print(json.dumps({"steps": at, "failures": failures}))


if __name__ == "__main__":
    main()
