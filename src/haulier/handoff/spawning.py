"""Starting workers: what the agent does with an operator's wish and with another site's offer."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import msgspec

from haulier import priority
from haulier.agent.site import Site
from haulier.chunks.store import ChunkStore
from haulier.durable import write_atomically
from haulier.errors import UNDECODABLE, Conflict, Corrupt, HandoffFailed
from haulier.guests.golden import MANIFEST_PREFIX
from haulier.handoff.attempts import picture_id
from haulier.handoff.custody import happen, record_of
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Accept, Job, Offer, Status
from haulier.handoff.ownership import Action, Event, State
from haulier.handoff.recovery import worker_alive
from haulier.handoff.residence import discard_copy, lease_of, retire
from haulier.handoff.shared import golden_manifest, grown, held
from haulier.images import common
from haulier.process import ProcessId

LISTEN_S = 20.0
LEAVE_S = 3.0
"""For a worker that has nothing to do any more but to clear away, of a guest that comes again already."""
WARM_S = 2.0
KEPT = 2
"""One for a handoff that follows another at once, as the way back or the next guest of a site that is emptied may."""
QUIET_S = 5.0
"""After a handoff the guest's processor finds its caches empty (under TCG: its translated code gone), and its clients'
streams begin anew; beside it, a second of Python's imports took a third of what they had for two."""
PREFETCH_SOURCE = "prefetch-source"
PREFETCH_TARGET = "prefetch-target"
RESUME_SOURCE = "resume-source"
RESUME_TARGET = "resume-target"
"""Roles of workers, never of records: they go on with a post-copy after the first workers' death."""
PREFETCH = (PREFETCH_SOURCE, PREFETCH_TARGET)
"""Roles of a prefetch: it is recorded, shown and cancelled like a handoff, and owns nothing."""


class Standby:
    """Workers that have started and wait to be told which handoff is their own.

    Half a second of a handoff is otherwise the start of a Python process, at each side. One that waits holds nothing
    of the site, and ends when the agent that keeps it ends (its standard input closes). A worker that was given its
    handoff is on its own, as one that was started for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[subprocess.Popen[bytes]] = []
        self._closed = False
        self._timer: threading.Timer | None = None

    def open(self) -> None:
        """Has `KEPT` waiting in a moment, and from then on: an agent that starts has other things to do first."""
        with self._lock:
            self._closed = False
        self._soon(WARM_S)

    def _soon(self, seconds: float) -> None:
        with self._lock:
            if self._closed:
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(seconds, self.warm)
            self._timer.daemon = True
            self._timer.start()

    def warm(self) -> None:
        """Has them waiting now."""
        with self._lock:
            for process in [process for process in self._waiting if process.poll() is not None]:
                self._waiting.remove(process)
                process.communicate()
            while not self._closed and len(self._waiting) < KEPT:
                process = _start("--ready")
                priority.behind(process.pid)
                self._waiting.append(process)

    def warm_after(self, process: subprocess.Popen[bytes], quiet_s: float) -> None:
        """Has the next one waiting so many seconds after that one has ended."""
        process.wait()
        self._soon(quiet_s)

    def pids(self) -> list[int]:
        """The processes that wait, the one that has waited longest first."""
        with self._lock:
            return [process.pid for process in self._waiting]

    def take(self) -> subprocess.Popen[bytes] | None:
        """A waiting worker, for `_tell`; None if there is none."""
        with self._lock:
            if not self._waiting:
                return None
            process = self._waiting.pop(0)
        priority.usual(process.pid)  # it may still be starting
        return process

    def close(self) -> None:
        """Ends those that wait; no other comes."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            waiting, self._waiting = self._waiting, []
        for process in waiting:
            process.communicate()


STANDBY = Standby()
"""Used by an agent that has called `STANDBY.open`; other callers start a worker when they need it."""


def _start(*words: str) -> subprocess.Popen[bytes]:
    """A worker that does nothing until `_tell`, and ends when the agent ends before that."""
    return subprocess.Popen(
        [sys.executable, "-m", "haulier.handoff.worker", *words], stdin=subprocess.PIPE, start_new_session=True
    )


def _tell(process: subprocess.Popen[bytes], site: Site, handoff: str) -> bool:
    """Tells a worker its handoff, from where on it is on its own; False if it is dead."""
    assert process.stdin is not None
    try:
        process.stdin.write(f"{handoff}\t{site.root}\n".encode())
        process.stdin.close()
    except OSError:
        process.communicate()
        return False
    return True


