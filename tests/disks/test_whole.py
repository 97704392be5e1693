"""Everything together, with a real QEMU at the source: export, overlay, rounds, transfer, and the target's export."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.disks.export import DiskExport
from haulier.disks.nbd import NbdReader
from haulier.disks.nbdproto import ALLOCATION
from haulier.disks.rounds import DiskRounds
from haulier.units import CHUNK
from tests.disks.pairs import pair
from tests.disks.qemus import Disk, qemu_with_disk

SIZE = 256 * CHUNK


def write(disk: Disk, rng: random.Random, count: int) -> None:
    for _ in range(count):
        at = rng.randrange(0, SIZE // 4096) * 4096
        length = min(rng.choice([4096, 8192, 65536, 200 * 1024]), SIZE - at)
        disk.io(f"write -P {rng.randrange(1, 256)} {at} {length}")


@pytest.mark.qemu
def test_a_running_disk_arrives_whole(tmp_path: Path) -> None:
    rng = random.Random(7)
    base = {n: rng.randbytes(CHUNK) for n in range(0, 200, 2)}
    with pair(tmp_path, base, SIZE, at_target=set(range(100))) as p:
        for store in (p.source, p.target):
            store.save_manifest("image/debian", p.base, partial=store is p.target)
        here = DiskExport.start(
            p.source.path, "image/debian", tmp_path / "a.nbd", tmp_path / "a.ctl", tmp_path / "a.log"
        )
        exports = [here]
        try:
            node = {"driver": "nbd", "server": {"type": "unix", "path": str(here.socket)}, "export": "disk0"}
            with qemu_with_disk(tmp_path, {**node, "reconnect-delay": 10}, SIZE) as disk:
                write(disk, rng, 12)
                disk.io("write -P 77 0 64k")
                rounds = DiskRounds(disk.qmp, "disk0", tmp_path / "r.nbd")
                offered = p.sender.offer_manifest()
                assert (offered.chunks_at_target, offered.chunks_sent) == (50, 50)
                with rounds.begin() as this:
                    report = p.sender.send_round(this.items())
                assert report.chunks_dirty == len(this.chunks) > 10
                first = p.sender.commit()

                # The target's QEMU would start now, on the manifest of the moment.
                there = DiskExport.start(
                    p.target.path, "guest/web1", tmp_path / "b.nbd", tmp_path / "b.ctl", tmp_path / "b.log"
                )
                exports.append(there)
                p.receiver._on_commit = lambda manifest, final: there.swap("guest/web1")
                watcher = NbdReader(there.socket, "disk0", [ALLOCATION])
                try:
                    for _ in range(4):
                        write(disk, rng, 5)
                        disk.io(f"write -P {rng.randrange(1, 255)} 0 4k")  # hot: in every round
                        with rounds.next() as this:
                            report = p.sender.send_round(this.items())
                        assert report.chunks_dirty > 0
                        p.sender.commit()
                    assert 0 in rounds.held_back
                    disk.io("discard 6M 8M")
                    disk.io("write -P 5 15M 4k")
                    with rounds.final() as this:
                        assert 0 in this.chunks
                        zeros = len(this.zero)
                        report = p.sender.send_round(this.items(), ask=False)
                    assert zeros >= 128 and report.chunks_zero >= 60
                    assert report.chunks_dirty > 0
                    rounds.stop()
                    last = p.sender.commit(final=True)
                    p.check_equal()
                    assert there.stats()["digest"] == last.digest.hex() != first.digest.hex()

                    # The oracle: every chunk of the source's disk0, read by QEMU from the stopped guest's overlay.
                    overlay = f"driver=qcow2,file.driver=file,file.filename={disk.overlay},file.locking=off"
                    below = f"backing.driver=nbd,backing.export=disk0,backing.server.path={here.socket}"
                    chain = f"{overlay},{below},backing.server.type=unix"
                    raw = tmp_path / "disk0.raw"
                    disk.qmp.execute("human-monitor-command", {"command-line": "qemu-io disk0 flush"})
                    subprocess.run(["qemu-img", "convert", "-U", "--image-opts", chain, "-O", "raw", raw], check=True)
                    data = raw.read_bytes()
                    assert len(data) == SIZE
                    for n in range(SIZE // CHUNK):
                        chunk = data[n * CHUNK : (n + 1) * CHUNK]
                        assert p.receiver.manifest[n] == (fingerprint(chunk) if any(chunk) else ZERO), n
                    served = b"".join(bytes(d) for _, d in watcher.read_many(range(0, SIZE, CHUNK), CHUNK))
                    assert served == data
                finally:
                    watcher.close()
        finally:
            for export in exports:
                export.stop()
