"""Four guests of 1 GiB as their users leave them, each restored from one golden snapshot that both sites hold.

A face detection service that has looked at pictures, an in-memory database of 100 MB, a web server with 300 MB of files
in its page cache (a third of them new), and churn of packages. What is taken of each is its memory, still, and the
blocks that it wrote to its disk.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from haulier.agent.site import Site
from haulier.chunks.blocks import StoreBlockFinder
from haulier.chunks.store import ChunkStore
from haulier.disks.rounds import DiskRounds
from haulier.errors import GuestError
from haulier.guests.qemu import Qemu
from haulier.handoff.residence import guest_paths
from haulier.handoff.shared import blocks_of, golden_manifest
from haulier.lab import looking
from haulier.lab.container_clients import Redis, Talk
from haulier.lab.containers import FACE_PACKAGES, SERVER_PACKAGES
from haulier.lab.image import Application
from haulier.lab.scenario import GUEST_ADDRESS, Scenario, Template, scenario, template, wan
from haulier.memory import MemoryBase
from haulier.units import PAGE

GUEST = "web1"
IMAGE = "bytes"
MEMORY_MIB = 1024
HOST = GUEST_ADDRESS.partition("/")[0]
PORT = 8099
FACES = 160
RECORDS = 160_000
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


NAMES = ("faces", "database", "web", "churn")


@contextlib.contextmanager
def guest(name: str) -> Iterator[Used]:
    """One of them, after its use; nothing of it runs any more."""
    started = made()
    with tempfile.TemporaryDirectory(prefix="used-") as work:
        folder = Path(work)
        if name == "churn":
            download(folder / "debs")
        with scenario(f"bench-{name}", started, [wan("100mbit", "5ms")]) as found:
            used = use(found, name, folder)
        yield used


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


@contextlib.contextmanager
def shared() -> Iterator[tuple[MemoryBase, StoreBlockFinder]]:
    """What both sites hold of them: the golden snapshot's memory, and the blocks of its disk and the image's."""
    started = made()
    snapshot = started.golden
    with ChunkStore(started.root / "store") as store:
        manifest, golden = store.load_manifest(f"image/{IMAGE}"), golden_manifest(store, snapshot.meta.id)
        disk = StoreBlockFinder(*blocks_of(store, manifest, golden, snapshot.path / "blocks.idx"))
        base = MemoryBase.from_mapped_ram(snapshot.path / "memory")
        try:
            yield base, disk
        finally:
            base.close()


def made() -> Template:
    """The image with its golden snapshot, made where it is not there yet."""
    return template(MEMORY_MIB, application=APPLICATION, size=looking.DISK_BYTES)
