"""What CRIU is asked for when a container is dumped, byte for byte as its protocol has it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from haulier.agent.site import Site
from haulier.containers.bundle import NETWORK_KEY, criu_options
from haulier.containers.criu import find_criu, self_test
from haulier.containers.dumping import NOTE, DumpRequest, end_left
from haulier.containers.freezer import Freezer
from haulier.containers.protobuf import fields
from haulier.errors import Unsupported
from haulier.handoff.residence import container_paths, resume_original
from haulier.process import ProcessId
from tests.support.freezing import as_container, freezable, used
from tests.support.waiting import wait_for

WORKER = """
import sys
from pathlib import Path
from haulier.containers.dumping import Dumping, DumpRequest

def lock():
    print("locked", flush=True)
    if hold == "hold":
        sys.stdin.read()

pid, freezer, images, work, options, external, hold = sys.argv[1:]
request = DumpRequest(int(pid), Path("/"), Path(options), Path(freezer), external=(external,))
dumping = Dumping(request, Path(images), Path(work))
dumping.ready()
dumping.finish(lock)
print("dumped", flush=True)
sys.stdin.read()
"""


def test_a_request_says_what_lies_outside() -> None:
    request = DumpRequest(
        77, Path("/root fs"), Path("/criu.conf"), Path("/cg"), external=("net[5]:extRootNetNS",), masked=("/proc/keys",)
    )
    said = fields(request.encode(3, 4))
    assert said[1] == 1
    options = fields(bytes(said[2]))  # type: ignore[arg-type]
    # Numbers of images/rpc.proto: directories, process, left running, notified, control groups.
    assert (options[1], options[17], options[2], options[3], options[12], options[24]) == (3, 4, 77, 1, 1, 1)
    assert options[13] == b"/root fs" and options[51] == b"/criu.conf" and options[44] == b"/cg"
    assert options[37] == b"net[5]:extRootNetNS"
    assert fields(bytes(options[23])) == {1: b"/proc/keys", 2: b"/dev/null"}  # type: ignore[arg-type]


class Worker(subprocess.Popen[bytes]):
    """One that dumps a process, and says how far it is."""

    def __init__(self, words: list[str]) -> None:
        super().__init__([sys.executable, "-c", WORKER, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def says(self) -> bytes:
        assert self.stdout is not None
        return self.stdout.readline().strip()

    def criu(self) -> psutil.Process | None:
        return next(iter(psutil.Process(self.pid).children()), None)


@contextmanager
def dumped(site: Site, images: Path, hold: str = "") -> Iterator[tuple[subprocess.Popen[bytes], Freezer, Worker]]:
    """A frozen process which the site takes for its container web1, and a worker that has a dump of it under way."""
    try:
        problem = self_test(find_criu().path)
    except Unsupported as error:
        problem = str(error)
    if problem:
        pytest.skip(problem)
    words = ["unshare", "--net", sys.executable, "-S", "-c", "while True: pass"]
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with freezable(words, start_new_session=True, cwd="/", **nowhere) as (child, freezer):
        mine, own = Path("/proc/self/ns/net"), Path(f"/proc/{child.pid}/ns/net")
        wait_for(lambda: own.readlink() != mine.readlink() and used(child) > 20, 20)
        as_container(site, "web1", child)
        paths = container_paths(site, "web1")
        paths.criu_options.write_text(criu_options(restoring=False))
        external = f"net[{own.stat().st_ino}]:{NETWORK_KEY}"
        freezer.freeze()
        given = [str(child.pid), str(freezer.folder), str(images), str(paths.log_dir), str(paths.criu_options)]
        with Worker([*given, external, hold]) as worker:
            try:
                yield child, freezer, worker
            finally:
                worker.kill()
                end_left(paths.log_dir)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "s", "oslo", "127.0.0.1:7440")
    site.make_directories()
    return site


def noted(site: Site) -> Path:
    return container_paths(site, "web1").log_dir / NOTE


@pytest.mark.root
def test_a_dump_that_ends_leaves_no_note(site: Site, tmp_path: Path) -> None:
    with dumped(site, tmp_path) as (_, freezer, worker):
        assert (worker.says(), worker.says()) == (b"locked", b"dumped")
        assert not noted(site).exists() and freezer.frozen()
        end_left(noted(site).parent)


@pytest.mark.root
def test_a_container_whose_dump_lost_its_worker_stays_thawed(site: Site, tmp_path: Path) -> None:
    """CRIU gives up, and has the freezer as it found it: frozen."""
    with dumped(site, tmp_path, "hold") as (child, freezer, worker):
        assert worker.says() == b"locked"
        criu = worker.criu()
        assert criu is not None
        criu.suspend()
        worker.kill()
        resuming = threading.Thread(target=resume_original, args=(site, "web1"))
        resuming.start()
        # A chance for one that does not wait.
        resuming.join(0.5)
        criu.resume()
        resuming.join()
        wait_for(lambda: ProcessId.of(criu.pid) is None, 20)
        assert not freezer.asked() and not noted(site).exists()
        before = used(child)
        wait_for(lambda: used(child) > before, 20)


@pytest.mark.root
def test_a_dump_that_waits_for_a_reader_of_its_pages_is_ended(site: Site, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pages-1.img")
    with dumped(site, tmp_path) as (child, _, worker):
        criu = wait_for(worker.criu, 20)
        assert worker.says() == b"locked"
        # What it writes before it opens the pipe.
        wait_for(lambda: list(tmp_path.glob("pagemap-*.img")), 20)
        worker.kill()
        assert resume_original(site, "web1") and ProcessId.of(criu.pid) is None
        before = used(child)
        wait_for(lambda: used(child) > before, 20)
