"""gc and doctor."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from haulier.agent import upkeep
from haulier.chunks.manifest import Manifest
from haulier.errors import Unsupported
from haulier.handoff.journal import HandoffRow, SiteRow
from tests.agent.conftest import Fleet

CHUNK = 65536


def collect(fleet: Fleet, dry_run: bool) -> dict[str, Any]:
    return fleet.client.wait(fleet.client.post("/v1/gc", {"dry_run": dry_run}))


def test_gc_frees_what_handoffs_that_are_over_left(fleet: Fleet) -> None:
    agent = fleet.at_oslo
    agent.journal.add_handoff(HandoffRow("hlive", "web1", "target", "lisbon", pid=os.getpid()))
    agent.journal.add_handoff(HandoffRow("hover", "web2", "target", "lisbon", state="ended", outcome="failed"))
    agent._stopping.set()
    for loop in agent._loops:
        loop.join(10)
    store = agent.store
    for handoff in ("hlive", "hover"):
        store.add_lease(f"handoff/{handoff}")
        store.put(os.urandom(CHUNK), lease=f"handoff/{handoff}")
        store.save_manifest(f"incoming/{handoff}", Manifest(CHUNK, store.put(os.urandom(CHUNK))))
        directory = fleet.oslo.handoff_root(handoff)
        directory.mkdir()
        fleet.oslo.mirror(handoff).write_bytes(b"m")
    store.commit()
    before = store.stats().chunks
    would = collect(fleet, True)
    assert sorted(would["handoffs"]) == [
        str(fleet.oslo.mirror("hover")), "handoff/hover", "incoming/hover",
    ]  # fmt: skip
    assert store.stats().chunks == before and (fleet.oslo.mirror("hover")).exists()
    collect(fleet, False)
    assert store.leases() == ["handoff/hlive"]
    assert store.manifest_names() == ["incoming/hlive"]
    assert (fleet.oslo.mirror("hlive")).exists()
    assert not (fleet.oslo.mirror("hover")).exists()
    fleet.oslo.mirror("hlive").unlink()  # which is not beneath the test's own folder
    assert store.stats().chunks == before - 2


def test_doctor_says_what_is_wrong_and_what_to_do(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> tuple[int, int, int]:
        raise Unsupported("QEMU 7.2.0 is too old")

    monkeypatch.setattr(upkeep, "qemu_version", old)
    found = fleet.client.get("/v1/doctor")
    checks = {check["name"]: check for check in found["checks"]}
    assert not found["ok"] and not checks["qemu"]["ok"]
    assert checks["qemu"]["found"] == "QEMU 7.2.0 is too old" and "install" in checks["qemu"]["advice"]
    assert checks["site lisbon"]["ok"] and "answers in" in checks["site lisbon"]["found"]
    assert checks["certificate"]["ok"] and checks["store"]["ok"]


def test_doctor_answers_whatever_a_program_does(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs() -> tuple[int, int, int]:
        subprocess.run(["sleep", "60"], timeout=0.1, check=False)
        raise AssertionError

    monkeypatch.setattr(upkeep, "qemu_version", hangs)
    silent = tmp_path / "qemu-img"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    checks = {check["name"]: check for check in fleet.client.get("/v1/doctor")["checks"]}
    assert not checks["qemu"]["ok"] and "timed out" in checks["qemu"]["found"]
    assert not checks["qemu-img"]["ok"] and "makes no sense" in checks["qemu-img"]["found"]
    assert checks["store"]["ok"] and checks["site lisbon"]["ok"]


def test_doctor_does_not_wait_for_sites_that_are_down(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "PEERS_S", 3.0)
    monkeypatch.setattr(upkeep, "PEERS_AT_ONCE", 4)
    with socket.create_server(("127.0.0.1", 0), backlog=32) as server:  # connections are made, and nobody speaks
        dark = f"127.0.0.1:{server.getsockname()[1]}"
        names = [f"porto{n}" for n in range(8)]
        fleet.at_oslo.journal.put_sites([SiteRow(name, dark) for name in names])
        found = fleet.client.get("/v1/doctor", timeout=60)
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["site lisbon"]["ok"]
    said = [checks[f"site {name}"]["found"] for name in names]
    assert sum("has not answered in time" in text for text in said) == 4
    assert sum("not asked in time" in text for text in said) == 4
    assert (
        not any(checks[f"site {name}"]["ok"] for name in names) and "start its agent" in checks["site porto7"]["advice"]
    )
