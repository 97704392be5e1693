"""What a site says of its store to the coordinator."""

from __future__ import annotations

from pathlib import Path

from haulier.chunks import check
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.coordinator.inventory import Inventory
from haulier.units import CHUNK
from tests.chunks.samples import chunk


def test_a_manifest_that_lacks_a_damaged_chunk_is_not_whole_until_it_is_healed(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        fps = [store.put(chunk(seed)) for seed in (1, 2)]
        store.save_manifest("image/base", Manifest(2 * CHUNK, b"".join(fps)))
        inventory = Inventory(store)
        assert inventory.manifests()["image/base"].complete
        with store.index.write() as db:
            db.execute("DELETE FROM chunks WHERE fp=?", (fps[1],))
            check.doubt(db, {fps[1]})
        assert not inventory.manifests()["image/base"].complete
        store.put(chunk(2))
        store.commit()
        assert inventory.manifests()["image/base"].complete
