"""Work that takes longer than a request: one thread each, with progress, kept until the agent ends.

Jobs are not durable: after a restart of the agent their ids are unknown, and what they left half done is cleared
by whoever owns it (see `guests.registry`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from haulier.errors import Cancelled, HaulierError, UnknownThing
from haulier.handoff.journal import new_handoff_id

log = logging.getLogger(__name__)
_KEPT = 200

Progress = Callable[[float, str], None]
"""(fraction from 0 to 1, what is being done)."""


class Job(msgspec.Struct):
    """`state` is "running", "done" (with `result`) or "failed" (with `error` and its exit `code`)."""

    id: str
    kind: str
    about: str
    state: str = "running"
    progress: float = 0.0
    message: str = ""
    started: float = 0.0
    ended: float = 0.0
    result: dict[str, Any] = {}
    error: str = ""
    code: int = 0


class Jobs:
    """All jobs of one agent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._cancelled: set[str] = set()

    def start(self, kind: str, about: str, work: Callable[[Progress], dict[str, Any]]) -> Job:
        """Runs `work` in a thread of its own; it is given a function to report progress with."""
        job = Job(id="j" + new_handoff_id()[1:], kind=kind, about=about, started=time.time())
        with self._lock:
            self._jobs[job.id] = job
            for old in [key for key, each in self._jobs.items() if each.state != "running"][:-_KEPT]:
                del self._jobs[old]
        # daemon: an agent that is told to end does not wait for an import
        threading.Thread(target=self._run, args=(job, work), name=f"{kind} {about}", daemon=True).start()
        return job

    def get(self, job: str) -> Job:
        with self._lock:
            found = self._jobs.get(job)
        if found is None:
            raise UnknownThing(f"no job {job[:60]!r}: the agent was restarted since; see what is there and begin again")
        return found

    def all(self) -> list[Job]:
        with self._lock:
            return list(self._jobs.values())

    def cancel(self, name: str) -> Job:
        """Has the job end at its next word of progress; one that is over stays as it is. UnknownThing."""
        job = self.get(name)
        if job.state == "running":
            self._cancelled.add(job.id)
        return job

    def _run(self, job: Job, work: Callable[[Progress], dict[str, Any]]) -> None:
        def progress(fraction: float, message: str) -> None:
            if job.id in self._cancelled:
                raise Cancelled(f"{job.kind} of {job.about} was cancelled")
            job.progress = min(1.0, max(0.0, fraction))
            job.message = message

        try:
            job.result = work(progress)
            job.progress = 1.0
            job.state = "done"
        except HaulierError as error:
            job.error, job.code, job.state = str(error), error.exit_code, "failed"
            log.warning("%s %s: %s", job.kind, job.about, error)
        except Exception as error:
            log.exception("%s %s", job.kind, job.about)
            job.error = f"{job.kind} of {job.about} failed inside the agent ({error!r}): see its log"
            job.code, job.state = HaulierError.exit_code, "failed"
        finally:
            job.ended = time.time()
            self._cancelled.discard(job.id)
