"""The guest's workload, in this process, over real sockets."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from haulier.lab.workload import (
    FILE_SLOTS,
    MAX_CLIENTS,
    MAX_LINE,
    PAGE,
    Content,
    Files,
    Server,
    Task,
    WorkingSet,
    Workload,
    listen,
)
from tests.support.waiting import wait_for


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def done(task: dict[str, Any] | Task) -> dict[str, Any]:
    """What a task returns in the end."""
    if isinstance(task, dict):
        return task
    while True:
        try:
            next(task)
        except StopIteration as end:
            return dict(end.value)


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A server on a port of its own."""
    listener = listen("127.0.0.1", 0)
    server = Server(Workload(tmp_path / "files"), listener)
    thread = threading.Thread(target=server.run)
    number = int(listener.getsockname()[1])
    thread.start()
    yield number
    server.stop()
    thread.join(10)
    assert not thread.is_alive()


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as sock:
        yield sock


def request(port: int, **words: Any) -> dict[str, Any]:
    with connected(port) as sock:
        return exchange(sock, json.dumps(words).encode() + b"\n")


def exchange(sock: socket.socket, line: bytes) -> dict[str, Any]:
    sock.sendall(line)
    with sock.makefile("rb") as file:
        return dict(json.loads(file.readline()))


def test_answers_with_the_hash_and_a_counter_that_grows(port: int) -> None:
    with connected(port) as sock:
        first = exchange(sock, b'{"cmd": "ask", "n": 7}\n')
        second = exchange(sock, b'{"cmd": "ask", "n": -12345678901234567}\n')
    assert first["ok"] and first["guest"] == os.uname().nodename
    assert first["sha256"] == hashlib.sha256(b"7").hexdigest()
    assert second["sha256"] == hashlib.sha256(b"-12345678901234567").hexdigest()
    assert second["counter"] == first["counter"] + 1


def test_fills_changes_and_checks_its_memory_and_files(port: int) -> None:
    started = request(port, cmd="start", memory_mib=2, pages_per_s=500, hot_pages=20, files_per_s=20, file_kib=8)
    assert started["ok"] and started["pages"] == 512
    stats = wait_for(lambda: (s := request(port, cmd="stats"))["rewritten"] > 20 and s["files_written"] > 2 and s)
    assert stats["running"] and stats["version"] == 512 + stats["rewritten"]
    found = request(port, cmd="check")
    assert found["good"] and found["pages"] == 512 and found["files"] >= 2
    stopped = request(port, cmd="stop")
    again = request(port, cmd="stats")
    assert not again["running"] and again["rewritten"] == stopped["rewritten"]
    assert request(port, cmd="check")["good"]


def test_answers_while_a_long_check_is_under_way(port: int) -> None:
    assert request(port, cmd="start", memory_mib=64, pages_per_s=0, files_per_s=0)["ok"]
    with connected(port) as slow, connected(port) as quick:
        slow.sendall(b'{"cmd": "check"}\n{"cmd": "ask", "n": 1}\n')
        asked = exchange(quick, b'{"cmd": "ask", "n": 2}\n')
        with slow.makefile("rb") as file:
            checked, after = json.loads(file.readline()), json.loads(file.readline())
    # The slow client's own second request waits its turn; the other client's does not.
    assert checked["good"] and after["counter"] > asked["counter"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nonsense\n", "Expecting value"),
        (b"[1]\n", "a JSON object"),
        (b"\x80\n", "decode"),
        (b'{"cmd": "dance"}\n', "unknown command"),
        (b'{"cmd": "ask"}\n', "whole number"),
        (b'{"cmd": "ask", "n": 1e3}\n', "whole number"),
        (b'{"cmd": "start", "memory_mib": -1}\n', "memory_mib"),
        (b'{"cmd": "start", "memory_mib": true}\n', "memory_mib"),
        (b'{"cmd": "start", "random_share": "half"}\n', "random_share"),
        (b'{"cmd": "start", "memory_mib": 1000000}\n', "do not fit"),
        (b"[" * 50000 + b"\n", ""),
    ],
)
def test_says_what_is_wrong_with_a_request_and_goes_on(port: int, line: bytes, said: str) -> None:
    with connected(port) as sock:
        answer = exchange(sock, line)
        assert not answer["ok"] and said in answer["error"]
        assert exchange(sock, b'{"cmd": "ask", "n": 1}\n')["ok"]


def test_a_client_that_sends_no_line_end_is_dropped(port: int) -> None:
    with connected(port) as sock:
        try:
            sock.sendall(b"x" * 4 * MAX_LINE)
            assert sock.recv(100) == b""
        except ConnectionError:
            pass
    assert request(port, cmd="ask", n=1)["ok"]


def test_connections_that_nobody_uses_make_room(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(MAX_CLIENTS + 5)]
    try:
        assert exchange(idle[-1], b'{"cmd": "ask", "n": 1}\n')["ok"]
        assert request(port, cmd="ask", n=1)["ok"]
    finally:
        for sock in idle:
            sock.close()


