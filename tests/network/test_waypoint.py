"""A waypoint carries what it is given, both ways, and is gone when nobody needs it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from haulier.lab import namespaces
from haulier.network.waypoint import MOST, Waypoint
from tests.support.labs import lab
from tests.support.waiting import wait_for

HOST = "127.0.0.1"


@contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serves each connection in a thread; its port."""
    with socket.create_server((HOST, 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    came, _ = listener.accept()
                except OSError:
                    return
                threads.append(threading.Thread(target=run, args=(came,), daemon=True))
                threads[-1].start()

        def run(came: socket.socket) -> None:
            with came:
                serve(came)

        threads = [threading.Thread(target=accept, daemon=True)]
        threads[0].start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(10)


def backwards(came: socket.socket) -> None:
    """Hears all, then says it backwards."""
    with came.makefile("rb") as file:
        came.sendall(file.read()[::-1])


def until_the_end(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()


def test_it_carries_both_ways_and_passes_on_the_ends() -> None:
    data = os.urandom(5_000_000)
    with server(backwards) as port, closing(Waypoint([HOST], [HOST], port)) as waypoint:
        with socket.create_connection((HOST, waypoint.port), 10) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert until_the_end(sock) == data[::-1]
        assert waypoint.carried == 2 * len(data)
        assert waypoint.open
    assert not waypoint.open


def test_both_sides_hear_it_when_it_is_closed() -> None:
    heard: list[bytes] = []
    with server(lambda came: heard.append(until_the_end(came))) as port:
        waypoint = Waypoint([HOST], [HOST], port)
        with socket.create_connection((HOST, waypoint.port), 10) as sock:
            sock.sendall(b"so far")
            wait_for(lambda: waypoint.carried == 6, 10)
            waypoint.close()
            assert sock.recv(1) == b""
            wait_for(lambda: heard == [b"so far"], 10)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, waypoint.port), 10)


def test_one_that_leads_nowhere_hangs_up_and_one_that_nobody_uses_ends() -> None:
    with socket.create_server((HOST, 0)) as listener:
        nowhere = int(listener.getsockname()[1])
    waypoint = Waypoint([HOST], [HOST], nowhere, idle_s=0.5)
    with socket.create_connection((HOST, waypoint.port), 10) as sock:
        assert sock.recv(1) == b""
    wait_for(lambda: not waypoint.open, 20, "its end")
    waypoint.close()


def test_the_first_address_that_answers_is_taken() -> None:
    with server(backwards) as port, closing(Waypoint([HOST], ["127.0.0.9", HOST], port)) as waypoint:
        with socket.create_connection((HOST, waypoint.port), 10) as sock:
            sock.sendall(b"ab")
            sock.shutdown(socket.SHUT_WR)
            assert until_the_end(sock) == b"ba"


def test_of_too_many_connections_the_oldest_is_hung_up_on() -> None:
    with server(lambda came: came.sendall(until_the_end(came))) as port:
        with closing(Waypoint([HOST], [HOST], port)) as waypoint:
            kept = []
            for _ in range(MOST + 1):
                kept.append(socket.create_connection((HOST, waypoint.port), 10))
                before = waypoint.carried
                kept[-1].sendall(b"x")
                wait_for(lambda before=before: waypoint.carried > before, 10)
            assert until_the_end(kept[0]) == b""
            for sock in kept[1:]:
                sock.shutdown(socket.SHUT_WR)
                assert until_the_end(sock) == b"x"
            for sock in kept:
                sock.close()


CHAIN = 'name = "way"\n[[site]]\nname = "a"\n[[site]]\nname = "b"\n[[site]]\nname = "c"\n' + "".join(
    f'[[link]]\na = "{a}"\nb = "{b}"\n' for a, b in ("ab", "bc")
)


@pytest.mark.root
@pytest.mark.parametrize("dead", ["a", "c"])
def test_an_end_whose_last_word_was_lost_is_noticed(dead: str) -> None:
    with lab(CHAIN) as made:
        listener = namespaces.call(made.namespace("c"), lambda: socket.create_server(("0.0.0.0", 0)))
        there, port = [made.address("c", made.links_between("b", "c")[0])], listener.getsockname()[1]
        waypoint = namespaces.call(
            made.namespace("b"), lambda: Waypoint(["0.0.0.0"], there, port, idle_s=0.5, dead_s=2.0)
        )
        with listener, closing(waypoint):
            link = made.links_between("a", "b")[0]
            by = (made.address("b", link), waypoint.port)
            sock = namespaces.call(made.namespace("a"), lambda: socket.create_connection(by, 10))
            came = listener.accept()[0]
            came.settimeout(20)
            with sock, came:
                sock.sendall(b"x")
                assert came.recv(1) == b"x"
                # From here on nobody says anything but the end, and that is lost.
                made.link(made.links_between(dead, "b")[0]).set(up=False)
                dying, other = (sock, came) if dead == "a" else (came, sock)
                dying.close()
                assert until_the_end(other) == b""
            wait_for(lambda: not waypoint.open, 20, "nobody uses it")
