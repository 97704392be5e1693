"""Images of containers for the lab, built from the machine's own Debian packages, in a store that sites start from.

base      a Debian with Python
servers   redis and nginx on top of it
game, memory, video, faces    one service each, on top of one of these
shop      another application with the same libraries as `servers`, in a layer of its own, as if built elsewhere

Root file systems are unpacked with more and with fewer packages; what the larger one has more becomes a layer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from haulier.chunks.store import ChunkStore
from haulier.containers.importing import difference, import_container
from haulier.containers.model import ImageConfig
from haulier.errors import GuestError, Unsupported
from haulier.lab import apt, services

Say = Callable[[float, str], None]
CACHE: Final = Path("/var/cache/haulier")
BASE_PACKAGES: Final = ("python3",)
SERVER_PACKAGES: Final = ("redis-server", "nginx-light")
FACE_PACKAGES: Final = ("python3-opencv", "opencv-data")
SHOP_PAGES: Final = 300
VIDEO_BYTES: Final = 180 << 20
_EXCLUDED: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_BUILD_S: Final = 1800

NGINX_CONF: Final = """\
daemon off; worker_processes 1; user root; error_log /var/log/nginx/error.log; pid /run/nginx.pid;
events { worker_connections 256; }
http { access_log /var/log/nginx/access.log; sendfile on; server { listen 80; root /srv/www; } }
"""
REDIS_CONF: Final = """\
bind 0.0.0.0
protected-mode no
daemonize no
save ""
appendonly no
dir /var/lib/redis
logfile ""
io-threads 1
"""


@dataclass(frozen=True)
class ContainerTemplate:
    """A store with the lab's images; sites start as copies of it."""

    root: Path

    def copy_to(self, root: Path) -> None:
        """Gives a site's directory the images and their unpacked layers, as if they had been brought there before."""
        root.mkdir(parents=True, exist_ok=True)
        for name in ("store", "layers"):
            if (self.root / name).exists():
                subprocess.run(["cp", "-a", "--reflink=auto", str(self.root / name), str(root / name)], check=True)


def container_template(*, faces: bool = False, say: Say = lambda share, what: None) -> ContainerTemplate:
    """Builds the images, or takes those that were built before; safe against concurrent callers."""
    distribution, suite = apt.host_release()
    del distribution
    source = Path(services.__file__).read_bytes()
    packages = [BASE_PACKAGES, SERVER_PACKAGES, FACE_PACKAGES if faces else ()]
    what = json.dumps([suite, *packages, NGINX_CONF, REDIS_CONF, SHOP_PAGES])
    name = hashlib.blake2b(what.encode() + source, digest_size=6).hexdigest()
    root = CACHE / f"containers-{name}"
    # Complete as soon as it has its name; whoever builds another one need not be waited for.
    if root.exists():
        return ContainerTemplate(root)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "containers.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.exists():
            return ContainerTemplate(root)
        with tempfile.TemporaryDirectory(prefix="containers-", dir=CACHE) as place:
            scratch = Path(place)
            _build(scratch / "made", scratch, suite, source, faces, say)
            (scratch / "made").rename(root)
    return ContainerTemplate(root)


def _build(root: Path, scratch: Path, suite: str, source: bytes, faces: bool, say: Say) -> None:
    base, servers = scratch / "base", scratch / "servers"
    say(0.0, "unpacking a root file system")
    unpack(base, suite, BASE_PACKAGES, scratch)
    _tree(servers, base, suite, SERVER_PACKAGES, scratch, say)
    with ChunkStore(root / "store") as store:
        import_container(store, "base", base)
        import_container(store, "servers", scratch / "servers.layer", base="base")
        if faces:
            _tree(scratch / "opencv", base, suite, FACE_PACKAGES, scratch, say)
            import_container(store, "opencv", scratch / "opencv.layer", base="base")
        say(0.8, "importing")
        python = ("python3", "-u", "/srv/services.py")
        _service(store, scratch, "game", "base", source, (*python, "game"))
        _service(store, scratch, "memory", "base", source, (*python, "memory", "110", "160"))
        if faces:
            _service(store, scratch, "faces", "opencv", source, (*python, "faces"))
        _service(store, scratch, "redis", "servers", source, ("redis-server", "/etc/redis/lab.conf"))
        _service(store, scratch, "video", "servers", source, ("nginx", "-c", "/etc/nginx/lab.conf"))
        _shop(store, scratch)


