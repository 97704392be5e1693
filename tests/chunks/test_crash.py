from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from haulier.chunks.store import ChunkStore
from haulier.units import CHUNK
from tests.chunks.samples import name
from tests.support.waiting import wait_for


@pytest.mark.parametrize("life", ["store", "cache"])
@pytest.mark.parametrize("death", ["kill", "power"])
def test_death_at_any_step_leaves_a_whole_store(tmp_path: Path, death: str, life: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chunks.crashing", str(tmp_path), death, life],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["steps"] > 60


class Member:
    """A process of the crowd; its lines are gathered by a thread."""

    def __init__(self, folder: Path, role: str, number: int) -> None:
        self.role = role
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chunks.crowd", str(folder), role, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.thread = threading.Thread(target=self._gather)
        self.thread.start()

    def _gather(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def end(self, kill: bool) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if kill:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait(60)
        self.thread.join(10)
        self.process.stdout.close()

    def saved(self) -> dict[str, list[int]]:
        """The last manifest of each name that it was told is durable."""
        found = {}
        for line in self.lines:
            if line.startswith("saved "):
                _, label, seeds = line.split()
                found[label] = [int(seed) for seed in seeds.split(",")]
        return found


def test_a_crowd_of_processes_some_killed_loses_nothing(tmp_path: Path) -> None:
    dice = random.Random(1)
    with ChunkStore(tmp_path / "s", pack_size=8 * CHUNK, reserve=0):
        pass
    for generation in range(3):
        roles = ["write", "write", "read", "collect" if generation == 1 else "evict"]
        crowd = [Member(tmp_path / "s", role, generation * 10 + n) for n, role in enumerate(roles)]
        try:
            wanted = dice.randrange(5, 40)
            wait_for(lambda wanted=wanted, crowd=crowd: all(len(member.lines) > wanted // 4 for member in crowd), 60)
            wait_for(lambda wanted=wanted, crowd=crowd: len(crowd[0].lines) > wanted, 60)
        finally:
            for member in crowd:
                member.end(kill=member.role != "read" and dice.random() < 0.7)
        assert [line for member in crowd for line in member.lines if line.startswith("wrong")] == []
        with ChunkStore(tmp_path / "s", pack_size=8 * CHUNK, reserve=0) as store:
            assert store.check().ok
            for member in crowd:
                for label, seeds in member.saved().items():
                    now = store.load_manifest(label)
                    if now.unique() != {name(seed) for seed in seeds}:
                        # Killed after the commit, before it could say so; that one is then whole.
                        assert member.process.returncode == -9
            store.gc()
            for label in store.manifest_names():
                for fp in store.load_manifest(label).unique():
                    store.get(fp)
