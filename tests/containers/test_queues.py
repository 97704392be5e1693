"""Stretches of connections' queues are found in the files that processes have open."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.containers import sockets
from haulier.containers.checkpoint import digest_of
from haulier.containers.queues import LEAST, Queues
from tests.support.waiting import wait_for


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
    with (tmp_path / "served").open("r+b") as file:
        for beside in (1_000_000, 1_800_003):  # by chance they would go on as the queue does
            os.pwrite(file.fileno(), b"\0", beside)
    contents = (tmp_path / "served").read_bytes()
    wanted = contents[1_000_001:1_800_003]
    stream(tmp_path / "dump", b"HTTP/1.1 200 OK\r\n\r\n" + wanted + b"and more of its own")
    queues = Queues()
    (found,) = queues.find(tmp_path / "dump", [os.getpid()], root, anywhere=True)
    assert found.name == "tcp-stream-1f.img" and b"/" + found.path == os.fsencode(tmp_path / "served")
    assert (found.at, found.offset, found.length) == (19, 1_000_001, len(wanted))
    assert found.digest == digest_of(wanted)
    # The next dump is a little further on.
    stream(tmp_path / "dump", contents[1_500_000:2_000_000])
    (found,) = queues.find(tmp_path / "dump", [os.getpid()], root)
    assert (found.at, found.offset, found.length) == (0, 1_500_000, 500_000)


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


@pytest.fixture
def looks_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in files of which there is much more than is looked through while a container stands."""
    monkeypatch.setattr("haulier.containers.queues._MOST_EACH", 4)
    monkeypatch.setattr("haulier.containers.queues._BEFORE", 100_000)
    monkeypatch.setattr("haulier.containers.queues._BEHIND", 100_000)


class Connection:
    """A real connection whose peer has taken so many bytes of it."""

    def __init__(self, taken: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.peer = socket.create_connection(listener.getsockname())
            self.mine, _ = listener.accept()
        left = taken
        while left:
            left -= (sent := self.mine.send(b"h" * min(left, 65536)))
            while sent:
                sent -= len(self.peer.recv(sent))
        wait_for(lambda: sockets.acknowledged([os.getpid()]).get(self.inode, 0) >= taken, 10, "the last ack")

    @property
    def inode(self) -> int:
        return os.fstat(self.mine.fileno()).st_ino

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.mine.close()
        self.peer.close()


def test_what_a_peer_has_acknowledged_is_known_by_the_sockets_inode() -> None:
    with Connection(70_001) as one:
        # The SYN counts with some kernels.
        assert sockets.acknowledged([os.getpid()])[one.inode] - 70_001 in (0, 1)


@pytest.mark.usefixtures("looks_little")
def test_a_connection_of_which_nothing_is_known_is_looked_for_where_it_must_be(tmp_path: Path, root: Path) -> None:
    """It began after the dump before, and the file is too large to be looked through while the container stands."""
    contents = (tmp_path / "served").read_bytes()
    with Connection(2_500_000) as one:
        path = stream(tmp_path / "dump", contents[2_499_700:2_599_700])
        assert Queues().find(tmp_path / "dump", [os.getpid()], root) == []
        path.rename(path.with_name(f"tcp-stream-{one.inode:x}.img"))
        (found,) = Queues().find(tmp_path / "dump", [os.getpid()], root)
        assert (found.at, found.offset, found.length) == (0, 2_499_700, 100_000)


@pytest.mark.usefixtures("looks_little")
def test_a_connection_goes_on_in_its_file_from_where_it_was(tmp_path: Path, root: Path) -> None:
    """It was restored here, or has fetched other files before: its bytes are not those of the file from its start."""
    contents = (tmp_path / "served").read_bytes()
    with Connection(500_000) as one:
        path = stream(tmp_path / "dump", contents[2_000_000:2_100_000]).rename(
            tmp_path / "dump" / f"tcp-stream-{one.inode:x}.img"
        )
        queues = Queues()
        assert [found.offset for found in queues.find(path.parent, [os.getpid()], root, anywhere=True)] == [2_000_000]
        path.write_bytes(contents[2_050_000:2_150_000])
        assert [found.offset for found in queues.find(path.parent, [os.getpid()], root)] == [2_050_000]
        assert Queues().find(path.parent, [os.getpid()], root) == []