def _tree(root: Path, base: Path, suite: str, packages: Sequence[str], scratch: Path, say: Say) -> None:
    say(0.3, f"unpacking {', '.join(packages)}")
    unpack(root, suite, [*BASE_PACKAGES, *packages], scratch)
    difference(base, root, root.with_name(root.name + ".layer"))


def _service(store: ChunkStore, scratch: Path, name: str, base: str, source: bytes, command: tuple[str, ...]) -> None:
    folder = scratch / f"{name}.service"
    (folder / "srv").mkdir(parents=True)
    (folder / "srv" / "services.py").write_bytes(source)
    if name == "redis":
        _write(folder / "etc/redis/lab.conf", REDIS_CONF)
    if name == "video":
        _write(folder / "etc/nginx/lab.conf", NGINX_CONF)
        (folder / "srv/www").mkdir()
        with (folder / "srv/www/video").open("wb") as file:
            chosen = random.Random(3)
            for _ in range(VIDEO_BYTES >> 20):
                file.write(chosen.randbytes(1 << 20))
    for path in [folder, *sorted(folder.rglob("*"))]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (1_700_000_000, 1_700_000_000))
    import_container(store, name, folder, base=base, config=ImageConfig(command=command))


def _shop(store: ChunkStore, scratch: Path) -> None:
    folder = scratch / "servers.layer"
    _write(folder / "etc/nginx/lab.conf", NGINX_CONF)
    for number in range(SHOP_PAGES):
        page = folder / f"srv/www/{number}.html"
        _write(page, f"<html><title>Article {number}</title>{random.Random(number).randbytes(300).hex()}</html>\n")
        os.utime(page, (1_700_000_000, 1_700_000_000))
    config = ImageConfig(command=("nginx", "-c", "/etc/nginx/lab.conf"))
    import_container(store, "shop", folder, base="base", config=config)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def unpack(root: Path, suite: str, packages: Sequence[str], scratch: Path) -> None:
    """A root file system from packages of the machine's own mirror. GuestError says what failed."""
    if shutil.which("mmdebstrap") is None:
        raise Unsupported("building an image needs mmdebstrap; run scripts/setup, or install it")
    _, host_suite = apt.host_release()
    sources = apt.sources_for(suite, host_suite, apt.machine_sources())
    listing = scratch / "lab.sources"
    listing.write_text("\n".join(source.deb822() for source in sources))
    command = ["mmdebstrap", "--mode=root", "--variant=essential", f"--include={','.join(packages)}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED]
    command += [f"--aptopt={option}" for option in apt.acquire_options()]
    command += [suite, str(root), str(listing)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "LC_ALL": "C.UTF-8"}
    _debootstrap(root, command, environment, retry=True)
    for folder in ("dev", "proc", "sys", "run", "tmp"):
        shutil.rmtree(root / folder, ignore_errors=True)
        (root / folder).mkdir(mode=0o755)
    (root / "tmp").chmod(0o1777)


def _debootstrap(root: Path, command: list[str], environment: dict[str, str], *, retry: bool) -> None:
    began = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_BUILD_S,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode and retry:
        # A package that did not come whole.
        shutil.rmtree(root, ignore_errors=True)
        _debootstrap(root, command, environment, retry=False)
    elif done.returncode:
        raise GuestError(f"mmdebstrap failed after {time.monotonic() - began:.0f} s: {done.stderr.strip()[-800:]}")
