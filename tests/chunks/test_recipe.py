from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haulier.chunks import recipe
from haulier.chunks.blocks import BlockIndex, BlockSpace
from haulier.chunks.fingerprint import ZERO_CHUNK
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, UsageError
from haulier.units import BLOCK, BLOCKS_PER_CHUNK, CHUNK
from tests.chunks.samples import chunk, mixed_chunk

BASE = [chunk(n) for n in range(4)]


class Site:
    def __init__(self, folder: Path) -> None:
        self.store = ChunkStore(folder, reserve=0)
        fps = [self.store.put(data) for data in BASE]
        self.space = BlockSpace(self.store)
        self.space.append(fps)
        self.index = BlockIndex.build(self.store, fps)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory() as folder:
        made = Site(Path(folder) / "s")
        yield made
        made.store.close()


def base(number: int) -> bytes:
    at = number % BLOCKS_PER_CHUNK * BLOCK
    return BASE[number // BLOCKS_PER_CHUNK][at : at + BLOCK]


def new(seed: int) -> bytes:
    return chunk(1000 + seed)[:BLOCK]


blocks = st.one_of(
    st.none(),
    st.integers(0, len(BASE) * BLOCKS_PER_CHUNK - 1).map(base),
    st.integers(0, 9).map(new),
)


@given(st.lists(blocks, min_size=BLOCKS_PER_CHUNK, max_size=BLOCKS_PER_CHUNK))
@settings(deadline=None)
def test_decode_inverts_encode(site: Site, parts: list[bytes | None]) -> None:
    data = mixed_chunk(*parts)
    told = recipe.encode(data, site.index, site.space)
    references = sum(1 for part in parts if part is not None and part in b"".join(BASE))
    if not references:
        assert told is None
        return
    assert told is not None
    literals = sum(1 for part in parts if part is not None) - references
    assert len(told) == 4 + 4 * references + BLOCK * literals
    assert recipe.decode(told, site.space) == data


def test_nothing_known_gives_no_recipe(site: Site) -> None:
    assert recipe.encode(chunk(99), site.index, site.space) is None
    assert recipe.encode(ZERO_CHUNK, site.index, site.space) is None


def test_a_run_of_blocks_is_zeros(site: Site) -> None:
    told = recipe.encode(BASE[2], site.index, site.space)
    assert told == b"\x55" * 4 + (32).to_bytes(4, "little") + bytes(60)


def test_a_chunk_has_one_size(site: Site) -> None:
    with pytest.raises(UsageError):
        recipe.encode(b"x" * 100, site.index, site.space)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_nonsense_is_refused_or_a_whole_chunk(site: Site, data: bytes) -> None:
    try:
        assert len(recipe.decode(data, site.space)) == CHUNK
    except Corrupt:
        pass


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cut short"),
        (b"\x03\0\0\0", "unknown kind"),
        (b"\x01\0\0\0", "does not fit"),
        (b"\0\0\0\0x", "does not fit"),
        (b"\x02\0\0\0" + bytes(4095), "does not fit"),
        (b"\x01\0\0\0\x40\0\0\0", "does not have"),
        (b"\x05\0\0\0" + b"\xff" * 8, "does not have"),
    ],
)
def test_what_is_wrong_is_said(site: Site, data: bytes, says: str) -> None:
    with pytest.raises(Corrupt, match=says):
        recipe.decode(data, site.space)
