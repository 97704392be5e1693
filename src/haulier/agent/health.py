"""Whether the store is whole, and making it so: reference counts, flipped bits, chunks fetched again elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Final, Protocol

import msgspec

from haulier.agent.core import Core
from haulier.agent.jobs import Job, Progress
from haulier.chunks.scrub import Bad, Pass, condemn, lacking, read_pass, scrub_step, write_pass
from haulier.chunks.store import ChunkStore
from haulier.errors import Conflict, HaulierError, UsageError
from haulier.fetch.fetching import fetch
from haulier.fetch.holders import sources_of
from haulier.guests import golden_scrub
from haulier.units import MIB

log = logging.getLogger(__name__)

PASS_S: Final = 14 * 86_400.0
"""The agent reads all of its store once in so long."""
STEP_LEAST: Final = 1 * MIB
JOB_STEP: Final = 16 * MIB
SNAPSHOT_RATE: Final = 32 * MIB
"""Bytes a second at which a golden snapshot is read again."""
HEAL_AGAIN_S: Final = 600.0
STALL_S: Final = 20.0
_LEASE: Final = "heal"


class ScrubRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`rate` in bytes a second, 0 = as fast as the disk gives."""

    rate: float = 0.0


class Fetch(Protocol):
    """Brings chunks into the store from wherever they are; those that it can. May raise HaulierError after some."""

    def __call__(self, fps: list[bytes]) -> None: ...