def spawn(site: Site, journal: Journal, job: Job) -> subprocess.Popen[bytes]:
    """Starts a worker that outlives the agent.

    Its process is in the handoff's row before it learns what to do: an agent that dies in between leaves no worker
    that the next agent knows nothing of, and that makes a copy of the guest behind its back.
    """
    directory = site.handoff_root(job.handoff)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(directory / "job.json", msgspec.json.encode(job), 0o600)
    while True:
        waited = STANDBY.take()
        process = waited or _start()
        # One that has ended already is nobody's any more; it does not take what it is told either.
        journal.set_worker(job.handoff, ProcessId.of(process.pid) or ProcessId(process.pid, 0, ""))
        if _tell(process, site, job.handoff):
            break
        if waited is None:
            raise HandoffFailed(f"the worker of handoff {job.handoff} ended at once: see the agent's log")
    if waited is not None:
        # A prefetch leaves the guest where it is, and the handoff may follow at once.
        after = (process, 0.0 if job.role in PREFETCH else QUIET_S)
        threading.Thread(target=STANDBY.warm_after, args=after, name="standby", daemon=True).start()
    return process


def start_source(site: Site, journal: Journal, job: Job) -> subprocess.Popen[bytes]:
    """Records a handoff (or, by the job's role, a prefetch) at its source and starts its worker."""
    record = record_of(journal.guest(job.guest))
    if record.state is not State.OWNER:
        raise Conflict(f"guest {job.guest!r} is {record.state.value!r} at site {site.name!r}: see 'haulier status'")
    journal.add_handoff(HandoffRow(id=job.handoff, guest=job.guest, role=job.role, peer=job.peer))
    return spawn(site, journal, job)


def accept(
    site: Site, journal: Journal, offer: Offer, *, manifest: bool, memory_base: str
) -> tuple[Accept, subprocess.Popen[bytes]]:
    """Takes an offer that passed the preflight: durable as RECEIVING, worker started, its port known.

    `manifest`: the base manifest is here by digest; `memory_base`: the picture of memory to start from. Raises
    Conflict if a guest of that name lives here already.
    """
    name = str(offer.spec["name"])
    before = journal.find_guest(name)
    happened = happen(
        journal,
        name,
        Event.OFFER,
        offer.epoch,
        changes={
            "spec": offer.spec,
            "owner": offer.source,
            "handoff": offer.handoff,
            "manifest": "",
            "wanted": "",
        },
    )
    if happened.after.state is not State.RECEIVING or happened.row.handoff != offer.handoff:
        raise Conflict(
            f"guest {name!r} is {happened.before.state.value!r} at site {site.name!r} (epoch {happened.before.last}, "
            f"offered {offer.epoch}): it cannot be taken there now; see 'haulier guest show {name}' there"
        )
    earlier = journal.find_handoff(before.handoff) if before is not None and before.handoff else None
    if happened.actions:
        _end_worker(earlier)
    elif earlier is not None and worker_alive(earlier):
        # It keeps its picture, or clears away: were it to do that later, it would clear away this guest.
        _end_worker(earlier, LEAVE_S)
        if happened.before.state is State.AWAY:
            retire(site, name, earlier.id)
            journal.end_handoff(earlier.id, "done")
        else:
            discard_copy(site, name, earlier.id)
            journal.end_handoff(earlier.id, "failed")
    for action in happened.actions:
        if action is Action.DISCARD_COPY:
            discard_copy(site, name, before.handoff if before else "")
        elif action is Action.RETIRE:
            retire(site, name, before.handoff if before else "")
    # From the very beginning: whoever finds the guest here after a crash has to know that some of it is elsewhere.
    detail = {"residual": "held"} if offer.options.disk == "on-demand" else {}
    journal.add_handoff(
        HandoffRow(id=offer.handoff, guest=name, role="target", peer=offer.source, epoch=offer.epoch, detail=detail)
    )
    return _start_target(site, journal, offer, "target", manifest=manifest, memory_base=memory_base)


def _start_target(
    site: Site, journal: Journal, offer: Offer, role: str, *, manifest: bool, memory_base: str
) -> tuple[Accept, subprocess.Popen[bytes]]:
    job = Job(
        handoff=offer.handoff,
        role=role,
        guest=str(offer.spec["name"]),
        peer=offer.source,
        options=offer.options,
        offer=offer,
        manifest=_manifest_name(site, offer) if manifest else "",
        golden=offer.golden and _has_golden(site, offer.handoff, str(offer.spec.get("golden", ""))),
        images=() if manifest else _common_images(site, offer.images),
        memory_base=memory_base,
    )
    process = spawn(site, journal, job)
    port = _await_port(site, offer.handoff, process)
    answer = Accept(
        port=port,
        bulk=site.reachable(),
        manifest=bool(job.manifest),
        golden=job.golden,
        memory_base=memory_base,
        images=job.images,
    )
    return answer, process


