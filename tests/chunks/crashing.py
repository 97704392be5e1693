"""Runs a store's life in forked children that die at one step each, and looks at what they leave behind.

    python -m tests.chunks.crashing DIRECTORY kill|power

A step is every call that changes what is on disk: appends, syncs, commits, punches, removals. The children die as by
kill -9 (os._exit): no handler runs. With `power`, packs also lose all that was not synced. What a child was told is
durable it writes down in a pipe. Prints one line of JSON: {"steps": n, "failures": [...]}.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from haulier.chunks import collect, packs
from haulier.chunks.index import Index
from haulier.chunks.manifest import Manifest
from haulier.chunks.places import Places
from haulier.chunks.store import ChunkStore
from haulier.units import CHUNK
from tests.chunks.samples import chunk, name


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
            os._exit(9)

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
            (packs, "sync_folder"),
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


def run(folder: Path, at: int, power: bool) -> tuple[list[str], bool]:
    """(what the child was told, whether it died) with death before step `at`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            told = os.fdopen(writer, "w")
            Death(at, folder / "packs" if power else None).arm()
            live(folder, lambda text: print(text, file=told, flush=True))
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"error {error!r}\n".encode())
            os._exit(1)
    os.close(writer)
    with open(reader) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    return lines, os.waitstatus_to_exitcode(status) == 9


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


def main() -> None:
    base = Path(sys.argv[1])
    failures = []
    at, died = 0, True
    while died:
        at += 1
        folder = base / str(at)
        told, died = run(folder, at, sys.argv[2] == "power")
        failures += [f"step {at}: {text}" for text in verify(folder, told)]
        if not died and told[-1:] != ["closed"]:
            failures.append(f"step {at}: ended with {told[-1:]}")
            break
        shutil.rmtree(folder)
    print(json.dumps({"steps": at, "failures": failures}))


if __name__ == "__main__":
    main()
