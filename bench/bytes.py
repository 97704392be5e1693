"""How few bytes a guest's memory can become: what each technique of the page codec earns, and what is left to earn.

One guest with four loads in turn, restored from a golden snapshot that both sites hold. Its memory as it then is goes
through the real codec with everything on, and with one technique taken away at a time: the golden snapshot, the blocks
of the disk that both sites have, the blocks of the disk that were written since (the disk delta, sent before memory),
the long window. "limit" is the better of zstd -19 --long and xz -9e over what the page logic leaves, offline. The ratio
is everything over that limit. Bytes are of one pass over a still picture; nothing is dirtied meanwhile.
"""

from __future__ import annotations

import lzma
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from adaptive import LOADS, Recorder  # noqa: E402
from codec import Disk  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.chunks.blocks import StoreBlockFinder  # noqa: E402
from haulier.chunks.store import ChunkStore  # noqa: E402
from haulier.compress import StreamCompressor  # noqa: E402
from haulier.disks.rounds import DiskRounds  # noqa: E402
from haulier.guests.command import RAM_ID  # noqa: E402
from haulier.guests.qemu import Qemu  # noqa: E402
from haulier.handoff import retained  # noqa: E402
from haulier.handoff.journal import Journal  # noqa: E402
from haulier.handoff.residence import guest_paths, spec_of  # noqa: E402
from haulier.handoff.shared import blocks_of, golden_manifest  # noqa: E402
from haulier.lab.clients import Workload  # noqa: E402
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, scenario, template, wan  # noqa: E402
from haulier.memory import BlockFinder, MemoryBase  # noqa: E402
from haulier.memory.ahead import AheadReader  # noqa: E402
from haulier.memory.proxy import AHEAD_PAGES, SourceProxy  # noqa: E402
from haulier.units import PAGE  # noqa: E402

LEVEL = 7


class Both:
    """Blocks of the base, and blocks that were written since."""

    def __init__(self, base: BlockFinder | None, delta: BlockFinder | None) -> None:
        self._finders = [finder for finder in (base, delta) if finder is not None]

    def find(self, pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        found = np.full(len(pages), -1, np.int64)
        for finder in self._finders:
            rest = np.flatnonzero(found < 0)
            if len(rest):
                found[rest] = finder.find(np.ascontiguousarray(pages[rest]))
        return found


def encode(
    ram: Path, base: MemoryBase | None, finder: BlockFinder | None, *, long: bool = True, record: bool = False
) -> tuple[int, list[bytes]]:
    """Bytes on the wire of all of it; with `record` what would go into zstd."""
    with tempfile.TemporaryDirectory() as folder:
        proxy = SourceProxy(Path(folder) / "mirror", base, finder, LEVEL, long=long)
        recorder = Recorder()
        if record:
            proxy._compressor = recorder
        reader = AheadReader(ram, RAM_ID)
        proxy.name({RAM_ID: reader.pages * PAGE})
        reader.plan_all()
        while not reader.done:
            assert proxy.mirror is not None
            numbers, pages = reader.take(proxy.mirror)
            for at in range(0, len(numbers), AHEAD_PAGES):
                proxy.ahead(RAM_ID, numbers[at : at + AHEAD_PAGES], pages[at : at + AHEAD_PAGES])
        reader.close()
        proxy.close()
        return proxy.counters.wire_bytes, recorder.batches


def limit(batches: list[bytes]) -> int:
    plain = b"".join(batches)
    best = StreamCompressor(19, 27, True)
    return min(len(best.compress(plain)), len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)))


def written(site: Any, qemu: Qemu) -> NDArray[np.uint8]:
    """Blocks of the overlay."""
    rounds = DiskRounds(qemu.qmp, "disk0", guest_paths(site, "web1").rounds_sock)
    try:
        with rounds.begin() as current:
            found = [current.read(number) for number in current.chunks if number not in current.zero]
    finally:
        rounds.abort()
    data = np.frombuffer(b"".join(bytes(chunk) for chunk in found), np.uint8).reshape(-1, PAGE)
    return data[data.any(axis=1)] if len(data) else np.zeros((0, PAGE), np.uint8)


def one(found: Scenario, name: str, load: dict[str, Any], folder: Path) -> dict[str, Any]:
    workload = Workload(found.lab, "client", GUEST_ADDRESS)
    workload.start(load["memory_mib"], **{key: value for key, value in load.items() if key != "memory_mib"})
    time.sleep(10)
    site = found.oslo.site
    ram = folder / "ram"
    qemu = Qemu.adopt(guest_paths(site, "web1"), worker=True)
    try:
        qemu.stop()
        shutil.copyfile(guest_paths(site, "web1").ram, ram)
        blocks = written(site, qemu)
    finally:
        qemu.cont()
        qemu.close()
    delta = Disk(np.ascontiguousarray(blocks)) if len(blocks) else None
    with Journal(site.journal) as journal, ChunkStore(site.store) as store:
        row = journal.guest("web1")
        spec = spec_of(row)
        manifest, golden = store.load_manifest(row.manifest), golden_manifest(store, spec.golden)
        disk = StoreBlockFinder(*blocks_of(store, manifest, golden, site.golden / spec.golden / "blocks.idx"))
        base = retained.open_base(site, "web1", spec.uuid, retained.GOLDEN + spec.golden)
        everything, batches = encode(ram, base, Both(disk, delta), record=True)
        everything, _ = encode(ram, base, Both(disk, delta))
        least = limit(batches)
        row_of = {
            "ratio": everything / least,
            "load": name,
            "everything": everything,
            "limit": least,
            "no golden": encode(ram, None, Both(disk, delta))[0],
            "no disk blocks": encode(ram, base, Both(None, delta))[0],
            "no disk delta": encode(ram, base, disk)[0],
            "no long window": encode(ram, base, Both(disk, delta), long=False)[0],
            "zstd alone": encode(ram, None, None)[0],
            "delta": len(blocks) * PAGE,
        }
    ram.unlink()
    return {key: value / 1e6 if isinstance(value, int) else value for key, value in row_of.items()}


def run(quick: bool) -> Report:
    with (
        scenario("bench-bytes", template(512), [wan("100mbit", "5ms")]) as found,
        tempfile.TemporaryDirectory(dir=found.work) as folder,
    ):
        found.start_guest()
        loads = {name: LOADS[name] for name in (("idle", "files") if quick else LOADS)}
        rows = [one(found, name, load, Path(folder)) for name, load in loads.items()]
    return Report(
        rows,
        [Target.at_most(f"{row['load']}: everything over the limit", row["ratio"], 1.15) for row in rows],
        notes=[f"MB, level {LEVEL}"],
    )
