"""How few bytes a guest's memory can become: what each technique of the page codec earns, and what is left to earn.

Four guests of 1 GiB, each restored from one golden snapshot that both sites hold and then used: a face detection
service, an in-memory database of 100 MB, a web server with 300 MB of files in its page cache (a third of them new), and
churn of packages. The still memory goes through the real codec, with everything on and with one technique taken away at
a time. "full" is the golden snapshot and the base disk; "sent before" has the blocks of the disk as well that were
written since, as they are there when memory follows the disk. "limit" is the better of zstd -19 --long and xz -9e over
what the page logic leaves of "full", offline; the ratio is "full" over that limit. The aims in MB are the figures of
the study that this repeats, and 15 %.

--only takes guests; with --parts FOLDER what ended is kept there; --steps N measures so many guests more.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from adaptive import Recorder, encode_all  # noqa: E402
from codec import Disk  # noqa: E402
from experiments.parts import Parts, chosen  # noqa: E402
from report import Report, Target  # noqa: E402

from haulier.agent.site import Site  # noqa: E402
from haulier.chunks.blocks import StoreBlockFinder  # noqa: E402
from haulier.chunks.store import ChunkStore  # noqa: E402
from haulier.compress import StreamCompressor, xz  # noqa: E402
from haulier.disks.rounds import DiskRounds  # noqa: E402
from haulier.errors import GuestError  # noqa: E402
from haulier.guests.qemu import Qemu  # noqa: E402
from haulier.handoff.residence import guest_paths  # noqa: E402
from haulier.handoff.shared import blocks_of, golden_manifest  # noqa: E402
from haulier.lab import looking  # noqa: E402
from haulier.lab.container_clients import Redis, Talk  # noqa: E402
from haulier.lab.containers import FACE_PACKAGES, SERVER_PACKAGES  # noqa: E402
from haulier.lab.image import Application  # noqa: E402
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, Template, scenario, template, wan  # noqa: E402
from haulier.memory import BlockFinder, MemoryBase  # noqa: E402
from haulier.memory.proxy import SourceProxy  # noqa: E402
from haulier.units import PAGE  # noqa: E402

LEVEL = xz.FIRST_LEVEL + 2
"""What the controller takes for links of about 10 to 30 Mbps."""
STRONGEST = xz.FIRST_LEVEL + 6
"""For slower ones, where a core is free."""
QUICK_LEVEL = 5
"""Of zstd: from about 50 Mbps on."""
GUEST = "web1"
IMAGE = "bytes"
MEMORY_MIB = 1024
HOST = GUEST_ADDRESS.partition("/")[0]
PORT = 8099
FACES = 160
RECORDS = 160_000
AIMS = {"faces": (12, 12), "database": (42, 42), "web": (65, 1.2), "churn": (18, 2.7)}
"""MB of "full" and of "sent before"."""
UNPACKED = ("libreoffice-common", "emacs-common", "gimp-data")
INSTALLED = ("vim-runtime", "git-man", "wamerican", "fonts-dejavu-core", "hunspell-en-us", "less", "file")
WRITER = """\
import random, sys
chance = random.Random(sys.argv[1])
words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(4000)]
for number in range(int(sys.argv[3])):
    with open(f"{sys.argv[2]}/{number}.bin", "wb") as file:
        file.write(chance.randbytes(5 << 20))
    with open(f"{sys.argv[2]}/{number}.txt", "w") as file:
        left = 5 << 20
        while left > 0:
            left -= file.write(" ".join(chance.choices(words, k=4000))[:left])
