"""gc and doctor."""

from __future__ import annotations

import os
from typing import Any

import pytest

from haulier.agent import upkeep
from haulier.chunks.manifest import Manifest
from haulier.errors import Unsupported
from haulier.handoff.journal import HandoffRow
from tests.agent.conftest import Fleet

CHUNK = 65536


def collect(fleet: Fleet, dry_run: bool) -> dict[str, Any]:
    return fleet.client.wait(fleet.client.post("/v1/gc", {"dry_run": dry_run}))


def test_gc_frees_what_handoffs_that_are_over_left(fleet: Fleet) -> None:
    agent = fleet.at_oslo
    agent.journal.add_handoff(HandoffRow("hlive", "web1", "target", "lisbon", pid=os.getpid(), pid_started=0.0))
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
