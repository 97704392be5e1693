"""An overlay becomes a layer: its file read by qemu-img, compared with what QEMU's tools wrote; its guest frozen."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, GuestError, UnknownThing
from haulier.guests.agent import GuestAgent
from haulier.guests.command import block_devices
from haulier.guests.qemu import GuestPaths, create_overlay
from haulier.images import commit, layers
from haulier.units import CHUNK, MIB
from tests.support.waiting import wait_for

pytestmark = pytest.mark.qemu


def overlay(path: Path, *commands: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"], check=True)
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, str(path)], check=True, capture_output=True)
    return path


def written(tmp_path: Path, base: bytes, *commands: str) -> tuple[Path, bytes]:
    """An overlay as guests have it, over the disk `base`, after these commands; and the whole disk as QEMU sees it."""
    file, below, whole = GuestPaths(tmp_path).overlay, tmp_path / "base.raw", tmp_path / "whole.raw"
    below.write_bytes(base)
    create_overlay(file, len(base))
    lies_on = {"driver": "raw", "file": {"driver": "file", "filename": str(below)}}
    nodes = block_devices(GuestPaths(tmp_path))
    disk = "json:" + json.dumps(nodes[1] | {"backing": lies_on})
    for command in commands:
        subprocess.run(["qemu-io", "-d", "unmap", "-c", command, disk], check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, str(whole)], check=True)
    return file, whole.read_bytes()


def manifest_of(store: ChunkStore, disk: bytes) -> Manifest:
    fps = [store.put(disk[at : at + CHUNK].ljust(CHUNK, b"\0")) for at in range(0, len(disk), CHUNK)]
    return Manifest(len(disk), b"".join(fps))


def test_what_lies_around_a_small_write_stays_in_the_layer(tmp_path: Path) -> None:
    base = random.Random(1).randbytes(2 * MIB + 3 * 2048)
    file, whole = written(
        tmp_path,
        base,
        "write -P 7 68k 4k",
        "write -P 8 190k 6k",
        "write -P 9 300000 512",
        "write -z 400k 8k",
        "write -z -u 512k 64k",
        "write -z 710k 100k",
        "discard 896k 128k",
        "write -P 1 1280k 64k",
        "discard 1284k 8k",
        "write -P 0 1412k 4k",
        "write -P 6 1600k 90k",
        f"write -P 5 {2 * MIB + 2048} 4k",
    )
    assert whole[68 * 1024 : 72 * 1024] == b"\x07" * 4096 and whole[72 * 1024 : 128 * 1024] == base[72 * 1024 :][:57344]
    with ChunkStore(tmp_path / "store") as store:
        below = manifest_of(store, base)
        store.save_manifest("image/debian", below)
        found = commit.read_stopped(file, below, store, lambda share, what: None)
        layer = commit.save_layer(store, "web", "debian", below, found)
        assert b"".join(store.get(fp) for fp in layer)[: len(whole)] == whole
        assert layer == manifest_of(store, whole) and 0 not in found.changes


def test_a_layer_needs_what_lies_around_a_small_write(tmp_path: Path) -> None:
    base = random.Random(2).randbytes(2 * CHUNK)
    file, _ = written(tmp_path, base, f"write -P 7 0 {CHUNK}", f"write -P 8 {CHUNK} 4k")
    with ChunkStore(tmp_path / "store") as store:
        below = Manifest(len(base), b"".join(fingerprint(base[at : at + CHUNK]) for at in (0, CHUNK)))
        with pytest.raises(UnknownThing):
            commit.read_stopped(file, below, store, lambda share, what: None)


def test_a_stopped_guests_overlay_is_read_cluster_by_cluster(tmp_path: Path) -> None:
    file = overlay(
        tmp_path / "o.qcow2",
        "write -P 7 1M 128k",
        "write -P 8 5M 4k",
        "write -z 3M 64k",
        "write -P 9 2M 64k",
        "discard 2M 64k",
    )
    said: list[float] = []
    with ChunkStore(tmp_path / "store") as store:
        below = Manifest(8 * MIB, b"".join([store.put(b"\x01" * CHUNK)] * (8 * MIB // CHUNK)))
        found = commit.read_stopped(file, below, store, lambda share, what: said.append(share))
        at = MIB // CHUNK
        assert found.quiesced and found.changes == {
            at: fingerprint(b"\x07" * CHUNK),
            at + 1: fingerprint(b"\x07" * CHUNK),
            5 * at: fingerprint(b"\x08" * 4096 + bytes(CHUNK - 4096)),
            3 * at: ZERO,
            2 * at: ZERO,
        }
        assert said == sorted(said) and said[-1] <= 1
        store.save_manifest("image/debian", below)
        commit.save_layer(store, "web", "debian", below, found, guest="g", uuid="u")
        facts = layers.facts(store, "web")
        assert (facts.parent, facts.guest, facts.quiesced, facts.own_bytes) == ("debian", "g", True, 2 * CHUNK)
        assert store.load_manifest("image/web")[0] == below[0]


def test_an_overlay_that_holds_nothing(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        file, below = overlay(tmp_path / "o.qcow2"), Manifest.zero(8 * MIB)
        assert commit.read_stopped(file, below, store, lambda share, what: None).changes == {}


def test_an_overlay_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "o.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    with ChunkStore(tmp_path / "store") as store, pytest.raises(Corrupt, match="haulier verify"):
        commit.read_stopped(tmp_path / "o.qcow2", Manifest.zero(8 * MIB), store, lambda share, what: None)


def test_a_layer_whose_chunks_are_not_there_is_not_made(tmp_path: Path) -> None:
    with ChunkStore(tmp_path / "store") as store:
        below = Manifest.zero(8 * MIB)
        lacking = commit.Overlay({0: fingerprint(b"x" * CHUNK)})
        with pytest.raises(UnknownThing):
            commit.save_layer(store, "web", "debian", below, lacking)
        assert store.manifest_names() == []


class SlowAgent:
    """A guest with an agent that does one thing after another while the guest runs, and answers who listens then.

    `until`: command -> when it is done with it. `refused`: commands that it refuses, each once.
    """

    def __init__(self, root: Path) -> None:
        self.paths = GuestPaths(root)
        self.spec = SimpleNamespace(name="web1")
        self.qmp = None
        self.frozen = self.paused = self.ran_on = False
        self.heard: list[str] = []
        self.done: list[str] = []
        self.until: dict[str, Callable[[], bool]] = {}
        self.refused: list[str] = []
        self._asked: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._client: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.paths.qga_sock))
        self._listener.listen(4)
        self._threads = [threading.Thread(target=each) for each in (self._hear, self._work)]
        for thread in self._threads:
            thread.start()

    def _hear(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, client.makefile("rb") as lines, contextlib.suppress(OSError):
                    self._client = client
                    for line in lines:
                        self.heard.append(json.loads(line.lstrip(b"\xff"))["execute"])
                        self._asked.put(json.loads(line.lstrip(b"\xff")))

    def _work(self) -> None:
        while (request := self._asked.get()) is not None:
            command = request["execute"]
            wait_for(self.until.get(command, lambda: True), 20)
            wait_for(lambda: not self.paused, 20)
            answer: dict[str, Any] = {"return": 2}
            if command == "guest-sync-delimited":
                answer = {"return": request["arguments"]["id"]}
            elif command in self.refused:
                self.refused.remove(command)
                answer = {"error": {"desc": "not now"}}
            elif command == "guest-fstrim":
                answer = {"return": {"paths": []}}
            else:
                self.frozen = command == "guest-fsfreeze-freeze"
            self.done.append(command)
            head = b"\xff" if command == "guest-sync-delimited" else b""
            with contextlib.suppress(OSError, AttributeError):
                self._client.sendall(head + json.dumps(answer).encode() + b"\n")  # type: ignore[union-attr]

    def end(self) -> None:
        self._asked.put(None)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)

    # What QEMU does.

    def guest_agent(self, timeout: float) -> GuestAgent:
        return GuestAgent(self.paths.qga_sock, name="web1", timeout=timeout)

    def status(self) -> str:
        return "paused" if self.paused else "running"

    def stop(self) -> None:
        self.paused = True

    def cont(self) -> None:
        self.paused, self.ran_on = False, True

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        """The handle, not the guest."""


class NoRounds:
    """Rounds over a disk that nobody writes to."""

    def __init__(self, *of: Any) -> None:
        pass

    @contextlib.contextmanager
    def begin(self) -> Iterator[Any]:
        yield SimpleNamespace(chunks=[], items=list)

    def next(self, hold_back: bool) -> Any:
        return self.begin()

    def abort(self) -> None:
        pass


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowAgent]:
    monkeypatch.setattr(commit, "DiskRounds", NoRounds)
    for name in ("TRIM_S", "FREEZE_S"):
        monkeypatch.setattr(commit, name, 0.2)
    guest = SlowAgent(tmp_path)
    try:
        yield guest
    finally:
        guest.end()


def read(guest: SlowAgent) -> commit.Overlay:
    with ChunkStore(guest.paths.root / "store") as store:
        return commit.read_running(guest, store, lambda share, what: None)  # type: ignore[arg-type]


def test_file_systems_that_were_frozen_are_thawed(slow: SlowAgent) -> None:
    found = read(slow)
    assert found.quiesced and not slow.frozen and not commit.still_mark(slow.paths.root).exists()
    assert [each for each in slow.heard if "freeze" in each] == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


def test_a_late_answer_to_the_trim_is_not_taken_for_that_to_the_freeze(slow: SlowAgent) -> None:
    slow.until["guest-fstrim"] = lambda: slow.heard[-1] != "guest-fstrim"
    found = read(slow)
    assert found.quiesced and not slow.frozen and not commit.still_mark(slow.paths.root).exists()


def test_a_freeze_that_nobody_waits_for_any_more_is_thawed(slow: SlowAgent) -> None:
    slow.until["guest-fsfreeze-freeze"] = lambda: slow.ran_on
    found = read(slow)
    assert not found.quiesced and not slow.paused
    wait_for(lambda: "guest-fsfreeze-freeze" in slow.done)
    assert not slow.frozen and not commit.still_mark(slow.paths.root).exists()


def test_a_thaw_that_fails_is_tried_again_now_and_later(slow: SlowAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = commit.still_mark(slow.paths.root)
    slow.refused = ["guest-fsfreeze-thaw"]
    assert read(slow).quiesced and not slow.frozen and not mark.exists()

    slow.refused = ["guest-fsfreeze-thaw"]
    monkeypatch.setattr(commit, "THAW_S", 0.0)
    with pytest.raises(GuestError, match="'web1' does not say that its file systems are thawed"):
        read(slow)
    assert slow.frozen and mark.exists()

    slow.refused = ["guest-fsfreeze-thaw"]
    monkeypatch.setattr(commit, "clean_up", lambda qmp: None)
    monkeypatch.setattr(commit.Qemu, "adopt", lambda paths, worker: slow)
    with pytest.raises(GuestError, match="thawed"):
        commit.release(slow.paths)
    assert slow.frozen and mark.exists()
    commit.release(slow.paths)
    assert not slow.frozen and not mark.exists()


def test_a_guest_that_does_not_freeze_is_paused_and_need_not_thaw(slow: SlowAgent) -> None:
    slow.refused = ["guest-fsfreeze-freeze"]
    assert not read(slow).quiesced and not slow.paused and not commit.still_mark(slow.paths.root).exists()
    assert slow.heard[-1] == "guest-fsfreeze-freeze"
