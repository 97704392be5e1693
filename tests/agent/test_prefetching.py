"""Prefetches at the agent: what is refused, what ends them, and what a dead one leaves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from haulier.agent import prefetching
from haulier.agent.core import Core
from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, UnknownThing, UsageError
from haulier.guests.model import new_spec
from haulier.handoff import attempts, recovery
from haulier.handoff.journal import HandoffRow, SiteRow
from haulier.handoff.messages import Job, Offer, Options, Status
from haulier.handoff.spawning import PREFETCH_TARGET
from haulier.memory.mirror import Mirror
from haulier.units import CHUNK, PAGE
from tests.support.processes import process_of

SPEC = new_spec("web1", "debian", memory_mib=512, disk_size=16 * CHUNK, address="10.77.0.10/24", gateway="10.77.0.1")


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    site = Site(tmp_path / "s", "oslo", "127.0.0.1:7440", ram=str(tmp_path / "ram"))
    site.make_directories()
    core = Core(site)
    core.journal.put_sites([SiteRow("oslo", "127.0.0.1:7440"), SiteRow("lisbon", "127.0.0.2:7440")])
    yield core
    core.close()


def coming(core: Core, handoff: str = "h1") -> HandoffRow:
    """A prefetch that arrives here, without its worker."""
    row = core.journal.add_handoff(HandoffRow(id=handoff, guest="web1", role=PREFETCH_TARGET, peer="lisbon"))
    directory = core.site.handoff_root(handoff)
    directory.mkdir(parents=True)
    offer = Offer(
        handoff=handoff,
        source="lisbon",
        spec=msgspec.to_builtins(SPEC),
        epoch=2,
        secret="0" * 64,
        manifest="0" * 64,
    )
    job = Job(handoff=handoff, role=PREFETCH_TARGET, guest="web1", peer="lisbon", offer=offer)
    (directory / "job.json").write_bytes(msgspec.json.encode(job))
    status = Status(handoff=handoff, role="target", guest="web1", source="lisbon", target="oslo")
    (directory / "status.json").write_bytes(msgspec.json.encode(status))
    return row


@pytest.mark.parametrize(
    ("guest", "to", "options", "kind"),
    [
        ("web1", "oslo", Options(), UsageError),
        ("web1", "porto", Options(), UnknownThing),
        ("web1", "lisbon", Options(), UnknownThing),
        ("web1", "lisbon", Options(keep_fresh_s=0.1), UsageError),
        ("web1", "lisbon", Options(keep_fresh_s=1e6), UsageError),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    core: Core, guest: str, to: str, options: Options, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        prefetching.start(core, guest, to, options)
    assert core.journal.handoffs() == []


def test_a_guest_that_is_elsewhere_or_stopped_is_not_prefetched(core: Core) -> None:
    core.journal.advance("web1", "absent", "away", owner="lisbon")
    with pytest.raises(Conflict, match="not this site's"):
        prefetching.start(core, "web1", "lisbon", Options())
    core.journal.advance("web1", "away", "owner", owner="oslo", wanted="stopped")
    with pytest.raises(Conflict, match="only a running guest"):
        prefetching.start(core, "web1", "lisbon", Options())


def test_a_live_worker_is_asked_to_end_and_waited_for(core: Core) -> None:
    row = coming(core)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        core.journal.set_worker(row.id, process_of(worker))
        began = time.monotonic()

        def settle() -> None:
            worker.wait(30)
            recovery.recover(core.site, core.journal, core.journal.handoff(row.id), lambda name: None)  # type: ignore[arg-type,return-value]

        import threading

        thread = threading.Thread(target=settle)
        thread.start()
        prefetching.end_here(core, "web1")
        thread.join(30)
        assert worker.returncode == -15 and time.monotonic() - began < 20
        assert prefetching.live(core, "web1") == []
        assert core.journal.handoff(row.id).detail["cancel"] is True
    finally:
        worker.kill()
        worker.wait()


def test_what_a_dead_one_received_is_kept_and_nothing_else(core: Core) -> None:
    row = coming(core)
    mirror = Mirror.create(core.site.mirror(row.id), {"ram0": 64 * PAGE})
    mirror.set(np.array([5]), np.full((1, PAGE), 9, np.uint8))
    mirror.close()
    with ChunkStore(core.site.store) as store:
        store.add_lease(f"handoff/{row.id}")
        store.save_manifest(f"incoming/{row.id}", Manifest(CHUNK, store.put(b"x" * CHUNK)))
    assert recovery.recover(core.site, core.journal, row, lambda name: None)  # type: ignore[arg-type,return-value]
    assert core.journal.handoff(row.id).outcome == "failed"
    assert not core.site.mirror(row.id).exists()
    with ChunkStore(core.site.store) as store:
        assert store.leases() == [] and store.manifest_names() == ["attempt/web1"]
    base = attempts.open_base(core.site, "web1", f"attempt:{row.id}")
    assert base.view("ram0")[5][0] == 9
    assert [one.kind for one in attempts.kept(core.site)] == ["prefetch"]
    assert attempts.candidates(core.site, "web1", SPEC.uuid) == [f"attempt:{row.id}"]
    assert core.journal.find_guest("web1") is None, "nobody owns anything by it"
