from __future__ import annotations

import os
import signal
import subprocess
import sys

from haulier.lab import processes, tun


def test_a_process_is_its_id_and_its_start() -> None:
    with subprocess.Popen(["sleep", "100"]) as sleeper:
        start = processes.started(sleeper.pid)
        assert start is not None
        assert processes.alive(sleeper.pid, start)
        assert not processes.alive(sleeper.pid, start + 1)
        # A reused id is not ours.
        assert processes.end([(sleeper.pid, start + 1)], 0.1) == []
        assert sleeper.poll() is None
        assert processes.end([(sleeper.pid, start)], 10) == []
        # Not waited for yet: a zombie counts as gone.
        assert processes.started(sleeper.pid) is None
        assert sleeper.wait(10) == -signal.SIGTERM
    assert processes.end([(sleeper.pid, start)], 0.1) == []


def test_names_with_brackets_and_spaces_do_not_confuse() -> None:
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b') R 1 (x', 0, 0, 0); print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as odd:
        assert odd.stdout is not None
        assert odd.stdout.readline() == b"ready\n"
        start = processes.started(odd.pid)
        assert start is not None
        mine = processes.started(os.getpid())
        assert mine is not None
        assert start >= mine
        odd.communicate(b"\n", timeout=10)


def test_ancestors_reach_the_first_process() -> None:
    found = processes.ancestors()
    assert {os.getpid(), os.getppid()} <= found


def test_relays_are_found_by_their_exact_words() -> None:
    words = ["haulier.lab.relay", "lab-x", "a-b", "instance"]
    code = "print('ready', flush=True); input()"
    argv = [sys.executable, "-c", code, *words]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as relay:
        assert relay.stdout is not None
        assert relay.stdout.readline() == b"ready\n"
        assert [pid for pid, _ in tun.find("lab-x")] == [relay.pid]
        assert [pid for pid, _ in tun.find("lab-x", "instance")] == [relay.pid]
        assert tun.find("lab-x", "other") == []
        assert tun.find("lab") == []
        relay.communicate(b"\n", timeout=10)
    assert tun.find("lab-x") == []