def resume_source(site: Site, journal: Journal, row: HandoffRow) -> subprocess.Popen[bytes]:
    """A worker that goes on with a post-copy of which the workers have died."""
    options = _first_job(site, row).options
    job = Job(handoff=row.id, role=RESUME_SOURCE, guest=row.guest, peer=row.peer, options=options)
    return spawn(site, journal, job)


def accept_resumption(
    site: Site, journal: Journal, row: HandoffRow, secret: str, pictured: bool
) -> tuple[Accept, subprocess.Popen[bytes]]:
    """The target's side of it: a worker that listens for the source's new one."""
    first = _first_job(site, row)
    if first.offer is None:
        raise Corrupt(f"job.json of handoff {row.id} holds no offer: it cannot be gone on with")
    offer = msgspec.structs.replace(first.offer, secret=secret)
    # The port that stands there is the old worker's.
    (site.handoff_root(row.id) / "status.json").unlink(missing_ok=True)
    picture = picture_id(row.id) if pictured else ""
    job = msgspec.structs.replace(first, role=RESUME_TARGET, offer=offer, memory_base=picture)
    process = spawn(site, journal, job)
    port = _await_port(site, row.id, process)
    return Accept(port=port, bulk=site.reachable(), manifest=True, golden=False, memory_base=""), process


def _first_job(site: Site, row: HandoffRow) -> Job:
    path = site.handoff_root(row.id) / "job.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Job)
    except (OSError, *UNDECODABLE) as error:
        raise Corrupt(f"{path} makes no sense ({error}): the handoff cannot be gone on with") from None


def accept_prefetch(
    site: Site, journal: Journal, offer: Offer, *, manifest: bool, memory_base: str
) -> tuple[Accept, subprocess.Popen[bytes]]:
    """As `accept`, for a prefetch: who owns the guest is not touched, and nothing of it is started here."""
    name = str(offer.spec["name"])
    journal.add_handoff(HandoffRow(id=offer.handoff, guest=name, role=PREFETCH_TARGET, peer=offer.source))
    return _start_target(site, journal, offer, PREFETCH_TARGET, manifest=manifest, memory_base=memory_base)


def _end_worker(row: HandoffRow | None, patience_s: float = 0.0) -> None:
    """Ends the worker of an earlier handoff, which may not have noticed yet that it is over."""
    if row is None or not worker_alive(row):
        return
    if not row.worker.wait_gone(patience_s):
        row.worker.kill()


def _await_port(site: Site, handoff: str, process: subprocess.Popen[bytes]) -> int:
    path = site.handoff_root(handoff) / "status.json"
    deadline = time.monotonic() + LISTEN_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, *UNDECODABLE):
            status = msgspec.json.decode(path.read_bytes(), type=Status)
            if status.port:
                return status.port
        time.sleep(0.01)
    raise HandoffFailed(
        f"the worker at site {site.name!r} did not start to listen: see its worker.log under handoffs/{handoff} there"
    )


def _manifest_name(site: Site, offer: Offer) -> str:
    digest = bytes.fromhex(offer.manifest)
    size = int(offer.spec["disk_size"]) if offer.spec.get("container") else 0
    with ChunkStore(site.store) as store:
        for name in store.manifest_names():
            with contextlib.suppress(Corrupt):
                if grown(store.load_manifest(name), size).digest == digest:
                    return name
    return ""


def _common_images(site: Site, offered: Sequence[str]) -> tuple[str, ...]:
    with ChunkStore(site.store) as store:
        return common.choose(held(store), offered, offered)


def _has_golden(site: Site, handoff: str, golden: str) -> bool:
    """Whether all of the snapshot's disk is here, which it then is until the handoff is over.

    The source may refer to any block of it before it has heard what is missing here, and of an image that is not
    pinned the cache gives up chunks.
    """
    with ChunkStore(site.store) as store:
        manifest = golden_manifest(store, golden)
        if manifest is None:
            return False
        name = MANIFEST_PREFIX + golden
        if store.is_pinned(name) and store.is_complete(name):
            return True  # which keeps it; looking for tens of thousands of chunks takes a while
        return not store.missing(manifest.unique(), lease_of(handoff))
