"""Urgent pages as differences to what the target has: they come back exactly, whatever they look like and are cut."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haulier.compress import zstd
from haulier.errors import Corrupt
from haulier.memory.proxy import SourceProxy
from haulier.memory.references import PLACE, Referring, resolve
from haulier.memory.target_proxy import TargetProxy
from tests.memory.finders import Disk
from tests.support.qemustream import PAGE, Writer, changed, page_of

NOISE = [os.urandom(PAGE) for _ in range(8)]


def both(folder: Path, disk: Disk | None = None) -> tuple[SourceProxy, TargetProxy]:
    """Proxies whose mirrors hold noise in the first eight pages."""
    for name in ("source", "target"):
        (folder / name).unlink(missing_ok=True)
    out, into = SourceProxy(folder / "source", finder=disk), TargetProxy(folder / "target", reader=disk)
    writer = Writer().begin().part()
    for page, data in enumerate(NOISE):
        writer.page("ram0", page, data)
    writer.eos()
    for batch in [*out.feed(writer.data), *out.flush()]:
        into.feed(batch.data)
    return out, into


def urgent() -> Writer:
    return Writer()


def test_a_page_that_changed_a_little_costs_little(tmp_path: Path) -> None:
    out, into = both(tmp_path)
    data = urgent().page("ram0", 3, changed(NOISE[3], 7, 9)).page("ram0", 5, NOISE[5]).data
    differences, table = Referring(out).refer(data)
    assert len(table) == 2 * PLACE.itemsize
    assert len(zstd.compress(differences, 1)) < 200 < len(zstd.compress(data, 1)) // 20
    assert resolve(differences, table, into.mirror, None) == data


def test_a_page_of_the_disk_is_only_named(tmp_path: Path) -> None:
    disk = Disk(os.urandom(PAGE), os.urandom(PAGE))
    out, into = both(tmp_path, disk)
    data = urgent().page("ram0", 20, disk.blocks[1]).data
    differences, table = Referring(out).refer(data)
    assert len(zstd.compress(differences, 1)) < 100
    assert resolve(differences, table, into.mirror, disk) == data
    with pytest.raises(Corrupt):
        resolve(differences, table, into.mirror, None)


records = st.tuples(st.integers(0, 12), st.sampled_from(["same", "near", "far", "zero"]), st.booleans())


@given(st.lists(records, max_size=12), st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_comes_back(tmp_path: Path, some: list[tuple[int, str, bool]], cuts: list[int]) -> None:
    out, into = both(tmp_path)
    writer = urgent()
    for page, kind, named in some:
        old = NOISE[page] if page < len(NOISE) else bytes(PAGE)
        new = {"same": old, "near": changed(old, page), "far": page_of(page + 1), "zero": bytes(PAGE)}[kind]
        writer.page("ram0", page, new, named=named or not writer.parts)
    data, referring, at, cut = writer.data, Referring(out), 0, 0
    while at < len(data):
        piece = data[at : at + cuts[cut % len(cuts)]]
        differences, table = referring.refer(piece)
        assert resolve(differences, table, into.mirror, None) == piece
        at, cut = at + len(piece), cut + 1
    if len(cuts) == 1 and cuts[0] >= len(data):
        expected = sum(page < len(NOISE) and kind in ("same", "near") for page, kind, _ in some)
        assert referring.pages == expected
    out.close(), into.close()


def test_what_is_not_understood_goes_as_it_is(tmp_path: Path) -> None:
    out, _ = both(tmp_path)
    referring = Referring(out)
    nonsense = struct.pack(">Q", 0xFFF)
    assert referring.refer(nonsense) == (nonsense, b"")
    data = urgent().page("ram0", 3, NOISE[3]).data
    assert referring.refer(data) == (data, b"")


@pytest.mark.parametrize("place", [(0, 0, 68), (1, 0, 0), (0, 2, 0), (0, 1, 0), (0xFFFFFFFF, 0, 0)])
def test_a_table_that_cannot_be_is_refused(tmp_path: Path, place: tuple[int, int, int]) -> None:
    _, into = both(tmp_path)
    table = np.array([place], PLACE).tobytes()
    for wrong in (table, table[:-1]):
        with pytest.raises(Corrupt):
            resolve(bytes(PAGE), wrong, into.mirror, None)
    with pytest.raises(Corrupt):
        resolve(bytes(PAGE), np.array([(0, 0, 0)], PLACE).tobytes(), None, None)