"""
"""Writes N random files and N of text, 5 MiB each: SEED DIRECTORY N."""
APPLICATION = Application(
    IMAGE,
    (*SERVER_PACKAGES, *FACE_PACKAGES, "wget"),
    {**looking.application().files, "usr/lib/haulier/writer.py": WRITER.encode()},
    (
        "sed -i 's/^bind .*/bind 0.0.0.0/; s/^protected-mode .*/protected-mode no/' /etc/redis/redis.conf",
        "echo 'save \"\"' >> /etc/redis/redis.conf",
        "mkdir -p /srv/www/new && ln -s /srv/www /var/www/html/www",
        "python3 /usr/lib/haulier/writer.py base /srv/www 20",
    ),
)


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
    ram: Path, base: MemoryBase | None, finder: BlockFinder | None, level: int = LEVEL, *, record: bool = False
) -> tuple[int, list[bytes]]:
    """Bytes on the wire of all of it; with `record` what would go into zstd, at whatever level."""
    with tempfile.TemporaryDirectory() as folder:
        proxy = SourceProxy(Path(folder) / "mirror", base, finder, QUICK_LEVEL if record else level)
        recorder = Recorder()
        if record:
            proxy._compressor = recorder
        encode_all(proxy, ram)
        return proxy.counters.wire_bytes, [batch.data for batch in recorder.batches]


def limit(batches: list[bytes], quick: bool) -> int:
    """What offline compression makes of it; the quick form leaves xz out."""
    plain = b"".join(batches)
    found = len(StreamCompressor(19, 27, True).compress(plain))
    return found if quick else min(found, len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)))


def written(site: Site, qemu: Qemu) -> NDArray[np.uint8]:
    """Blocks of the overlay, u8 (n, 4096), those of zeros left out."""
    rounds = DiskRounds(qemu.qmp, "disk0", guest_paths(site, GUEST).rounds_sock)
    try:
        with rounds.begin() as current:
            found = [current.read(number) for number in current.chunks if number not in current.zero]
    finally:
        rounds.abort()
    data = np.frombuffer(b"".join(bytes(chunk) for chunk in found), np.uint8).reshape(-1, PAGE)
    return data[data.any(axis=1)] if len(data) else np.zeros((0, PAGE), np.uint8)


class Using:
    """One guest of the benchmark, and what its users do."""

    def __init__(self, found: Scenario, debs: Path) -> None:
        self.found, self.debs = found, debs
        self.qemu = Qemu.adopt(guest_paths(found.oslo.site, GUEST), worker=True)

    def sh(self, command: str, timeout: float = 600) -> None:
        with self.qemu.guest_agent(120) as agent:
            agent.check(["/bin/sh", "-c", command], timeout=timeout)

    def faces(self) -> None:
        # The workload that the lab's guests have otherwise listens where this service does.
        service = "/usr/lib/haulier/vision/haulier/lab/services.py faces"
        self.sh(f"systemctl stop haulier-workload; systemd-run -q python3 -u {service}")
        deadline = time.monotonic() + looking.START_S
        while True:
            with contextlib.suppress(OSError):
                talk = Talk(self.found.lab, "client", HOST)
                break
            if time.monotonic() > deadline:
                raise GuestError("the face detection of the guest does not answer")
            time.sleep(0.5)
        for seed in range(FACES):
            talk.ask("detect", seed=seed)
        talk.close()

    def database(self) -> None:
        chance = random.Random(7)
        words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 9))) for _ in range(4000)]
        redis = Redis(self.found.lab, "client", HOST)
        for first in range(0, RECORDS, 1000):
            redis.set_many(
                (f"user:{number}", json.dumps({"id": number, "text": " ".join(chance.choices(words, k=84))}))
                for number in range(first, first + 1000)
            )
        redis.close()

    def web(self) -> None:
        self.sh("python3 /usr/lib/haulier/writer.py new /srv/www/new 10; sync")
        self.sh(
            "cd /srv/www; for f in *.bin *.txt new/*; do wget -q -O /dev/null http://127.0.0.1/www/$f || exit 1; done"
        )

    def churn(self) -> None:
        lab = self.found.lab
        serve = [sys.executable, "-m", "http.server", str(PORT), "--directory", str(self.debs)]
        server = lab.popen("client", serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            where = f"http://{lab.address('client', 'client-oslo')}:{PORT}"
            names = " ".join(sorted(path.name for path in self.debs.glob("*.deb")))
            get = f"wget -q -t 20 --retry-connrefused -w 1 {where}/$f || exit 1"
            fetch = f"cd /var/tmp/churn && for f in {names}; do {get}; done"
            self.sh(f"mkdir -p /var/tmp/churn && {fetch}")
        finally:
            server.terminate()
            server.wait()
        unpack = " ".join(f"{name}_*.deb" for name in UNPACKED)
        install = " ".join(f"{name}_*.deb" for name in INSTALLED)
        self.sh(f"cd /var/tmp/churn && for f in {unpack}; do dpkg -x $f x-$f || exit 1; done; sync")
        self.sh(f"cd /var/tmp/churn && dpkg --force-depends -i {install}; sync; rm -rf /var/tmp/churn")

    def still(self, ram: Path) -> NDArray[np.uint8]:
        """What it has become: a copy of its memory, and the blocks that its disk has more than the base."""
        self.sh("sync")
        with self.qemu.guest_agent(120) as agent:
            agent.fstrim()
        self.qemu.stop()
        try:
            shutil.copyfile(guest_paths(self.found.oslo.site, GUEST).ram, ram)
            return written(self.found.oslo.site, self.qemu)
        finally:
            self.qemu.cont()


def download(folder: Path) -> Path:
    """The packages that churn, from this machine's own mirror."""
    folder.mkdir()
    unsandboxed = ["-o", "APT::Sandbox::User=root"]  # the folder is closed to apt's own user
    subprocess.run(["apt-get", "-qq", *unsandboxed, "download", *UNPACKED, *INSTALLED], cwd=folder, check=True)
    for path in folder.iterdir():
        # Epochs: an address is written otherwise.
        path.rename(folder / path.name.replace("%3a", "_").replace(":", "_"))
    return folder


