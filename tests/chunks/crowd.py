"""One process of a crowd on one store: `python -m tests.chunks.crowd DIRECTORY ROLE NUMBER`; ends when told to.

Roles: `write` puts and saves manifests of its own for ever, and says which are durable; `read` reads all manifests'
chunks for ever; `collect` collects for ever; each says "wrong ..." when it sees what must not be.
"""

from __future__ import annotations

import random
import select
import sys
from pathlib import Path

from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.scrub import Pass, scrub_step
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, UnknownThing
from haulier.units import CHUNK
from tests.chunks.samples import chunk, name


def told_to_end() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def say(text: str) -> None:
    print(text, flush=True)


def write(store: ChunkStore, number: int) -> None:
    dice = random.Random(number)
    turn = 0
    while not told_to_end():
        turn += 1
        lease = f"writer/{number}/{turn}" if dice.random() < 0.5 else ""
        seeds = [dice.randrange(40) for _ in range(dice.randrange(1, 8))]  # the same 40 chunks for everybody
        lacking = set(store.missing(map(name, seeds), lease)) if lease else {name(seed) for seed in seeds}
        for seed in seeds:
            if name(seed) in lacking:
                store.put(chunk(seed), lease=lease)
        label = f"m/{number}/{turn % 3}"
        store.save_manifest(label, Manifest(len(seeds) * CHUNK, b"".join(map(name, seeds))))
        say(f"saved {label} {','.join(map(str, seeds))}")
        if lease:
            store.drop_lease(lease)


def read(store: ChunkStore, number: int) -> None:
    dice = random.Random(number)
    while not told_to_end():
        for label in store.manifest_names():
            try:
                manifest = store.load_manifest(label)
            except UnknownThing:
                continue
            for fp in manifest.chunks():
                at = dice.randrange(CHUNK - 100)
                try:
                    part = store.read(fp, at, 100)
                    whole = store.get(fp)
                except UnknownThing:
                    if store.load_manifest(label) == manifest:
                        say(f"wrong: {label} lacks {fp.hex()}")
                    continue
                if part != whole[at : at + 100] or fingerprint(whole) != fp:
                    say(f"wrong bytes of {fp.hex()}")
        say("read")


def collect(store: ChunkStore, number: int) -> None:
    while not told_to_end():
        try:
            report = store.gc()
        except Conflict:
            continue
        say(f"collected {report.chunks} {report.compacted}")


def evict(store: ChunkStore, number: int) -> None:
    """Half of what nothing refers to goes, and the rest is read again."""
    dice, state = random.Random(number), Pass()
    while not told_to_end():
        try:
            report = store.gc(choose=lambda found: [row.fp for row in found if dice.random() < 0.5])
        except Conflict:
            continue
        step = scrub_step(store, state, 64 * CHUNK, 1.0)
        if step.bad:
            say(f"wrong: {step.bad} is damaged")
        say(f"evicted {report.chunks} {report.compacted}")


def main() -> None:
    folder, role, number = sys.argv[1:]
    with ChunkStore(Path(folder), pack_size=8 * CHUNK, reserve=0) as store:
        try:
            {"write": write, "read": read, "collect": collect, "evict": evict}[role](store, int(number))
        except Exception as error:
            say(f"wrong: {error!r}")
            raise


if __name__ == "__main__":
    main()
