"""Stretches of connections' queues are found in the files that processes have open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.containers.checkpoint import digest_of
from haulier.containers.queues import LEAST, Queues


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A directory with a file of random bytes, which this process has open."""
    folder = tmp_path / "root"
    # As the process sees it, whose own root this is: its files have the same names in both.
    (folder / tmp_path.relative_to("/")).mkdir(parents=True)
    served = tmp_path / "served"
    served.write_bytes(os.urandom(3 << 20))
    os.link(served, folder / served.relative_to("/"))
    with served.open("rb"):
        yield folder


def stream(folder: Path, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tcp-stream-1f.img"
    path.write_bytes(data)
    return path


def test_a_stretch_of_an_open_file_is_found(tmp_path: Path, root: Path) -> None:
    contents = (tmp_path / "served").read_bytes()
    wanted = contents[1_000_001:1_800_003]
    stream(tmp_path / "dump", b"HTTP/1.1 200 OK\r\n\r\n" + wanted + b"and more of its own")
    queues = Queues()
    (found,) = queues.find(tmp_path / "dump", [os.getpid()], root, anywhere=True)
    assert found.name == "tcp-stream-1f.img" and b"/" + found.path == os.fsencode(tmp_path / "served")
    assert (found.at, found.offset, found.length) == (19, 1_000_001, len(wanted))
    assert found.digest == digest_of(wanted)
    # The next dump is a little further on; it is looked for from there only.
    stream(tmp_path / "dump", contents[1_500_000:2_000_000])
    (found,) = queues.find(tmp_path / "dump", [os.getpid()], root)
    assert (found.at, found.offset, found.length) == (0, 1_500_000, 500_000)
    assert Queues().find(tmp_path / "dump", [os.getpid()], root) == []


def test_what_is_in_no_file_is_sent(tmp_path: Path, root: Path) -> None:
    stream(tmp_path / "dump", os.urandom(1 << 20))
    assert Queues().find(tmp_path / "dump", [os.getpid()], root, anywhere=True) == []
    contents = (tmp_path / "served").read_bytes()
    stream(tmp_path / "dump", os.urandom(LEAST) + contents[: LEAST // 2] + os.urandom(LEAST))
    assert Queues().find(tmp_path / "dump", [os.getpid()], root, anywhere=True) == []


def test_a_file_that_is_not_the_containers_is_left_alone(tmp_path: Path, root: Path) -> None:
    contents = (tmp_path / "served").read_bytes()
    stream(tmp_path / "dump", contents[:500_000])
    inner = root / (tmp_path / "served").relative_to("/")
    inner.unlink()
    assert Queues().find(tmp_path / "dump", [os.getpid()], root, anywhere=True) == []
    inner.write_bytes(contents)
    assert Queues().find(tmp_path / "dump", [os.getpid()], root, anywhere=True) == []
