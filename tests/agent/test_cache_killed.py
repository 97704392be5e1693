"""A real agent that is killed while it evicts, collects, scrubs and heals: the next one finds a whole store."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError
from haulier.units import CHUNK
from tests.support.agents import CLI, AgentProcess, make_site

ROOM = CHUNK + 64
KEPT = 20
ROUNDS = 3


def doctor(agent: AgentProcess) -> dict[str, object]:
    """What `haulier doctor --json` says of the store."""
    done = subprocess.run(
        [*CLI, "doctor", "--json", "--root", str(agent.site.root)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return next(check for check in json.loads(done.stdout)["checks"] if check["name"] == "store")


def test_an_agent_killed_at_random_leaves_a_whole_store(short: Path) -> None:
    site = make_site(short / "o", "oslo")
    dice = random.Random(5)
    with AgentProcess(site) as agent:
        with ChunkStore(site.store) as store:
            kept = [store.put(os.urandom(CHUNK)) for _ in range(KEPT)]
            store.save_manifest("guest/web1", Manifest(KEPT * CHUNK, b"".join(kept)))
        for turn in range(ROUNDS):
            with ChunkStore(site.store) as store:
                past = [store.put(os.urandom(CHUNK)) for _ in range(60)]
                store.save_manifest("past", Manifest(60 * CHUNK, b"".join(past)), pinned=False)
            killed = threading.Event()

            def press(killed: threading.Event = killed, turn: int = turn) -> None:
                """Everything at once that takes chunks out, over and over."""
                room = 80
                while not killed.is_set():
                    room = max(KEPT, room - 3)
                    with contextlib.suppress(HaulierError):
                        agent.client.post("/v1/cache", {"budget": room * ROOM, "policy": ("gdsf", "s3-fifo")[turn % 2]})
                        agent.client.post("/v1/gc", {"everything": room % 2 == 0})
                        agent.client.post("/v1/scrub", {})

            threads = [threading.Thread(target=press) for _ in range(2)]
            for thread in threads:
                thread.start()
            time.sleep(dice.uniform(0.05, 0.6))  # the point is that nobody knows where it dies
            agent.end(signal.SIGKILL)
            killed.set()
            for thread in threads:
                thread.join(60)
            with ChunkStore(site.store) as store:
                report = store.check()
                assert report.ok, report
            agent.start()
            assert doctor(agent)["ok"]
            with ChunkStore(site.store) as store:
                assert store.missing(kept) == []
                for fp in kept:
                    store.get(fp)
        agent.client.post("/v1/cache", {"budget": KEPT * ROOM})
        with ChunkStore(site.store) as store:
            assert store.room().chunks == KEPT and store.room().cached == 0