def working_set(pages: int = 64) -> WorkingSet:
    found = WorkingSet(pages, Content(3, 0.25), seed=3, hot_pages=8)
    assert done(found.fill()) == {"pages": pages}
    return found


def test_finds_a_flipped_bit_and_a_swapped_page() -> None:
    memory = working_set()
    raw = memory._memory
    raw[5 * PAGE + 1000] ^= 1
    raw[9 * PAGE : 10 * PAGE], raw[10 * PAGE : 11 * PAGE] = raw[10 * PAGE : 11 * PAGE], raw[9 * PAGE : 10 * PAGE]
    found = done(memory.check())
    assert found["bad_pages"] == 3 and found["first_bad_pages"] == [5, 9, 10]
    memory.close()


def test_finds_a_page_that_fell_back_to_an_older_state() -> None:
    memory = working_set(1)
    before = memory._memory[:]
    memory.rewrite()
    assert memory._memory[:] != before and done(memory.check())["bad_pages"] == 0
    memory._memory[:] = before
    assert done(memory.check())["bad_pages"] == 1
    memory.close()


def test_most_rewrites_hit_the_hot_pages() -> None:
    memory = working_set(200)
    for _ in range(1000):
        memory.rewrite()
    hot = sum(1 for version in memory._versions[:8] if version > 200)
    cold = sum(1 for version in memory._versions[8:] if version > 200)
    assert hot == 8 and 20 < cold < 150
    assert done(memory.check())["bad_pages"] == 0
    memory.close()


def test_content_is_the_same_for_the_same_seed_and_a_share_of_it_is_random() -> None:
    one, two, other = Content(1, 0.25), Content(1, 0.25), Content(2, 0.25)
    pages = [one.page() for _ in range(400)]
    assert pages == [two.page() for _ in range(400)] and pages[0] != other.page()
    records = sum(1 for page in pages if b'"state"' in page)
    assert 250 < records < 350 and len(set(pages)) == 400


def test_files_rotate_and_a_bad_one_is_found(tmp_path: Path) -> None:
    files = Files(tmp_path, Content(1, 0.25), kib=8)
    for _ in range(FILE_SLOTS + 3):
        done(files.write())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == FILE_SLOTS
    assert done(files.check()) == {"files": FILE_SLOTS, "bad_files": 0, "first_bad_files": []}
    # The name says what the content should be, so that an outsider can check it too.
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == name[4:-4] for name in names)
    victim, missing = tmp_path / names[3], tmp_path / names[4]
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    missing.unlink()
    assert done(files.check())["first_bad_files"] in ([victim.name, missing.name], [missing.name, victim.name])


def test_a_file_that_is_replaced_while_it_is_checked_is_not_called_bad(tmp_path: Path) -> None:
    files = Files(tmp_path, Content(1, 0.25), kib=32)
    for _ in range(FILE_SLOTS):
        done(files.write())
    check = files.check()
    next(check)
    done(files.write())
    assert done(check)["bad_files"] == 0


def test_work_keeps_to_its_rate_and_a_long_pause_is_not_made_up_for(tmp_path: Path) -> None:
    clock = Clock()
    workload = Workload(tmp_path, clock)
    assert workload.pause() is None
    start = {"cmd": "start", "memory_mib": 1, "pages_per_s": 100, "hot_pages": 10, "files_per_s": 0.5, "file_kib": 4}
    done(workload.handle(start))
    assert workload.pause() is not None
    for _ in range(40):
        clock.now += 0.1
        workload.work()
    stats = done(workload.handle({"cmd": "stats"}))
    assert 395 <= stats["rewritten"] <= 400 and stats["files_written"] in {1, 2}
    clock.now += 3600
    for _ in range(5):
        workload.work()
    assert done(workload.handle({"cmd": "stats"}))["rewritten"] <= stats["rewritten"] + 101


def test_pages_that_outrun_the_cpu_leave_a_file_its_time(tmp_path: Path) -> None:
    clock = Clock()

    def slow() -> float:
        clock.now += 0.001
        return clock.now

    workload = Workload(tmp_path / "files", slow)
    done(workload.handle({"cmd": "start", "memory_mib": 1, "pages_per_s": 1e6, "files_per_s": 1, "file_kib": 64}))
    for _ in range(1000):
        workload.work()
    stats = workload.handle({"cmd": "stats"})
    assert isinstance(stats, dict) and stats["files_written"] >= 5 and stats["rewritten"] > 1000


def test_a_start_in_the_middle_of_another_wins(tmp_path: Path) -> None:
    workload = Workload(tmp_path)
    first = workload.handle({"cmd": "start", "memory_mib": 1})
    assert not isinstance(first, dict)
    next(first)
    second = workload.handle({"cmd": "start", "memory_mib": 2})
    with pytest.raises(ValueError):
        done(first)
    assert done(second)["pages"] == 512 and done(workload.handle({"cmd": "check"}))["good"]
