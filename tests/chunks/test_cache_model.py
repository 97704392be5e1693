"""Store, index and policies against a model in memory: budgets, pins, damage, crashes, two processes, in any order.

The model knows what must be here (what pinned manifests and leases keep), what may be here (anything that ever came),
and what every collection must have done: enough taken for the budget, nothing that is kept, and exactly what a dry run
said. Crashes are those of test_store_model: locks gone, nothing committed, junk at the end of the pack.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from haulier.chunks.books import read_memory, returned, write_memory
from haulier.chunks.collect import Cached
from haulier.chunks.manifest import Manifest
from haulier.chunks.scrub import Pass, condemn, lacking, scrub_step
from haulier.chunks.store import ChunkStore
from haulier.policy.choice import choose
from haulier.policy.coordinated import Facts
from haulier.policy.model import NAMES, Item
from haulier.units import CHUNK
from tests.chunks.samples import chunk, flip, name, place

SEEDS = range(10)
ROOM = CHUNK + 64
DATA = {n: chunk(n) for n in SEEDS}
SEED_OF = {name(n): n for n in SEEDS}

seeds = st.sampled_from(SEEDS)
labels = st.sampled_from(["guest/a", "image/b", "retained/c"])
who = st.sampled_from([0, 1])


class CacheModel(RuleBasedStateMachine):
    """`manifests`: label -> (seeds, pinned); `leased`: seeds that were put or asked for under the lease, committed."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="haulier-cache-model"))
        self.stores = [self.open(), self.open()]
        self.manifests: dict[str, tuple[list[int], bool]] = {}
        self.leased: set[int] = set()
        self.own: list[set[int]] = [set(), set()]
        self.damaged: set[int] = set()
        self.lost: set[int] = set()

    def open(self) -> ChunkStore:
        return ChunkStore(self.folder / "s", pack_size=3 * CHUNK, reserve=0)

    def here(self) -> set[int]:
        with self.stores[0].index.read() as db:
            return {SEED_OF[row[0]] for row in db.execute("SELECT fp FROM chunks")}

    def kept(self) -> set[int]:
        pinned = {seed for wanted, pin in self.manifests.values() if pin for seed in wanted}
        return (pinned | self.leased | self.own[0] | self.own[1]) - self.lost

    # -- what a site does

    @rule(number=who, label=labels, wanted=st.lists(seeds, min_size=1, max_size=6), pinned=st.booleans())
    def arrive(self, number: int, label: str, wanted: list[int], pinned: bool) -> None:
        """A disk comes whole and gets a manifest."""
        for seed in wanted:
            self.stores[number].put(DATA[seed])
        self.stores[number].save_manifest(
            label, Manifest(len(wanted) * CHUNK, b"".join(name(seed) for seed in wanted)), pinned=pinned
        )
        self.manifests[label] = (wanted, pinned)
        self.own[number] -= set(wanted)

    @rule(number=who, seed=seeds)
    def put(self, number: int, seed: int) -> None:
        self.stores[number].put(DATA[seed])
        self.stores[number].commit()
        self.own[number].add(seed)
        self.lost.discard(seed)

    @rule(number=who, wanted=st.sets(seeds, max_size=5))
    def ask(self, number: int, wanted: set[int]) -> None:
        """As a handoff does: what is here is kept from now on, and counted as a use."""
        missing = self.stores[number].missing(map(name, wanted), "handoff")
        gone = {SEED_OF[fp] for fp in missing}
        assert not gone & self.kept()
        self.leased |= wanted - gone

    @rule(number=who)
    def let_go(self, number: int) -> None:
        self.stores[number].drop_lease("handoff")
        self.leased.clear()

    @rule(label=labels, pinned=st.booleans(), number=who)
    def pin(self, label: str, pinned: bool, number: int) -> None:
        if label not in self.manifests:
            self.arrive(number, label, [1, 2, 3], not pinned)
        self.stores[number].pin_manifest(label, pinned)
        wanted, _ = self.manifests[label]
        self.manifests[label] = (wanted, pinned)
        if pinned:  # what an eviction took before is not brought back by it
            self.lost |= set(wanted) - self.here()

    @rule(label=labels, number=who)
    def drop(self, label: str, number: int) -> None:
        if label in self.manifests:
            self.stores[number].drop_manifest(label)
            del self.manifests[label]

    @rule(number=who, some=st.sets(seeds))
    def use(self, number: int, some: set[int]) -> None:
        self.stores[number].touch(map(name, some))
        self.stores[number].flush_uses()

    # -- what upkeep does

    @rule(number=who, policy=st.sampled_from(NAMES), budget=st.integers(0, 12), spare=st.sets(seeds, max_size=2))
    def evict(self, number: int, policy: str, budget: int, spare: set[int]) -> None:
        store = self.stores[number]
        before, kept = store.room(), self.kept()
        assert before.used == before.chunks * ROOM == len(self.here()) * ROOM
        need = max(0, before.used - budget * ROOM)

        def victims(found: list[Cached]) -> set[bytes]:
            assert {SEED_OF[row.fp] for row in found} == self.here() - kept
            back = returned(store, found)
            items = [
                Item(
                    row.fp, row.room, hits=row.hits, came=row.came, used=row.used, main=row.queue > 0 or row.fp in back
                )
                for row in found
            ]
            choice = choose(
                policy,
                items,
                need,
                capacity=max(1, before.cached - need),
                now=time.time(),
                memory=read_memory(store),
                facts=lambda key: Facts(copies=SEED_OF[key] % 3, popularity=SEED_OF[key]),  # type: ignore[index]
                sites=3,
                spare={name(seed) for seed in spare}.__contains__,
            )
            gone: list[bytes] = choice.victims  # type: ignore[assignment]
            write_memory(store, choice.memory, choice.moved, gone, len(found) - len(gone))  # type: ignore[arg-type]
            return set(gone)

        would = store.gc(dry_run=True, choose=victims)
        assert store.room() == before
        did = store.gc(choose=victims)
        if policy != "s3-fifo":  # whose queues the dry run of this test has moved on
            assert (would.chunks, would.bytes) == (did.chunks, did.bytes)
        after = store.room()
        assert before.chunks - after.chunks == did.chunks
        spared = len(spare & (self.here() - kept))
        assert after.used <= max(budget, len(kept) + spared) * ROOM
        assert kept <= self.here()
        self.damaged &= self.here()

    # -- what goes wrong

    @rule(seed=seeds)
    @precondition(lambda self: hasattr(self, "damaged") and len(self.damaged) < 2)
    def decay(self, seed: int) -> None:
        if seed in self.here() - self.damaged:
            flip(*place(self.stores[0], name(seed)))
            self.damaged.add(seed)

    @rule(number=who, heal=st.booleans())
    def scrub(self, number: int, heal: bool) -> None:
        store, state = self.stores[number], Pass()
        bad = []
        while not (step := scrub_step(store, state, 2 * CHUNK, 1.0)).done:
            bad += step.bad
        bad += step.bad
        assert {SEED_OF[each.fp] for each in bad} == self.damaged
        gone = {SEED_OF[fp] for fp in condemn(store, bad)}
        self.damaged.clear()
        needed = {SEED_OF[fp] for fp in lacking(store)}
        assert gone & {s for wanted, pin in self.manifests.values() if pin for s in wanted} - self.lost <= needed
        self.lost |= gone
        self.leased -= gone
        for each in self.own:
            each -= gone
        if heal:
            for seed in needed:
                store.put(DATA[seed], name(seed), lease="heal")
            store.commit()
            store.drop_lease("heal")
            self.lost -= needed
            assert lacking(store) == []

    @rule(number=who)
    def doctor(self, number: int) -> None:
        """References never differ from the manifests, and repair finds no more than what has decayed."""
        report = self.stores[number].check(repair=True)
        assert report.wrong_references == 0 and report.damaged_manifests == []
        assert {SEED_OF[bytes.fromhex(fp)] for fp in report.corrupt} == self.damaged
        still = {SEED_OF[bytes.fromhex(fp)] for fp in report.corrupt} - self.here()
        self.lost |= still
        self.leased -= still
        for each in self.own:
            each -= still
        self.damaged.clear()

    @rule(number=who, torn=st.binary(max_size=100), seed=seeds)
    def crash(self, number: int, torn: bytes, seed: int) -> None:
        store = self.stores[number]
        if seed not in self.here():
            store.put(DATA[seed])  # not committed
        if store._writer is not None:
            with open(store._writer.pack.path, "ab") as file:
                file.write(torn)
        if store._own is not None:
            os.close(store._own[1])
            store._own = None
        store._writer, store._sealed = None, []
        store.index.close()
        self.own[number] = set()
        self.stores[number] = self.open()

    @invariant()
    def what_is_kept_is_here_and_right(self) -> None:
        if not hasattr(self, "stores"):
            return
        here = self.here()
        assert self.kept() <= here
        self.lost -= here
        assert self.stores[0].check(deep=False).wrong_references == 0
        for number, store in enumerate(self.stores):
            for seed in self.kept() - self.damaged:
                assert store.read(name(seed), 5, 100) == DATA[seed][5:105], (number, seed)
        for label, (wanted, pinned) in self.manifests.items():
            assert list(self.stores[0].load_manifest(label)) == [name(seed) for seed in wanted]
            assert self.stores[1].is_pinned(label) == pinned

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            for store in self.stores:
                store.close()
            shutil.rmtree(self.folder)


CacheModel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCacheModel = CacheModel.TestCase
