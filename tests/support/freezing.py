"""Real processes in a control group of their own that can freeze them, and one that a site takes for its container."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from haulier.agent.site import Site
from haulier.containers.freezer import Freezer, freezer_of
from haulier.containers.model import ContainerSpec
from haulier.guests.model import GuestSpec, new_spec
from haulier.handoff.residence import container_paths
from haulier.process import ProcessId
from haulier.units import CHUNK
from tests.support.waiting import wait_for

BUSY = ("sh", "-c", "while :; do :; done")


@contextmanager
def freezable(words: Sequence[str] = BUSY, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], Freezer]]:
    """A process, and the freezer of the group that it is in alone; both are gone afterwards."""
    mine = freezer_of(os.getpid())
    folder = mine.folder / f"haulier-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control groups may be made here: {error}")
    child = subprocess.Popen(words, **options)
    freezer = Freezer(folder, mine.unified)
    try:
        (folder / "cgroup.procs").write_text(str(child.pid))
        yield child, freezer
    finally:
        freezer.thaw()
        child.kill()
        child.wait()
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), 10)
        folder.rmdir()


def used(child: subprocess.Popen[bytes]) -> int:
    """Ticks of a processor that it has had."""
    return int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11])


def as_container(site: Site, name: str, child: subprocess.Popen[bytes]) -> GuestSpec:
    """Has the site find that process where it looks for its container `name`, which is on no network."""
    spec = new_spec(
        name, "web", memory_mib=64, disk_size=4 * CHUNK, container=ContainerSpec(layers=(1,), command=("x",))
    )
    paths, process = container_paths(site, name), ProcessId.of(child.pid)
    assert process is not None
    for path in (paths.bundle, paths.log_dir):
        path.mkdir(parents=True)
    paths.spec_file.write_bytes(msgspec.json.encode(spec))
    paths.record.write_text(json.dumps(asdict(process) | {"netns": "", "cable": ""}))
    return spec
