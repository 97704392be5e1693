"""A handoff worker: one process a side for each handoff. Its death is a failed handoff, never a lost guest.

``python -m haulier.handoff.worker`` waits for ``HANDOFF TAB ROOT`` on its standard input, and ends if that closes
first; all else stands in the handoff's job.json. ``--ready``: it will wait long, and keeps a disk export ready too.
SIGTERM and SIGINT cancel. SIGUSR1 says that the other site's worker is gone, by the word of its agent.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.disks.export import waiting_export
from haulier.errors import UNDECODABLE, Cancelled, Conflict, Corrupt, HandoffFailed, HaulierError, PeerError
from haulier.handoff.container_source import ContainerSource
from haulier.handoff.container_target import ContainerTarget
from haulier.handoff.custody import record_of
from haulier.handoff.footprint import be_lean
from haulier.handoff.journal import Journal
from haulier.handoff.messages import Accept, Job, Offer, Resumption
from haulier.handoff.ownership import State
from haulier.handoff.prefetch import PrefetchSource, PrefetchTarget
from haulier.handoff.progress import write_report
from haulier.handoff.recovery import LEFT_ALONE
from haulier.handoff.residence import spec_of
from haulier.handoff.resuming import ResumeSource, ResumeTarget
from haulier.handoff.source import SourceHandoff
from haulier.handoff.spawning import (
    PREFETCH_SOURCE,
    PREFETCH_TARGET,
    RESUME_SOURCE,
    RESUME_TARGET,
    accept,
    spawn,
    start_source,
)
from haulier.handoff.target import TargetHandoff
from haulier.handoff.vm_source import VmSource
from haulier.handoff.vm_target import VmTarget
from haulier.session import Handed

__all__ = ["AgentPeer", "accept", "main", "peer_of", "spawn", "start_source"]

log = logging.getLogger("haulier.handoff")
LEFT_TO_AGENTS: Final = frozenset({State.OFFERED, State.GRANTED, State.SERVING, State.AWAY})
"""States in which a source's worker must not end: recovery brings what it could not to its end, as if it had died."""