@dataclass(frozen=True)
class Used:
    """A guest after its use: a copy of its memory, and the blocks u8 (n, 4096) that it wrote to its disk."""

    name: str
    ram: Path
    blocks: NDArray[np.uint8]


def use(found: Scenario, name: str, folder: Path) -> Used:
    found.start_guest(GUEST, memory=f"{MEMORY_MIB}M", image=IMAGE)
    using, ram = Using(found, folder / "debs"), folder / f"{name}.ram"
    try:
        uses: dict[str, Callable[[], None]] = {
            "faces": using.faces,
            "database": using.database,
            "web": using.web,
            "churn": using.churn,
        }
        uses[name]()
        blocks = using.still(ram)
    finally:
        using.qemu.close()
    found.oslo.facts("guest", "remove", GUEST, "--force")
    return Used(name, ram, blocks)


def measure(used: Used, started: Template, quick: bool) -> dict[str, Any]:
    delta = Disk(np.ascontiguousarray(used.blocks)) if len(used.blocks) else None
    snapshot = started.golden
    with ChunkStore(started.root / "store") as store:
        manifest, golden = store.load_manifest(f"image/{IMAGE}"), golden_manifest(store, snapshot.meta.id)
        disk = StoreBlockFinder(*blocks_of(store, manifest, golden, snapshot.path / "blocks.idx"))
        base = MemoryBase.from_mapped_ram(snapshot.path / "memory")
        least = limit(encode(used.ram, base, disk, record=True)[1], quick)
        full = encode(used.ram, base, disk)[0]
        bytes_of = {
            "full": full,
            "limit": least,
            "sent before": encode(used.ram, base, Both(disk, delta))[0],
            "no golden": encode(used.ram, None, disk)[0],
            "no disk": encode(used.ram, base, None)[0],
            "full, xz preset 6": encode(used.ram, base, disk, STRONGEST)[0],
            "full, zstd level 5": encode(used.ram, base, disk, QUICK_LEVEL)[0],
            "zstd alone": encode(used.ram, None, None, QUICK_LEVEL)[0],
            "new on disk": len(used.blocks) * PAGE,
        }
    strongest = bytes_of["full, xz preset 6"] / least
    return {
        "ratio": full / least,
        "xz preset 6, ratio": strongest,
        "guest": used.name,
        **{key: value / 1e6 for key, value in bytes_of.items()},
    }


def run(quick: bool, only: Sequence[str] = (), parts: Path | None = None, steps: int = 0) -> Report:
    kept, rows = Parts(parts, steps), []
    notes = [f"MB, {xz.name_of(LEVEL)}, memory of one pass over a still picture"]
    for name in ("faces", "churn") if quick else AIMS:
        if not chosen(name, only):
            continue
        if (row := kept.attempt(f"bytes{' quick' * quick}: {name}", partial(one, name, quick), notes)) is not None:
            rows.append(row)
            print(f"{time.strftime('%H:%M:%S')} {row}", file=sys.stderr, flush=True)
    targets = []
    for row in rows:
        name = row["guest"]
        targets += [
            Target.at_most(f"{name}: everything over the limit", row["ratio"], 1.15),
            Target.at_most(f"{name}: the same with xz preset 6", row["xz preset 6, ratio"], 1.15),
            Target.at_most(f"{name}: full, MB", row["full"], 1.15 * AIMS[name][0]),
            Target.at_most(f"{name}: sent before, MB", row["sent before"], 1.15 * AIMS[name][1]),
        ]
    return Report(rows, targets, notes=notes)


def one(name: str, quick: bool) -> dict[str, Any]:
    """The row of one guest; it is measured when the lab is down."""
    started = made()
    with tempfile.TemporaryDirectory(prefix="bytes-") as work:
        folder = Path(work)
        if name == "churn":
            download(folder / "debs")
        with scenario("bench-bytes", started, [wan("100mbit", "5ms")]) as found:
            used = use(found, name, folder)
        return measure(used, started, quick)


def made() -> Template:
    """The image with its golden snapshot, made where it is not there yet."""
    return template(MEMORY_MIB, application=APPLICATION, size=looking.DISK_BYTES)
