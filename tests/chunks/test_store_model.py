"""The store against a model in memory: two openings of it, crashes and collections in any order."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import UnknownThing
from haulier.units import CHUNK
from tests.chunks.samples import chunk, name, soft_chunk

DATA = {n: chunk(n) if n % 3 else soft_chunk(n) for n in range(8)}
FPS = {n: name(n) if n % 3 else fingerprint(DATA[n]) for n in DATA}

who = st.sampled_from([0, 1])
seeds = st.sampled_from(sorted(DATA))
labels = st.sampled_from(["a", "b"])
leases = st.sampled_from(["", "x", "y"])


class Model(RuleBasedStateMachine):
    """What must be held: `visible` (per opening, uncommitted), `claims` (who keeps what), `manifests`."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="haulier-chunks-model"))
        self.stores = [self.open(0), self.open(1)]
        self.pending: list[set[tuple[int, str]]] = [set(), set()]
        self.unclaimed: list[set[tuple[int, str]]] = [set(), set()]  # put, but their lease ended before the commit
        self.kept: set[tuple[int, str]] = set()  # committed, by lease; own leases are "0" and "1"
        self.manifests: dict[str, list[int]] = {}

    def open(self, number: int) -> ChunkStore:
        return ChunkStore(self.folder / "s", pack_size=3 * CHUNK, reserve=0, zstd_level=number or None)

    @rule(number=who, seed=seeds, lease=leases)
    def put(self, number: int, seed: int, lease: str) -> None:
        assert self.stores[number].put(DATA[seed], FPS[seed], lease) == FPS[seed]
        self.pending[number].add((seed, lease or str(number)))

    def committed(self, number: int) -> None:
        self.kept |= self.pending[number]
        self.pending[number] = set()
        self.unclaimed[number] = set()

    @rule(number=who)
    def commit(self, number: int) -> None:
        self.stores[number].commit()
        self.committed(number)

    @rule(number=who, label=labels, wanted=st.lists(seeds, min_size=1, max_size=5))
    def save(self, number: int, label: str, wanted: list[int]) -> None:
        manifest = Manifest(len(wanted) * CHUNK, b"".join(FPS[seed] for seed in wanted))
        sure = self.held() | {seed for seed, _ in self.pending[number]}
        try:
            self.stores[number].save_manifest(label, manifest)
        except UnknownThing:
            assert not set(wanted) <= sure
            return
        self.committed(number)
        self.manifests[label] = wanted
        self.kept -= {(seed, str(number)) for seed in wanted}

    @rule(number=who, label=labels)
    def drop(self, number: int, label: str) -> None:
        if label in self.manifests:
            self.stores[number].drop_manifest(label)
            del self.manifests[label]
        else:
            with pytest.raises(UnknownThing):
                self.stores[number].drop_manifest(label)

    @rule(number=who, lease=st.sampled_from(["x", "y"]))
    def drop_lease(self, number: int, lease: str) -> None:
        self.stores[number].drop_lease(lease)
        self.kept -= {(seed, held) for seed, held in self.kept if held == lease}
        ended = {(seed, held) for seed, held in self.pending[number] if held == lease}
        self.pending[number] -= ended
        self.unclaimed[number] |= ended

    @rule(number=who)
    def collect(self, number: int) -> None:
        before = self.held() | {seed for seed, _ in self.pending[number] | self.unclaimed[number]}
        self.stores[number].gc()
        self.committed(number)  # a collection commits what its own opening has pending
        with self.stores[number].index.read() as db:
            found = {row[0] for row in db.execute("SELECT fp FROM chunks")}
        assert {FPS[seed] for seed in self.held()} <= found <= {FPS[seed] for seed in before}

    @rule(number=who)
    def reopen(self, number: int) -> None:
        self.stores[number].close()
        self.committed(number)
        self.kept -= {(seed, held) for seed, held in self.kept if held == str(number)}
        self.stores[number] = self.open(number)

    @rule(number=who, torn=st.binary(max_size=200))
    def crash(self, number: int, torn: bytes) -> None:
        """As after kill -9: locks gone, nothing committed, junk at the end of the pack."""
        store = self.stores[number]
        if store._writer is not None:
            path = store._writer.pack.path
            with open(path, "ab") as file:
                file.write(torn)
        if store._own is not None:
            os.close(store._own[1])
            store._own = None
        store._writer = None
        store._sealed = []
        store._batch.pending.clear()
        store.index.close()
        self.pending[number] = set()
        self.unclaimed[number] = set()
        self.kept -= {(seed, held) for seed, held in self.kept if held == str(number)}
        self.stores[number] = self.open(number)

    def held(self) -> set[int]:
        return {seed for seed, _ in self.kept} | {seed for wanted in self.manifests.values() for seed in wanted}

    @invariant()
    def everything_held_is_readable_by_all(self) -> None:
        if not hasattr(self, "stores"):
            return
        for number, store in enumerate(self.stores):
            for seed in self.held() | {seed for seed, _ in self.pending[number]}:
                assert store.read(FPS[seed], 100, 5000) == DATA[seed][100:5100]
            for label, wanted in self.manifests.items():
                assert list(store.load_manifest(label)) == [FPS[seed] for seed in wanted]
            assert store.manifest_names() == sorted(self.manifests)

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            assert self.stores[0].check().ok
            for store in self.stores:
                store.close()
            shutil.rmtree(self.folder)


Model.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = Model.TestCase
