"""Connections of other processes are found, and asked to speak to their peers without any harm to them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from haulier.containers.sockets import borrowed, probe, talking

pytestmark = pytest.mark.root
ECHO = (
    "import socket,sys\n"
    "s=socket.create_server(('127.0.0.1',0));print(s.getsockname()[1],flush=True)\n"
    "c=s.accept()[0];c.setsockopt(1,2,1)\n"
    "u=socket.socket(socket.AF_UNIX);d=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
    "print('there',flush=True)\n"
    "while data:=c.recv(100): c.sendall(data)\n"
)


@pytest.fixture
def echo() -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    with subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=10) as client:
            assert process.stdout.readline() == "there\n"
            yield process, client
        process.wait(10)


def test_established_connections_are_found(echo: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, client = echo
    ((pid, number),) = talking([process.pid])
    assert pid == process.pid
    with borrowed(pid, number) as sock:
        assert sock.getpeername() == client.getsockname()
    assert talking([]) == []


def test_a_probe_changes_nothing_for_either_side(echo: tuple[subprocess.Popen[str], socket.socket]) -> None:
    process, client = echo
    for number in range(3):
        assert probe([process.pid]) == 1
        client.sendall(b"hello %d" % number)
        assert client.recv(100) == b"hello %d" % number
    with borrowed(*talking([process.pid])[0]) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