class AgentPeer:
    """The other site's agent, as the workers and recovery talk to it."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def offer(self, offer: Offer) -> Accept:
        return self._accept(self._client.offer(msgspec.to_builtins(offer)))

    def offer_on(self, offer: Offer) -> tuple[Accept, Handed | None]:
        """As `offer`; with the connection that it went over, if the session begins on it."""
        answer, handed = self._client.offer_on(msgspec.to_builtins(offer))
        return self._accept(answer), handed

    def prefetch(self, offer: Offer) -> Accept:
        """As `offer`, for a prefetch."""
        return self._accept(self._client.post("/v1/peer/prefetches", msgspec.to_builtins(offer)))

    def resume(self, request: Resumption) -> Accept:
        """New workers are to go on with a post-copy."""
        return self._accept(self._client.resume(msgspec.to_builtins(request)))

    def _accept(self, answer: dict[str, Any]) -> Accept:
        try:
            return msgspec.convert(answer, Accept)
        except msgspec.ValidationError as error:
            raise PeerError(f"{self._client.where} answered an offer in a way that makes no sense: {error}") from None

    def own(self, guest: str, event: str, epoch: int, handoff: str = "") -> list[tuple[str, int]]:
        answer = self._client.ownership(guest, event, epoch, handoff)
        try:
            return msgspec.convert(answer.get("messages", []), list[tuple[str, int]])
        except msgspec.ValidationError as error:
            raise PeerError(f"{self._client.where} answered nonsense about ownership: {error}") from None


def peer_of(site: Site, journal: Journal, name: str) -> AgentPeer:
    return AgentPeer(Client.peer(site, journal.site(name)))


# -- the worker itself --------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="haulier.handoff.worker")
    parser.add_argument("--ready", action="store_true")
    options = parser.parse_args(arguments)
    be_lean()
    waiting = waiting_export() if options.ready else None
    handoff, _, root = sys.stdin.readline().rstrip("\n").partition("\t")
    if not root:
        if waiting is not None:
            waiting.communicate()
        return 0
    site = Site.load(root)
    directory = site.handoff_root(handoff)
    _log_to(directory / "worker.log")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.error("handoff %s has a worker already", handoff)
        return Conflict.exit_code
    cancelled = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: cancelled.set())
    try:
        job = msgspec.json.decode((directory / "job.json").read_bytes(), type=Job)
    except UNDECODABLE as error:
        raise Corrupt(f"{directory / 'job.json'} makes no sense ({error}): start the handoff again") from None
    with Journal(site.journal) as journal:
        if job.role == "target" and spec_of(journal.guest(job.guest)).container is None:
            return _run_target(VmTarget(site, journal, job, cancelled, waiting))
        if waiting is not None:
            waiting.communicate()
        if job.role in ("source", PREFETCH_SOURCE, RESUME_SOURCE):
            return _run_source(site, journal, job, cancelled)
        kind: type[TargetHandoff] = PrefetchTarget if job.role == PREFETCH_TARGET else ContainerTarget
        if job.role == RESUME_TARGET:
            kind = ResumeTarget
        return _run_target(kind(site, journal, job, cancelled))


def _log_to(path: Path) -> None:
    with path.open("ab") as output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def _run_source(site: Site, journal: Journal, job: Job, cancelled: threading.Event) -> int:
    kind: type[SourceHandoff] = VmSource
    if job.role == PREFETCH_SOURCE:
        kind = PrefetchSource
    elif spec_of(journal.guest(job.guest)).container is not None:
        kind = ContainerSource
    peer = peer_of(site, journal, job.peer)
    handoff: SourceHandoff | ResumeSource
    if job.role == RESUME_SOURCE:
        handoff = ResumeSource(site, journal, job, peer)
    else:
        handoff = kind(site, journal, job, peer, cancelled)
    signal.signal(LEFT_ALONE, lambda *_: handoff.left_alone.set())
    directory = site.handoff_root(job.handoff)
    try:
        report = handoff.run()
    except BaseException as error:
        log.exception("handoff %s", job.handoff)
        code = error.exit_code if isinstance(error, HaulierError) else HandoffFailed.exit_code
        outcome = "cancelled" if isinstance(error, Cancelled) else "failed"
        text = str(error) if isinstance(error, HaulierError) else f"{type(error).__name__}: {error}"
        state = record_of(journal.guest(job.guest)).state
        undecided = job.role in ("source", RESUME_SOURCE) and state in LEFT_TO_AGENTS
        report = {**handoff.report, **_heading(job, site), "outcome": "undecided" if undecided else outcome}
        report |= {"error": text, "code": code}
        write_report(directory, report)
        detail = {**journal.handoff(job.handoff).detail, "error": text, "code": code}
        if not undecided:
            journal.end_handoff(job.handoff, outcome, detail=detail)
        elif state is State.OFFERED:
            journal.update_handoff(job.handoff, detail=detail)
        return code
    write_report(directory, report)
    journal.end_handoff(job.handoff, "done", phase="done")
    return 0


def _run_target(handoff: TargetHandoff) -> int:
    signal.signal(LEFT_ALONE, lambda *_: handoff.left_alone.set())
    site, journal, job = handoff.site, handoff.journal, handoff.job
    outcome = handoff.run()
    write_report(site.handoff_root(job.handoff), handoff.report())
    if outcome != "undecided":
        journal.end_handoff(job.handoff, outcome)
    return 0 if outcome == "done" else HandoffFailed.exit_code


def _heading(job: Job, site: Site) -> dict[str, Any]:
    return {"handoff": job.handoff, "guest": job.guest, "source": site.name, "target": job.peer}


if __name__ == "__main__":
    sys.exit(main())
