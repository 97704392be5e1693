"""A handoff worker: one process a side for each handoff. Its death is a failed handoff, never a lost guest.

``python -m haulier.handoff.worker --root ROOT --id HANDOFF``; everything else stands in the handoff's job.json.
SIGTERM and SIGINT cancel.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec
import psutil

from haulier.agent.client import Client
from haulier.agent.site import Site, write_atomically
from haulier.errors import Cancelled, Conflict, Corrupt, HandoffFailed, HaulierError, PeerError
from haulier.handoff.custody import happen, record_of
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Accept, Job, Offer, Status
from haulier.handoff.ownership import Action, Event, State
from haulier.handoff.progress import write_report
from haulier.handoff.residence import discard_copy, retire
from haulier.handoff.source import SourceHandoff
from haulier.handoff.target import TargetHandoff

log = logging.getLogger("haulier.handoff")
LISTEN_S = 20.0


class AgentPeer:
    """The other site's agent, as the workers and recovery talk to it."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def offer(self, offer: Offer) -> Accept:
        answer = self._client.offer(msgspec.to_builtins(offer))
        try:
            return msgspec.convert(answer, Accept)
        except msgspec.ValidationError as error:
            raise PeerError(f"{self._client.where} answered an offer in a way that makes no sense: {error}") from None

    def own(self, guest: str, event: str, epoch: int, handoff: str = "") -> list[tuple[str, int]]:
        answer = self._client.ownership(guest, event, epoch, handoff)
        try:
            return msgspec.convert(answer.get("messages", []), list[tuple[str, int]])
        except msgspec.ValidationError as error:
            raise PeerError(f"{self._client.where} answered about ownership in a way that makes no sense: {error}") from None


def peer_of(site: Site, journal: Journal, name: str) -> AgentPeer:
    return AgentPeer(Client.peer(site, journal.site(name)))


# -- started by the agent -----------------------------------------------------------------------------------------


def spawn(site: Site, journal: Journal, job: Job) -> subprocess.Popen[bytes]:
    """Starts a worker that outlives the agent; its process is in the handoff's row when this returns."""
    directory = site.handoff_root(job.handoff)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(directory / "job.json", msgspec.json.encode(job), 0o600)
    with (directory / "worker.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "haulier.handoff.worker", "--root", str(site.root), "--id", job.handoff],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    started = psutil.Process(process.pid).create_time()
    journal.update_handoff(job.handoff, pid=process.pid, pid_started=started)
    return process


def start_source(site: Site, journal: Journal, job: Job) -> subprocess.Popen[bytes]:
    """Records a handoff at its source and starts its worker."""
    record = record_of(journal.guest(job.guest))
    if record.state is not State.OWNER:
        raise Conflict(f"guest {job.guest!r} is {record.state.value!r} at site {site.name!r}: see 'haulier status'")
    journal.add_handoff(HandoffRow(id=job.handoff, guest=job.guest, role="source", peer=job.peer))
    return spawn(site, journal, job)


def accept(
    site: Site, journal: Journal, offer: Offer, *, manifest: bool, memory_base: str
) -> tuple[Accept, subprocess.Popen[bytes]]:
    """Takes an offer that passed the preflight: durable as RECEIVING, worker started, its port known.

    Raises Conflict if a guest of that name lives here already.
    """
    name = str(offer.spec.get("name", ""))
    before = journal.find_guest(name)
    happened = happen(
        journal, name, Event.OFFER, offer.epoch, spec=offer.spec, owner=offer.source, handoff=offer.handoff
    )
    if happened.after.state is not State.RECEIVING or happened.row.handoff != offer.handoff:
        raise Conflict(
            f"guest {name!r} is {happened.before.state.value!r} at site {site.name!r} (epoch {happened.before.last}): "
            "an offer of it cannot be taken here now; see 'haulier guest show' there"
        )
    for action in happened.actions:
        if action is Action.DISCARD_COPY:
            discard_copy(site, name, before.handoff if before else "")
        elif action is Action.RETIRE:
            retire(site, name, before.handoff if before else "")
    journal.add_handoff(
        HandoffRow(id=offer.handoff, guest=name, role="target", peer=offer.source, epoch=offer.epoch)
    )
    job = Job(
        handoff=offer.handoff,
        role="target",
        guest=name,
        peer=offer.source,
        options=offer.options,
        offer=offer,
        memory_base=memory_base,
    )
    process = spawn(site, journal, job)
    port = _await_port(site, offer.handoff, process)
    return Accept(port=port, bulk=site.bulk, manifest=manifest, memory_base=memory_base), process


def _await_port(site: Site, handoff: str, process: subprocess.Popen[bytes]) -> int:
    path = site.handoff_root(handoff) / "status.json"
    deadline = time.monotonic() + LISTEN_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            status = msgspec.json.decode(path.read_bytes(), type=Status)
            if status.port:
                return status.port
        time.sleep(0.01)
    raise HandoffFailed(
        f"the worker at site {site.name!r} did not start to listen: see {site.handoff_root(handoff) / 'worker.log'} there"
    )


# -- the worker itself --------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="haulier.handoff.worker")
    parser.add_argument("--root", required=True)
    parser.add_argument("--id", required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    site = Site.load(options.root)
    directory = site.handoff_root(options.id)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.error("handoff %s has a worker already", options.id)
        return Conflict.exit_code
    cancelled = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: cancelled.set())
    try:
        job = msgspec.json.decode((directory / "job.json").read_bytes(), type=Job)
    except msgspec.MsgspecError as error:
        raise Corrupt(f"{directory / 'job.json'} makes no sense ({error}): start the handoff again") from None
    with Journal(site.journal) as journal:
        run = _run_source if job.role == "source" else _run_target
        return run(site, journal, job, cancelled)


def _run_source(site: Site, journal: Journal, job: Job, cancelled: threading.Event) -> int:
    handoff = SourceHandoff(site, journal, job, peer_of(site, journal, job.peer), cancelled)
    directory = site.handoff_root(job.handoff)
    try:
        report = handoff.run()
    except BaseException as error:
        log.exception("handoff %s", job.handoff)
        code = error.exit_code if isinstance(error, HaulierError) else HandoffFailed.exit_code
        outcome = "cancelled" if isinstance(error, Cancelled) else "failed"
        text = str(error) if isinstance(error, HaulierError) else f"{type(error).__name__}: {error}"
        undecided = record_of(journal.guest(job.guest)).state is State.GRANTED
        report = {**handoff.report, **_heading(job, site), "outcome": "undecided" if undecided else outcome}
        report |= {"error": text, "code": code}
        write_report(directory, report)
        if not undecided:
            journal.end_handoff(job.handoff, outcome, detail={"error": text, "code": code})
        return code
    write_report(directory, report)
    journal.end_handoff(job.handoff, "done", phase="done")
    return 0


def _run_target(site: Site, journal: Journal, job: Job, cancelled: threading.Event) -> int:
    handoff = TargetHandoff(site, journal, job, cancelled)
    outcome = handoff.run()
    write_report(site.handoff_root(job.handoff), handoff.report())
    if outcome != "undecided":
        journal.end_handoff(job.handoff, outcome)
    return 0 if outcome == "done" else HandoffFailed.exit_code


def _heading(job: Job, site: Site) -> dict[str, Any]:
    return {"handoff": job.handoff, "guest": job.guest, "source": site.name, "target": job.peer}


if __name__ == "__main__":
    sys.exit(main())
