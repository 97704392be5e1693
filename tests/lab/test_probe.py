"""The probe: what it calls wrong, what its figures mean, and the whole of it against a real server."""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from haulier.errors import UsageError
from haulier.lab.probe import Asked, Verifier, first_after, read, summarize
from haulier.lab.workload import Server, Workload, listen
from tests.support.waiting import wait_for


def answer(n: int, counter: int, guest: str = "web1") -> bytes:
    digest = hashlib.sha256(str(n).encode()).hexdigest()
    return json.dumps({"sha256": digest, "guest": guest, "counter": counter}).encode()


def test_a_right_answer_is_right() -> None:
    verifier = Verifier()
    assert verifier.judge(5, 0, answer(5, 1)) == ""
    assert verifier.judge(6, verifier.counter, answer(6, 2)) == ""
    # Two questions in flight at once may be answered in either order.
    assert verifier.judge(8, 2, answer(8, 4)) == "" and verifier.judge(7, 2, answer(7, 3)) == ""
    assert verifier.counter == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (answer(6, 11), "wrong hash"),
        (answer(5, 10), "went back"),
        (answer(5, 3), "went back"),
        (answer(5, 11, "web2"), "web2 answered in place of web1"),
        (b"gibberish", "not an answer"),
        (b"[]", "not an answer"),
        (b'{"sha256": 1}', "not an answer"),
        (json.dumps({**json.loads(answer(5, 1)), "counter": "x"}).encode(), "went back"),
    ],
)
def test_a_wrong_answer_is_found_out(line: bytes, said: str) -> None:
    verifier = Verifier()
    assert verifier.judge(1, 0, answer(1, 10)) == ""
    assert said in verifier.judge(5, verifier.counter, line)


def test_figures() -> None:
    asked = [
        Asked("fresh", 1.0, answered=1.01),
        Asked("kept", 1.5, answered=4.2),
        Asked("fresh", 2.0, failed="no answer in time"),
        Asked("fresh", 4.0, answered=4.1),
        Asked("fresh", 4.3, answered=4.4, wrong="wrong hash of 5"),
        Asked("kept", 4.3, failed="reset"),
    ]
    found = summarize(asked)
    assert (found.answers, found.wrong, found.failed, found.kept_lost) == (4, 1, 2, 1)
    assert found.longest_gap_ms == 3090.0 and found.gap_began == 1.01 and found.first_wrong == ["wrong hash of 5"]
    assert summarize([]).longest_gap_ms == 0.0


def test_first_answer_after_a_moment_counts_only_questions_from_after_it() -> None:
    asked = [
        # Asked before the stop: the guest may have answered before it stopped.
        Asked("fresh", 1.0, answered=2.1),
        Asked("fresh", 2.2, failed="no answer in time"),
        Asked("fresh", 2.3, answered=2.35, wrong="wrong hash"),
        Asked("kept", 2.4, answered=2.9),
        Asked("fresh", 2.5, answered=2.8),
    ]
    assert first_after(asked, 2.0) == 2.8
    assert first_after(asked, 2.45) == 2.8
    assert first_after(asked, 2.6) is None


def test_lines_are_read_back_but_for_one_that_is_not_whole_yet(tmp_path: Path) -> None:
    asked = [Asked("fresh", 1.25, answered=2.5), Asked("kept", 3.0, failed="reset"), Asked("kept", 4.0, 5.0, "bad")]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(one.line() for one in asked) + '{"kind": "fre')
    assert list(read(file)) == asked
    for nonsense in ("{}\n", "[]\n", "x\n", '{"kind": "fresh", "asked": 1, "more": 2}\n'):
        with pytest.raises(UsageError):
            Asked.parse(nonsense)


@contextmanager
def serving(tmp_path: Path, port: int = 0) -> Iterator[tuple[int, Workload]]:
    listener = listen("127.0.0.1", port)
    workload = Workload(tmp_path / "files")
    server = Server(workload, listener)
    thread = threading.Thread(target=server.run)
    number = int(listener.getsockname()[1])
    thread.start()
    try:
        yield number, workload
    finally:
        server.stop()
        thread.join(10)


@contextmanager
def probing(port: int, file: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "haulier.lab.probe", f"127.0.0.1:{port}", "--out", str(file), "--interval", "0.01"]
    file.touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def count(file: Path, kind: str, field: str) -> int:
    return sum(1 for one in read(file) if one.kind == kind and getattr(one, field))


def stop(process: subprocess.Popen[str]) -> dict[str, Any]:
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    return dict(json.loads(out))


def test_asks_on_fresh_and_kept_connections_and_finds_nothing_wrong(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with serving(tmp_path) as (port, _), probing(port, file) as process:
        wait_for(lambda: count(file, "fresh", "answered") > 10 and count(file, "kept", "answered") > 10)
        found = stop(process)
    assert found["answers"] > 20 and found["wrong"] == found["failed"] == found["kept_lost"] == 0


def test_sees_a_server_go_and_come_back_with_an_older_state(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with serving(tmp_path) as (port, workload):
        workload.answers = 1_000_000
        stack = probing(port, file)
        process = stack.__enter__()
        wait_for(lambda: count(file, "fresh", "answered") > 3 and count(file, "kept", "answered") > 3)
    try:
        wait_for(lambda: count(file, "fresh", "failed") > 3 and count(file, "kept", "failed") > 0)
        with serving(tmp_path, port):
            wait_for(lambda: count(file, "fresh", "wrong") > 3 and count(file, "kept", "wrong") > 3)
            found = stop(process)
    finally:
        stack.__exit__(None, None, None)
    assert found["wrong"] > 6 and found["kept_lost"] == 1 and "counter went back" in found["first_wrong"][0]


def test_many_questions_may_be_under_way_at_a_guest_that_does_not_answer(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as silent, probing(silent.getsockname()[1], file) as process:
        connections = [silent.accept()[0] for _ in range(20)]
        found = stop(process)
        for one in connections:
            one.close()
    assert found["answers"] == 0 and found["wrong"] == 0
