"""The layer of a virtual machine's disk that the published method sends, made by the real qemu-img."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from haulier.errors import GuestError
from haulier.lab.seed_method import make_layer, same_disk

MIB = 1 << 20


def test_a_layer_is_what_a_disk_has_other_than_its_base(tmp_path: Path) -> None:
    base, whole, layer = tmp_path / "base.raw", tmp_path / "whole.raw", tmp_path / "layer.qcow2"
    shared, old, new = (random.Random(seed).randbytes(MIB) for seed in range(3))
    # The second MiB is another, the third is gone, the fourth is new.
    base.write_bytes(shared + old + shared + bytes(MIB))
    whole.write_bytes(shared + new + bytes(MIB) + new)
    make_layer(whole, base, layer)
    same_disk(whole, layer)
    # Zeros are written out.
    assert 3 * MIB < layer.stat().st_size < 4 * MIB, "what both have is left out"
    with pytest.raises(GuestError, match="compare"):
        same_disk(base, layer)
    base.write_bytes(bytes(4 * MIB))
    with pytest.raises(GuestError, match="compare"):
        same_disk(whole, layer)
