"""The synchronous face of QMP, against a server of our own."""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.errors import GuestError
from haulier.guests.qmp import KEEP_EVENTS, Qmp
from tests.support.waiting import wait_for

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}
Answer = Callable[["Server", dict[str, Any]], None]


class Server:
    """Speaks just enough QMP for one client; `answer` decides what each command gets."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.path = path
        self.fds: list[int] = []
        self.seen: list[str] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        assert self._client is not None
        self._client.sendall(json.dumps(message).encode() + b"\n")

    def event(self, name: str, **data: Any) -> None:
        self.send({"event": name, "data": data, "timestamp": {"seconds": 100, "microseconds": 500000}})

    def reply(self, request: dict[str, Any], value: Any) -> None:
        # The client negotiates without an id.
        self.send({"return": value} | {k: request[k] for k in ("id",) if k in request})

    def hang_up(self) -> None:
        assert self._client is not None
        self._client.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        self._listener.settimeout(20)
        try:
            self._client, _ = self._listener.accept()
        except OSError:
            return
        self.send(GREETING)
        buffer = ""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._client, 65536, 4)
            except OSError:
                return
            self.fds += fds
            if not data:
                return
            buffer += data.decode()
            # Like QEMU: requests end where their JSON ends, a line or not. (The blank is what carries a descriptor.)
            while buffer := buffer.lstrip():
                request, end = json.JSONDecoder().raw_decode(buffer)
                buffer = buffer[end:]
                self.seen.append(request["execute"])
                if request["execute"] == "qmp_capabilities":
                    self.reply(request, {})
                else:
                    self._answer(self, request)

    def close(self) -> None:
        self._listener.close()
        if self._client is not None:
            try:
                self.hang_up()
            except OSError:
                pass
        self._thread.join(10)
        if self._client is not None:
            self._client.close()
        for fd in self.fds:
            os.close(fd)


def echo(server: Server, request: dict[str, Any]) -> None:
    command = request["execute"]
    if command == "fail":
        server.send({"error": {"class": "GenericError", "desc": "no such luck"}, "id": request["id"]})
    elif command == "shout":
        server.event("SHOUT", **request.get("arguments", {}))
        server.reply(request, {})
    elif command == "leave":
        server.hang_up()
    elif command != "silence":
        server.reply(request, request.get("arguments", {}))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "qmp.sock", echo)
    yield made
    made.close()


def test_commands(server: Server) -> None:
    with Qmp(server.path) as qmp:
        assert qmp.execute("echo", {"a": 1}) == {"a": 1}
        with pytest.raises(GuestError, match=r"refused fail: no such luck"):
            qmp.execute("fail")
        assert qmp.execute("echo", {"b": 2}) == {"b": 2}


def test_a_late_answer_is_not_taken_for_the_next_one(server: Server) -> None:
    with Qmp(server.path) as qmp:
        with pytest.raises(GuestError, match=r"did not answer silence within 0\.1 s"):
            qmp.execute("silence", timeout=0.1)
        server.send({"return": {"late": True}, "id": "__qmp#00000"})
        assert qmp.execute("echo", {"a": 1}) == {"a": 1}


def test_events_since_a_mark(server: Server) -> None:
    with Qmp(server.path) as qmp:
        qmp.execute("shout", {"n": 1})
        first = qmp.wait_event("SHOUT", since=0)
        assert (first.name, first.data, first.at) == ("SHOUT", {"n": 1}, 100.5)
        mark = qmp.mark()
        with pytest.raises(GuestError, match=r"did not send SHOUT within 0\.05 s \(last: SHOUT\)"):
            qmp.wait_event("SHOUT", timeout=0.05, since=mark)
        qmp.execute("shout", {"n": 2})
        qmp.execute("shout", {"n": 3})
        assert qmp.wait_event(lambda e: e.data["n"] > 1, since=mark).data == {"n": 2}
        assert qmp.wait_event(lambda e: e.data["n"] > 2, since=mark).data == {"n": 3}
        assert [e.data["n"] for e in qmp.events(mark)] == [2, 3]
        assert [e.data["n"] for e in qmp.events()] == [1, 2, 3]


def test_old_events_are_dropped_and_marks_stay_right(server: Server) -> None:
    with Qmp(server.path) as qmp:
        qmp.execute("echo")
        for n in range(KEEP_EVENTS + 10):
            server.event("TICK", n=n)
        wait_for(lambda: qmp.mark() == KEEP_EVENTS + 10, what="all events")
        assert len(qmp.events()) == KEEP_EVENTS
        assert [e.data["n"] for e in qmp.events(KEEP_EVENTS + 8)] == [KEEP_EVENTS + 8, KEEP_EVENTS + 9]


def test_a_waiting_thread_is_woken(server: Server) -> None:
    with Qmp(server.path) as qmp:
        got: list[Any] = []
        mark = qmp.mark()
        waiter = threading.Thread(target=lambda: got.append(qmp.wait_event("SHOUT", timeout=20, since=mark)))
        waiter.start()
        qmp.execute("shout", {"n": 7})
        waiter.join(20)
        assert got[0].data == {"n": 7}


def test_file_descriptors_travel(server: Server) -> None:
    read, write = os.pipe()
    try:
        with Qmp(server.path) as qmp:
            assert qmp.execute_fd("getfd", {"fdname": "x"}, write) == {"fdname": "x"}
            os.write(server.fds[0], b"hello")
            assert os.read(read, 5) == b"hello"
            os.write(write, b"still open here")
    finally:
        os.close(read)
        os.close(write)


def test_a_lost_qemu_is_noticed_by_commands_and_waiters(server: Server) -> None:
    qmp = Qmp(server.path)
    with pytest.raises(GuestError, match="went away during leave"):
        qmp.execute("leave")
    wait_for(lambda: qmp.gone, what="the loss")
    with pytest.raises(GuestError, match="closed the connection before SHOUT came"):
        qmp.wait_event("SHOUT", timeout=20)
    with pytest.raises(GuestError):
        qmp.execute("echo")
    qmp.close()
    qmp.close()


def test_a_forgotten_connection_makes_room_for_the_next(server: Server) -> None:
    """A QMP socket serves one client at a time."""
    qmp = Qmp(server.path)
    connection = qmp._connection
    del qmp
    gc.collect()
    wait_for(lambda: connection.gone, what="the end of the forgotten connection")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="went away during connect"):
        Qmp(tmp_path / "none.sock")


def test_many_threads_on_one_connection(server: Server) -> None:
    with Qmp(server.path) as qmp:
        answers: dict[int, Any] = {}

        def ask(n: int) -> None:
            answers[n] = qmp.execute("echo", {"n": n})

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert answers == {n: {"n": n} for n in range(20)}
