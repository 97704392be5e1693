"""Golden snapshots without a guest: files as an agent keeps them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from haulier.guests.golden import Golden, GoldenMeta, golden_id
from haulier.memory.base import MemoryBase
from haulier.units import PAGE
from tests.support.qemustream import mapped_ram, page_of


def meta(**changes: object) -> GoldenMeta:
    made = GoldenMeta(
        format=1,
        id="",
        image="debian",
        image_manifest="11" * 32,
        manifest="22" * 32,
        memory="33" * 32,
        memory_size=1000,
        memory_mib=256,
        vcpus=1,
        disk_size=4 << 30,
        machine="pc-q35-8.2",
        cpu="Nehalem-v1",
        free_page_hint=False,
        accel="tcg",
        qemu="10.0.2",
        created=1000.0,
    )
    made = msgspec.structs.replace(made, **changes)
    return msgspec.structs.replace(made, id=golden_id(made))


def put(root: Path, made: GoldenMeta) -> Path:
    path = root / made.id
    path.mkdir(parents=True)
    (path / "meta.json").write_bytes(msgspec.json.encode(made))
    for name in ("memory", "blocks.idx"):
        (path / name).write_bytes(b"x")
    return path


def snapshot(root: Path) -> Golden:
    """One with memory of its own, as an agent keeps it: its digest is stored beside it."""
    mapped_ram(root / "half", {"ram0": {1: page_of(3), 40: page_of(4)}}, {"ram0": 64 * PAGE})
    base = MemoryBase.from_mapped_ram(root / "half")
    made = put(root, meta(memory=base.digest.hex()))
    base.close()
    (root / "half").rename(made / "memory")
    (root / "half.digest").rename(made / "memory.digest")
    return Golden.load(made)


def decay(golden: Golden, at: int = -1) -> None:
    """Bits flip on the disk: the file says nothing of it."""
    status = golden.memory.stat()
    data = bytearray(golden.memory.read_bytes())
    where = data.index(page_of(4)) if at < 0 else at
    data[where] ^= 0x10
    golden.memory.write_bytes(data)
    os.utime(golden.memory, ns=(status.st_atime_ns, status.st_mtime_ns))
