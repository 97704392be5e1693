"""Real agents as processes, a real QEMU with a guest that only halts: kills, adoption, handoffs there and back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from haulier.agent.site import Site
from haulier.disks.export import DiskExport
from haulier.handoff import residence
from haulier.handoff.journal import Journal
from tests.support.agents import CLI, AgentProcess, join, make_site
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.qemu]

# cli; hlt; jmp to the hlt
BOOT = b"\xfa\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa"


@dataclass
class Pair:
    oslo: AgentProcess
    lisbon: AgentProcess

    def status(self, at: AgentProcess) -> str:
        found = {g["name"]: g for g in at.client.guests()}
        return str(found.get("g1", {}).get("status"))

    def runners(self) -> list[str]:
        """The sites at which a QEMU runs the guest right now."""
        found = []
        for at in (self.oslo, self.lisbon):
            qemu = residence.adopt(at.site, "g1", worker=True)
            if qemu is not None:
                if qemu.status() == "running":
                    found.append(at.site.name)
                qemu.close()
        return found


def command(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *words, "--root", str(site.root)], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture
def pair(short: Path) -> Iterator[Pair]:
    first = make_site(short / "o", "oslo")
    image = short / "tiny.raw"
    image.write_bytes(BOOT.ljust(8 << 20, b"\0"))
    with AgentProcess(first) as oslo:
        with AgentProcess(join(first, short / "l", "lisbon")) as lisbon:
            found = Pair(oslo, lisbon)
            try:
                done = command(first, "image", "import", str(image), "--name", "tiny", "--no-warm")
                assert done.returncode == 0, done.stderr
                done = command(
                    first, "guest", "run", "g1", "--image", "tiny", "--memory", "64M", "--no-agent", "--json"
                )
                assert done.returncode == 0, done.stderr
                assert json.loads(done.stdout.splitlines()[-1])["status"] == "running"
                yield found
            finally:
                for at in (oslo, lisbon):
                    residence.clear(at.site, "g1")
                    if at.site.ram_dir.is_dir():
                        assert not list(at.site.ram_dir.glob("g1-*")) or os.environ.get("PYTEST_XDIST_WORKER")


def move(pair: Pair, source: AgentProcess, to: str, *more: str) -> dict[str, Any]:
    done = command(source.site, "handoff", "g1", "--to", to, "--json", *more)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stderr, lines)
    assert lines[-1]["event"] == "result" and lines[-1]["outcome"] == "done"
    return dict(lines[-1])


def test_there_and_back_by_hand(pair: Pair) -> None:
    end = move(pair, pair.oslo, "lisbon", "--check")
    assert end["report"]["check"]["memory_equal"] is True
    assert pair.runners() == ["lisbon"]
    assert (pair.status(pair.oslo), pair.status(pair.lisbon)) == ("at lisbon", "running")
    assert command(pair.lisbon.site, "verify", "g1").returncode == 0
    move(pair, pair.lisbon, "oslo")
    assert pair.runners() == ["oslo"]
    done = command(pair.oslo.site, "handoff", "g1", "--to", "porto")
    assert done.returncode == 3 and "unknown site 'porto'" in done.stderr
    assert pair.runners() == ["oslo"]


def test_the_guest_outlives_the_agent_and_is_adopted(pair: Pair) -> None:
    pid = pair.oslo.client.guest("g1")["pid"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        pair.oslo.end(number)
        assert pair.runners() == ["oslo"]
        done = command(pair.oslo.site, "guest", "list")
        assert done.returncode == 8 and "haulier agent" in done.stderr
        pair.oslo.start()
        assert pair.oslo.client.guest("g1")["pid"] == pid
        assert pair.status(pair.oslo) == "running"


def test_a_disk_export_that_dies_is_started_again(pair: Pair) -> None:
    control = residence.guest_paths(pair.oslo.site, "g1").nbd_ctl
    first = DiskExport.attach(control)
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: pair.oslo.client.guest("g1").get("export", {}).get("pid", first.pid) != first.pid, 30)
    # one that dies while there is no agent is mended when the next one starts
    second = DiskExport.attach(control)
    pair.oslo.end(signal.SIGKILL)
    os.kill(second.pid, signal.SIGKILL)
    pair.oslo.start()
    assert DiskExport.attach(control).alive()
    assert pair.status(pair.oslo) == "running"


def test_stop_start_remove(pair: Pair) -> None:
    site = pair.oslo.site
    assert command(site, "guest", "remove", "g1").returncode == 4
    assert command(site, "guest", "stop", "g1", "--force").returncode == 0
    assert pair.status(pair.oslo) == "stopped" and pair.runners() == []
    assert command(site, "handoff", "g1", "--to", "lisbon").returncode == 4
    assert command(site, "guest", "start", "g1").returncode == 0
    assert pair.runners() == ["oslo"]
    assert command(site, "guest", "remove", "g1", "--force").returncode == 0
    assert pair.oslo.client.guests() == [] and pair.runners() == []
    assert not site.guest_root("g1").exists()


@pytest.mark.parametrize("victim", ["oslo", "lisbon"])
def test_an_agent_that_is_killed_in_a_handoff_does_not_matter(pair: Pair, victim: str) -> None:
    """The workers go on; the next agent takes note of the result."""
    handoff = pair.oslo.client.start_handoff("g1", "lisbon")["id"]
    at = getattr(pair, victim)
    wait_for(lambda: pair.oslo.client.handoff(handoff)["status"].get("phase") not in (None, "", "start", "offer"), 30)
    at.end(signal.SIGKILL)
    at.start()
    wait_for(lambda: pair.oslo.client.handoff(handoff)["state"] == "ended", 60)
    assert pair.oslo.client.handoff(handoff)["outcome"] == "done"
    wait_for(lambda: pair.runners() == ["lisbon"], 30)


@pytest.mark.parametrize("victim", ["oslo", "lisbon"])
def test_a_worker_that_is_killed_leaves_one_runner(pair: Pair, victim: str) -> None:
    handoff = pair.oslo.client.start_handoff("g1", "lisbon")["id"]
    at: AgentProcess = getattr(pair, victim)

    def pid() -> int:
        with Journal(at.site.journal) as journal:
            row = journal.find_handoff(handoff)
        return row.pid if row is not None else 0

    os.kill(wait_for(pid, 30), signal.SIGKILL)
    for each in (pair.oslo, pair.lisbon):
        wait_for(lambda each=each: all(h["state"] == "ended" for h in each.client.handoffs()), 90)
    assert len(pair.runners()) == 1
    where = pair.runners()[0]
    if where == "oslo":
        # and nothing of the copy is left
        assert not pair.lisbon.site.guest_root("g1").exists()
        wait_for(lambda: move(pair, pair.oslo, "lisbon")["outcome"] == "done", 60)
    assert pair.runners() == ["lisbon"]


def test_cancel_leaves_nothing_behind(pair: Pair) -> None:
    handoff = pair.oslo.client.start_handoff("g1", "lisbon")["id"]
    # Not by a command: so small a guest on loopback is gone before Python has started.
    pair.oslo.client.cancel(handoff)
    facts = wait_for(lambda: (f := pair.oslo.client.handoff(handoff)) and f["state"] == "ended" and f, 60)
    assert facts["outcome"] == "cancelled" and facts["code"] == 11
    wait_for(lambda: all(h["state"] == "ended" for h in pair.lisbon.client.handoffs()), 60)
    assert pair.runners() == ["oslo"]
    assert not pair.lisbon.site.guest_root("g1").exists()
    assert pair.lisbon.client.guests() == []
    move(pair, pair.oslo, "lisbon")


def test_ctrl_c_cancels_and_waits_for_the_result(pair: Pair) -> None:
    process = subprocess.Popen(
        [*CLI, "handoff", "g1", "--to", "lisbon", "--json", "--root", str(pair.oslo.site.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(100, process.kill)
    killer.start()
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        last = [first, *(json.loads(line) for line in process.stdout)][-1]
    code = process.wait()
    killer.cancel()
    assert (code, last["outcome"]) in ((11, "cancelled"), (0, "done"))
    wait_for(lambda: pair.runners() == (["oslo"] if code else ["lisbon"]), 30)


def test_two_handoffs_of_one_guest_do_not_go_together(pair: Pair) -> None:
    first = pair.oslo.client.start_handoff("g1", "lisbon")["id"]
    done = command(pair.oslo.site, "handoff", "g1", "--to", "lisbon")
    assert done.returncode == 4 and "already" in done.stderr
    wait_for(lambda: pair.oslo.client.handoff(first)["state"] == "ended", 60)
    assert pair.runners() == ["lisbon"]


def test_sigterm_ends_the_agent_cleanly(pair: Pair) -> None:
    assert pair.lisbon.end(signal.SIGTERM) == 0
    assert not pair.lisbon.site.socket.exists()
    pair.lisbon.start()
