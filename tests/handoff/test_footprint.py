"""What a worker says of its own memory."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np

from haulier.handoff.footprint import footprint
from haulier.units import MIB


def test_memory_that_is_taken_is_counted(tmp_path: Path) -> None:
    gc.collect()
    before = footprint(tmp_path / "mirror")
    held = np.ones(64 * MIB, np.uint8)
    (tmp_path / "mirror").write_bytes(bytes(range(256)) * 4096)
    after = footprint(tmp_path / "mirror")
    assert before["anonymous"] > 0 and before["mirror"] == 0
    assert after["anonymous"] - before["anonymous"] > 48 * MIB
    assert after["mirror"] >= MIB and held[0] == 1


def test_where_the_kernel_does_not_say_it_is_nothing(tmp_path: Path) -> None:
    assert footprint(tmp_path / "mirror", tmp_path / "none")["anonymous"] == 0
    (tmp_path / "odd").write_text("Anonymous:\n")
    assert footprint(tmp_path / "mirror", tmp_path / "odd")["anonymous"] == 0
