"""Which image lies on which, and what a chunk belongs to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import UnknownThing
from haulier.images import layers
from haulier.images.layers import APPLICATION, BASE, INSTANCE, LAYERS, Split
from haulier.units import CHUNK


def chunk(seed: int) -> bytes:
    return random.Random(seed).randbytes(CHUNK)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with ChunkStore(tmp_path / "store") as store:
        yield store


def keep(store: ChunkStore, name: str, seeds: list[int], **meta: str) -> Manifest:
    fps = [store.put(chunk(seed)) for seed in seeds]
    manifest = Manifest(len(fps) * CHUNK, b"".join(fps))
    store.save_manifest(name, manifest, meta)
    return manifest


@pytest.fixture
def stack(store: ChunkStore) -> ChunkStore:
    keep(store, "image/debian", [1, 2, 3, 4])
    keep(store, "image/web", [1, 2, 13, 4], parent="debian")
    keep(store, "image/shop", [1, 22, 13, 4], parent="web", uuid="u1", guest="g1")
    keep(store, "golden/g", [1, 2, 13, 99])
    return store


def test_a_chain_begins_with_the_base(stack: ChunkStore) -> None:
    assert layers.chain(stack, "shop") == ["debian", "web", "shop"]
    assert layers.chain(stack, "debian") == ["debian"]
    assert layers.children(stack, "debian") == ["web"]
    assert layers.children(stack, "shop") == []
    with pytest.raises(UnknownThing):
        layers.chain(stack, "none")


def test_a_chain_ends_where_a_parent_is_missing_or_in_a_circle(stack: ChunkStore) -> None:
    stack.drop_manifest("image/debian")
    assert layers.chain(stack, "shop") == ["web", "shop"]
    keep(stack, "image/debian", [1], parent="shop")
    assert layers.chain(stack, "shop") == ["debian", "web", "shop"]


def test_chunks_belong_to_the_lowest_layer_that_has_them(stack: ChunkStore) -> None:
    split = layers.split_of(stack, "web", "g")
    manifest = keep(stack, "guest/x", [1, 2, 13, 99, 100])
    kinds = [split.of(fp) for fp in manifest.chunks()]
    assert kinds == [BASE, BASE, APPLICATION, APPLICATION, INSTANCE]
    assert split.sizes(manifest.chunks()) == {BASE: 2 * CHUNK, APPLICATION: 2 * CHUNK, INSTANCE: CHUNK}
    assert list(split.sort(manifest.chunks())) == list(LAYERS)


def test_what_the_boot_of_a_base_wrote_is_the_bases(stack: ChunkStore) -> None:
    split = layers.split_of(stack, "debian", "g")
    assert [split.of(stack.put(chunk(seed))) for seed in (1, 13, 99, 5)] == [BASE, BASE, BASE, INSTANCE]


def test_a_layer_committed_from_the_guest_is_its_application_layer(stack: ChunkStore) -> None:
    fp = stack.put(chunk(22))
    assert layers.split_of(stack, "debian").of(fp) == INSTANCE
    assert layers.split_of(stack, "debian", guest="u1").of(fp) == APPLICATION
    assert layers.split_of(stack, "debian", guest="u2").of(fp) == INSTANCE


def test_without_the_image_all_is_instance(stack: ChunkStore) -> None:
    assert layers.split_of(stack, "gone", "gone") == Split()


def test_facts(stack: ChunkStore) -> None:
    facts = layers.facts(stack, "shop")
    assert (facts.layer, facts.parent, facts.bytes, facts.own_bytes) == (APPLICATION, "web", 4 * CHUNK, CHUNK)
    facts = layers.facts(stack, "debian")
    assert (facts.layer, facts.parent, facts.bytes, facts.own_bytes) == (BASE, "", 4 * CHUNK, 4 * CHUNK)


@given(
    st.sets(st.binary(min_size=1, max_size=2)),
    st.sets(st.binary(min_size=1, max_size=2)),
    st.sets(st.binary(max_size=2)),
)
def test_every_chunk_is_in_exactly_one_layer(base: set[bytes], application: set[bytes], chunks: set[bytes]) -> None:
    split = Split(frozenset(base), frozenset(application) - frozenset(base))
    found = split.sort(chunks)
    assert sorted(fp for mine in found.values() for fp in mine) == sorted(chunks)
    assert all(split.of(fp) == layer for layer, mine in found.items() for fp in mine)