class Health:
    """One agent's. Blocking; any thread may call."""

    def __init__(self, core: Core, store: ChunkStore, fetch: Fetch | None = None) -> None:
        self.core = core
        self.store = store
        self._fetch = fetch or self._from_sites
        self._lock = threading.Lock()
        self._stepped = time.monotonic()
        self._healed = float("-inf")
        self._looked: dict[str, float] = {}
        """When golden snapshots were read, by id: on a full disk it cannot be noted beside them."""
        store.drop_lease(_LEASE)  # of an agent that was killed meanwhile

    def _from_sites(self, fps: list[bytes]) -> None:
        sources = sources_of(self.core.site)
        if sources:
            fetch(fps, sources, self.store, lease=_LEASE, stall_s=STALL_S)

    # -- looking

    def facts(self) -> dict[str, Any]:
        """What is wrong without reading chunks, and how the scrubber does."""
        report = self.store.check(deep=False)
        state = read_pass(self.store)
        return {
            "wrong_references": report.wrong_references,
            "missing": len(report.missing),
            "unreadable": len(report.corrupt),
            "damaged_manifests": report.damaged_manifests,
            "scrub": {
                "ended": state.ended,
                "chunks": state.chunks,
                "corrupt": state.corrupt,
                "healed": state.healed,
                "running": state.begun > 0,
            },
        }

    def check(self) -> tuple[bool, str]:
        """For the doctor: (whether the store is whole, what was found)."""
        try:
            facts = self.facts()
        except Conflict:
            return True, "being collected or checked just now"
        stats = self.store.stats()
        whole = f"{stats.chunks} chunks, {stats.disk // MIB} MiB on disk, {stats.manifests} manifests"
        ended = facts["scrub"]["ended"]
        scrubbed = f"all read {(time.time() - ended) / 86_400:.0f} days ago" if ended else "not all read again yet"
        wrong = [
            text
            for count, text in (
                (facts["wrong_references"], "{} reference counts differ from the manifests"),
                (facts["missing"], "{} chunks that are needed are missing"),
                (facts["unreadable"], "{} chunks cannot be read"),
                (len(facts["damaged_manifests"]), "damaged manifests: " + ", ".join(facts["damaged_manifests"])),
            )
            if count
            for text in (text.format(count),)
        ]
        return not wrong, "; ".join([*wrong, whole, scrubbed])

    # -- mending

    def repair(self) -> Job:
        """Reads and compares everything, puts right what can be, and fetches again what is lost."""

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone("the store", "being repaired"):
                progress(0.05, "reading all chunks")
                found = self.store.check(repair=True)
                progress(0.7, "fetching what is lost")
                lost = self._heal()
                now = self.store.check(deep=False)
            return {"found": msgspec.to_builtins(found), "lost": [fp.hex() for fp in lost], "ok": now.ok}

        return self.core.jobs.start("repair", self.core.site.name, work)

    def scrub(self, request: ScrubRequest) -> Job:
        """A whole pass now; the agent's own goes on where it was."""
        if not 0 <= request.rate < 1 << 50:
            raise UsageError(f"a rate of {request.rate:g} bytes a second: give 0 (no limit) or more")

        def work(progress: Progress) -> dict[str, Any]:
            state, began, total = Pass(), time.monotonic(), max(self.store.room().used, 1)
            lost: list[bytes] = []
            with self.core.alone("the scrubber", "reading all chunks"):
                while True:
                    step = scrub_step(self.store, state, JOB_STEP, time.time())
                    lost += self._mend(state, step.bad)
                    progress(state.bytes / total, f"{state.chunks} chunks, {state.corrupt} bad")
                    if step.done:
                        break
                    ahead = state.bytes / request.rate - (time.monotonic() - began) if request.rate else 0.0
                    if ahead > 0:
                        time.sleep(ahead)
                self._remember(state)
            facts = {key: getattr(state, key) for key in ("chunks", "bytes", "corrupt", "healed")}
            return {**facts, "lost": sorted({fp.hex() for fp in lost})}

        return self.core.jobs.start("scrub", self.core.site.name, work)

    def _remember(self, done: Pass) -> None:
        state = read_pass(self.store)
        state.ended, state.chunks, state.corrupt, state.healed = done.ended, done.chunks, done.corrupt, done.healed
        write_pass(self.store, state)

    def tick(self) -> None:
        """What the agent's loop calls: a paced step of the pass, and another try at what could not be healed."""
        with self._lock:
            passed = time.monotonic() - self._stepped
            self._stepped = time.monotonic()
        self._look_at_snapshots()
        if self.core.is_busy("the scrubber"):
            return
        state = read_pass(self.store)
        if not state.begun and time.time() - state.ended < PASS_S / 2:
            return
        most = max(STEP_LEAST, int(self.store.room().used * passed / (PASS_S / 2)))
        step = scrub_step(self.store, state, most, time.time())
        self._mend(state, step.bad)
        write_pass(self.store, state)
        if time.monotonic() - self._healed > HEAL_AGAIN_S and lacking(self.store):
            self._heal()

    def _look_at_snapshots(self) -> None:
        """One golden snapshot that was not read for so long as a pass takes."""
        golden = golden_scrub.due(self.core.site.golden, PASS_S, self._looked)
        if golden is not None:
            self._looked[golden.id] = time.time()
            golden_scrub.check(golden.path, self.store, SNAPSHOT_RATE)

    def _mend(self, state: Pass, bad: list[Bad]) -> list[bytes]:
        """Chunks that were found bad, are needed, and could not be had again."""
        if not bad:
            return []
        for fp, at in bad:
            log.error("chunk %s in pack %d at %d is damaged on disk", fp.hex()[:12], at.pack, at.offset)
        gone = condemn(self.store, bad)
        state.healed += len(bad) - len(gone)
        lost = set(self._heal()) & set(gone) if gone else set[bytes]()
        state.healed += sum(1 for fp in gone if self.store.has(fp))
        return sorted(lost)

    def _heal(self) -> list[bytes]:
        """Fetches again what pinned manifests lack; what is still missing then."""
        self._healed = time.monotonic()
        wanted = lacking(self.store)
        if not wanted:
            return []
        try:
            self._fetch(wanted)
        except HaulierError as error:
            log.warning("not all of %d damaged chunks could be fetched again: %s", len(wanted), error)
        finally:
            self.store.commit()
            self.store.drop_lease(_LEASE)
        left = lacking(self.store)
        log.warning("%d of %d damaged chunks were healed from other sites", len(wanted) - len(left), len(wanted))
        return left
