"""The source's side of a handoff: drives all phases, and is the one who passes the token."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from haulier import priority
from haulier.agent.client import Client
from haulier.agent.site import Site
from haulier.chunks.blocks import StoreBlockFinder
from haulier.chunks.store import ChunkStore
from haulier.compress.stream import level_for
from haulier.disks.rounds import Round
from haulier.disks.sending import RoundReport
from haulier.disks.transfer import DiskSender
from haulier.disks.wire import DELTA
from haulier.errors import Cancelled, Corrupt, HandoffFailed, HaulierError, PeerError
from haulier.handoff import clients, foretold, readdressing, retained
from haulier.handoff.control import Control, failure
from haulier.handoff.convergence import (
    RecentMost,
    Window,
    window,
)
from haulier.handoff.figures import by_layer, times
from haulier.handoff.journal import Journal
from haulier.handoff.messages import (
    Accept,
    AnyMessage,
    Arrived,
    Base,
    BaseReady,
    Channel,
    Finish,
    Job,
    MemoryReady,
    Offer,
    Own,
    Running,
    Status,
    Stretched,
)
from haulier.handoff.offering import connect, make_offer, open_waypoints
from haulier.handoff.ownership import Event, State
from haulier.handoff.preparing import Preparation, foreseeable
from haulier.handoff.progress import Progress
from haulier.handoff.residence import incoming_name, lease_of, pin_name, retire, spec_of
from haulier.handoff.token import RESTART_S, OwnPeer, Token
from haulier.images.layers import LAYERS, split_of
from haulier.memory.mirror import Mirror
from haulier.network import paths as networks
from haulier.session import Handed, PathAddress, Session
from haulier.without import DISK_FIRST, RECIPES, without

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _anyhow(what: str) -> Iterator[None]:
    """Goes on where this fails: what follows matters more."""
    try:
        yield
    except Exception:
        log.exception("failed to %s", what)


CONNECT_S = 60.0
PROBE_BYTES = 96 * 1024
SMALL_DISK = 500_000
DISK_CHUNK_WIRE = 20_000
"""Wire bytes of a changed chunk, more or less."""


class Peer(OwnPeer, Protocol):
    """The target's agent, as far as a worker talks to it."""

    def offer(self, offer: Offer) -> Accept: ...
    def offer_on(self, offer: Offer) -> tuple[Accept, Handed | None]: ...
    def prefetch(self, offer: Offer) -> Accept: ...


class SourceHandoff(ABC):
    """One handoff at its source. `run` returns the report; raises what went wrong, with the guest running here."""

    _probe_bytes = PROBE_BYTES
    _clocks = 4
    """How often the clocks are compared."""
    _streams = False
    """Memory comes as QEMU's stream: what sends it can be made ready before the target has answered."""

    _begins_on_offer = False
    """There is often little to say: the session begins on the connection of the offer, which saves a handshake."""
    _handed: Handed | None = None

    def __init__(self, site: Site, journal: Journal, job: Job, peer: Peer, cancelled: threading.Event) -> None:
        self.site, self.journal, self.job, self.peer = site, journal, job, peer
        self.row = journal.guest(job.guest)
        self.spec = spec_of(self.row)
        self.directory: Path = site.handoff_root(job.handoff)
        self.progress = Progress(
            self.directory,
            Status(handoff=job.handoff, role="source", guest=job.guest, source=site.name, target=job.peer),
        )
        self.report: dict[str, Any] = {}
        self._cancelled = cancelled
        self._store = ChunkStore(site.store)
        self._session: Session | None = None
        self._control: Control | None = None
        self._preparation: Preparation | None = None
        self._sender: DiskSender | None = None
        self._ending = False
        self._rate = 0.0
        self._rates = RecentMost()
        self._forecast: dict[str, Any] | None = None
        self._disk_rounds: list[dict[str, Any]] = []
        self._timeline: list[dict[str, Any]] = []
        self._marks: dict[str, float] = {}
        self._began = time.monotonic()
        self._arrived: Arrived
        self._over = threading.Event()
        self._transport = job.options.transport or site.transport or "striping"
        self._host_network = contextlib.ExitStack()
        self._spender: networks.Spender | None = None
        self._joining: readdressing.Joining | None = None
        self.left_alone = threading.Event()
        """The other site's worker is gone, by the word of its agent: set from outside."""
        self._token = Token(journal, job, site.name, peer, self.left_alone)

    # -- the whole of it -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Hands the guest over. On any failure before the token the guest runs on here and nothing is left behind."""
        self._adopt()
        try:
            self._hand_over()
        except BaseException as error:
            if self._token.passed:
                raise
            self._back_out(error)
            raise
        finally:
            self._close()
        return self.report

    def _hand_over(self) -> None:
        self._marks["begin"], self._began = time.time(), time.monotonic()
        self._watching()
        self._preflight()
        offer, accept = self._offer()
        with ThreadPoolExecutor(1, thread_name_prefix="begin-rounds") as pool:
            begun = pool.submit(self._begin_rounds) if accept.complete else None
            self._connect(offer, accept)
            self._settle(accept)
        first = begun.result() if begun is not None else None
        sender = self._make_sender(accept)
        small = first is not None and len(first.dirty) * DISK_CHUNK_WIRE < SMALL_DISK
        early = small or (first is not None and without(DISK_FIRST))
        if early:
            # All at once: pages that would equal blocks of so small a disk cost less than the wait for it.
            self._start_memory(accept)
        self._first_disk(sender, first)
        if not early:
            self._start_memory(accept)
        assert self._control is not None
        self._control.wait(MemoryReady, 90)
        self.progress.phase("memory", "sending memory while the guest runs")
        self._foretell(accept)
        self._converge()
        self._switch_over()
        self._before_token()
        self._pass_token()
        self._finish()

    def _before_token(self) -> None:  # noqa: B027 - a place to look, mostly nobody does
        """Both sites are stopped and whole here, and the guest is still this site's: a place to look at both."""

    def _check(self) -> None:
        """Raises whatever stands against going on."""
        if self._cancelled.is_set() and not self._token.granted:
            raise Cancelled(f"handoff of {self.job.guest!r} cancelled; the guest runs on at site {self.site.name!r}")
        if self.left_alone.is_set() and not self._token.granted:
            raise HandoffFailed(
                f"the worker at site {self.job.peer!r} is gone; guest {self.job.guest!r} runs on at "
                f"{self.site.name!r}: see the worker's log there"
            )
        deadline = self.job.options.deadline_s
        if deadline and not self._token.granted and time.monotonic() - self._began > deadline:
            raise HandoffFailed(
                f"guest {self.job.guest!r} was not at site {self.job.peer!r} within {deadline:g} s; it runs on at "
                f"{self.site.name!r}: allow more time, or let it write less"
            )

    def _observe(self) -> None:
        session = self._session
        if session is None:
            return
        sent, received = session.wire_bytes()
        status = self.progress.status
        status.wire_bytes = sent + received
        status.rate_bps = self._rate = self._rates.add(time.monotonic(), session.rate_bps())
        status.rtt_s = session.rtt_s()
        status.paths = [msgspec.to_builtins(path) for path in session.paths()]
        status.transport = session.transport()
        if self._spender is not None:
            now = time.monotonic()
            session.may_spend(self._spender.look(now, now - self._began, status.eta_s))
        if self._sender is not None:
            status.layers = {name: asdict(layer) for name, layer in list(self._sender.layers.items())}

    def _watching(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        """Runs beside the engine: keeps the status fresh, and wakes a disk sender that waits when all is over."""
        while not self._over.wait(0.2):
            try:
                self._observe()
                self.progress.write()
                error: HaulierError | None = None
                try:
                    self._check()
                    if self._session is not None:
                        error = self._session.error
                    if error is None and self._control is not None:
                        error = self._control.failed
                except HaulierError as found:
                    error = found
                if error is not None and self._sender is not None:
                    self._sender.fail(error)
            except Exception:
                log.exception("the watch over handoff %s", self.job.handoff)

    # -- what differs by the kind of guest ---------------------------------------------------------------------------

    @abstractmethod
    def _adopt(self) -> None:
        """Finds what runs here."""

    @abstractmethod
    def _accelerator(self) -> str:
        """What the guest runs under, or nothing."""

    def _host(self) -> dict[str, str]:
        """What the target has to know of this host; nothing where QEMU stands between."""
        return {}

    @abstractmethod
    def _preflight(self) -> None:
        """Raises what stands against moving it, before anything is sent."""

    @abstractmethod
    def _begin_rounds(self) -> Round | None:
        """From here on the guest is touched: what it writes is noted."""

    @abstractmethod
    def _first_disk(self, sender: DiskSender, first: Round | None) -> None:
        """The layers that the target lacks, then rounds of what was written, until they are small."""

    @abstractmethod
    def _start_memory(self, accept: Accept) -> None:
        """From here on memory travels."""

    @abstractmethod
    def _converge(self) -> None:
        """Rounds until the switchover is due."""

    @abstractmethod
    def _switch_over(self) -> None:
        """The guest is stopped; the last of it, and the target's word that everything is there."""

    @abstractmethod
    def _finish(self) -> None:
        """The guest runs at the target: keeps what serves the way back, clears away the rest, writes the report."""

    @abstractmethod
    def _resume(self) -> None:
        """Makes the guest run on, whatever was being done with it."""

    def _drain(self) -> None:  # noqa: B027 - not all kinds have an attempt to keep
        """What is on its way arrives first, where the next attempt then need not send it again."""

    def _keep_attempt(self, error: BaseException | None, kind: str = "cut") -> None:
        """The next attempt starts from what this one has sent, where that can be."""
        self.site.mirror(self.job.handoff).unlink(missing_ok=True)

    @abstractmethod
    def _drop_memory(self) -> None:
        """Lets go of what was made for sending memory."""

    @abstractmethod
    def _let_go(self) -> None:
        """The end of this worker, however it came."""

    # -- offer and connection --------------------------------------------------------------------------------------

    def _offer(self) -> tuple[Offer, Accept]:
        self._epoch = self._token.begin()
        offer = self._prepare(self._epoch)
        first = foreseeable(offer.memory_bases, offer.golden)
        if first is not None and self._streams:
            assert self._preparation is not None
            self._preparation.foresee(first)
        # Where paths have prices or limits, the session keeps to them from its first byte.
        if not self._begins_on_offer or self._transport != "striping" or self.site.paths:
            return offer, self.peer.offer(offer)
        accept, self._handed = self.peer.offer_on(offer)
        return offer, accept

    def _prepare(self, epoch: int) -> Offer:
        """The offer; what both sites hold is indexed from here on, while the target looks at it."""
        manifest = self._manifest = self._store.load_manifest(self.row.manifest)
        worth = self._worth_indexing if self.spec.container is not None else None
        self._preparation = Preparation(self.site, self._store, self.job.handoff, self.spec, manifest, worth)
        offer = make_offer(self.site, self._store, self.job, self.row, manifest, epoch)
        options = msgspec.structs.replace(self.job.options, transport=self._transport)
        return msgspec.structs.replace(offer, accelerator=self._accelerator(), host=self._host(), options=options)

    def _worth_indexing(self) -> set[bytes]:
        """Chunks whose blocks memory may have as well, where the target has them all; of others there is no use."""
        return set()

    def _settle(self, accept: Accept) -> None:
        assert self._preparation is not None
        self._preparation.settle(accept, memory=self._streams)

    @property
    def _finder(self) -> StoreBlockFinder:
        assert self._preparation is not None
        return self._preparation.finder

    def _connect(self, offer: Offer, accept: Accept) -> None:
        retained.check_named(accept.memory_base, offer.memory_bases, self.job.peer)
        self.progress.status.memory_base = accept.memory_base
        self.progress.phase("connect", f"connecting to {self.job.peer}")
        options, waypoints = self.job.options, list[PathAddress]()
        if options.through:
            others = {name: Client.peer(self.site, self.journal.site(name)) for name in options.through}
            waypoints, missing = open_waypoints(others, offer, self.job.peer, accept.port, self._host_network)
            self.report["waypoints"] = {name: missing.get(name, "") for name in options.through}
        session, ways = connect(
            self.site, self.job.peer, offer, accept, self._host_network, self._handed, waypoints=waypoints
        )
        self._session = session
        self._spender = networks.Spender(options.paths, options.deadline_s, [way.rule.cost for way in ways])
        session.may_spend(self._spender.cost)
        self._control = Control(session, self.job.peer, self._check)
        self._control.wait_connected(CONNECT_S)
        if self._handed is None:
            self._control.compare_clocks(self._clocks)
        else:
            self._control.clock_offset = self._handed.clock_offset
        self._stretch(ways[0].there)
        self._join_clients(ways[0].there, accept.site_address)
        # Learns the link's rate while the disk is looked at; at 10 Mbps it is through in 80 ms.
        for _ in range(4 if self._probe_bytes else 0):
            session.send(Channel.PROBE, os.urandom(self._probe_bytes // 4))
        if not accept.manifest:
            # There QEMU reads the disk's first sector when it starts; otherwise it has begun to start by now.
            self._control.send(Base(self._manifest.encode()))
            self._control.wait(BaseReady, 120)
        self._observe()

    def _stretch(self, there: str) -> None:
        """A guest that keeps its address: the tunnel, before anything of it is needed."""
        assert self._control is not None
        news = clients.stretch(self.site, self.spec, self.job.handoff, self.job.peer, there)
        if news is None:
            return
        self._control.send(news)
        error = self._control.wait(Stretched, 30).error
        if error:
            raise HandoffFailed(
                f"the address of guest {self.job.guest!r} cannot be kept: site {self.job.peer!r} can make no tunnel "
                f"({error}); see 'haulier doctor --network' there"
            )

    def _join_clients(self, there: str, address: str) -> None:
        """Clients join the address that the guest will have there, ahead of its move or when it has arrived."""
        if self.spec.net == "mptcp" and address:
            assert self._control is not None
            self._joining = readdressing.Joining(self.site, self.journal, self.job, self._control, there, address)

    def _make_sender(self, accept: Accept) -> DiskSender:
        session = self._session
        assert session is not None
        self.progress.phase("disk", "sending the base and application layers that the target lacks")
        self._store.add_lease(lease_of(self.job.handoff))
        finder = self._finder
        self._split = split_of(self._store, self.spec.image, self.spec.golden, self.spec.uuid)
        sender = self._sender = DiskSender(
            self._store,
            self._manifest,
            finder.space,
            finder.index,
            # A commit follows what it makes durable.
            lambda data: session.send(Channel.DISK, data, more=data[0] == DELTA),
            lease_of(self.job.handoff),
            level=level_for(self._rate),
            layer_of=self._split.of,
            order=LAYERS,
            recipes=not without(RECIPES),
        )
        # What the target turns out to lack is hidden there.
        finder.index = sender.index
        session.on(Channel.DISK, sender.handle)
        return sender

    def _note_disk_round(self, sent: RoundReport, began: float, **facts: int) -> dict[str, Any]:
        """What the report says of a disk round that began at `began`, seconds of this host's clock, and has ended."""
        entry = facts | {
            "chunks": sent.chunks_dirty - sent.chunks_unchanged - sent.chunks_zero,
            "wire_bytes": sent.wire_bytes,
            "seconds": round(time.time() - began, 4),
            "at": round(began - self._marks["begin"], 4),
        }
        self._disk_rounds.append(entry)
        return entry

    def _foretell(self, accept: Accept) -> None:
        """The forecast of this handoff: the operator's plan, or a small sample while the target prepares itself."""
        self._forecast = foretold.planned(self.site, self.job)

    def _window(self, first_pass: bool = False, may_end: bool = False) -> Window:
        assert self._session is not None
        return window(self._rate or 10e6, self._session.rtt_s(), self._ending or may_end, first_pass)

    # -- the token and the end ---------------------------------------------------------------------------------------

    def _trust(self, arrived: Arrived, raw_bytes: int, stream_digest: bytes) -> None:
        """Nothing unverified runs: epoch, stream and manifest are the same there. Corrupt if not."""
        assert self._sender is not None
        where = f"at site {self.job.peer!r}"
        if arrived.epoch != self._epoch:
            raise Corrupt(f"site {self.job.peer!r} votes for epoch {arrived.epoch}, not {self._epoch}: try again")
        if arrived.raw_bytes != raw_bytes or arrived.stream_digest != stream_digest:
            raise Corrupt(
                f"memory arrived wrong {where} ({arrived.raw_bytes} of {raw_bytes} bytes): nothing was lost here; "
                "try again"
            )
        if arrived.manifest != self._sender.manifest.digest:
            raise Corrupt(f"the disk arrived wrong {where}: nothing was lost here; try again")

    def _pass_token(self) -> None:
        assert self._control is not None
        self._check()
        # Its vote has been counted; heard later, it would ask for the token once more.
        self._control.drop(Own(Event.READY.value, self._epoch))
        self._token.grant(self._control)
        self._marks["token"] = time.time()
        self._granted()
        with _anyhow("note that the guest has left"):
            clients.left(self.site, self.job.guest)
        self._token.settle(self._control, self._runs, self._hears)

    def _granted(self) -> None:
        """The token is on its way: what is still to be done here for the guest there."""
        with _anyhow("say that the token is on its way"):
            self.progress.phase("token", "the guest is the target's")

    def _hears(self, message: AnyMessage) -> None:  # noqa: B027 - most kinds hear nothing then
        """What else the target's worker says until it has taken the guest."""

    def _runs(self, at: float) -> None:
        """The target's worker said when the guest ran there, seconds of this host's clock."""
        self._marks["running"] = at

    def _say_finish(self, places: bytes = b"") -> str:
        """Lets the target's worker end; the id of the picture of memory that both keep, "" for none."""
        assert self._control is not None
        if "running" not in self._marks:
            with contextlib.suppress(HaulierError):
                self._runs(self._control.wait(Running, 3).at - self._control.clock_offset)
        self._observe()
        digest = self._arrived.stream_digest
        name = retained.memory_id(self.spec.uuid, self._epoch, digest) if digest else ""
        with contextlib.suppress(PeerError):
            self._control.send(Finish(name, places))
        self.progress.phase("finish", "clearing away")
        # What is left to do is of no use to the guest, which may share this host's processors with its clients' way.
        priority.behind()
        return name

    def _left(self, picture: str, mirror: Mirror | Path, beside: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Keeps the picture of memory (and what goes with a container's), and takes away what ran here."""
        assert self._sender is not None
        meta = retained.Retained(
            id=picture,
            guest=self.spec.name,
            uuid=self.spec.uuid,
            epoch=self._epoch,
            manifest=self._sender.manifest.digest.hex(),
        )
        if picture:
            with _anyhow("keep the picture for the way back, which will send all of it"):
                retained.keep(self.site, meta, mirror, beside)
        if not self._is_away():
            return  # it came back meanwhile, and what is here is the guest itself
        retire(self.site, self.spec.name, self.job.handoff)
        if self._joining is not None:
            self._joining.wait()
        clients.gone(self.site, self.spec.name)
        self.journal.advance(self.spec.name, "away", "away", manifest="")

    def _is_away(self) -> bool:
        row = self.journal.guest(self.spec.name)
        return row.state == State.AWAY and row.handoff == self.job.handoff

    def _told(self, done: float, marks: Sequence[str], state_bytes: int) -> dict[str, Any]:
        """What the report says of a handoff that is done, whatever moved."""
        assert self._control is not None and self._session is not None and self._sender is not None
        return {
            "handoff": self.job.handoff,
            "guest": self.spec.name,
            "source": self.site.name,
            "target": self.job.peer,
            "epoch": self._epoch,
            "outcome": "done",
            **times(self._marks, done, float(self.report.get("check", {}).get("seconds", 0.0)), marks),
            "clock_offset_s": self._control.clock_offset,
            "wire": self._wire(),
            "rate_bps": self._rate,
            "rtt_s": self._session.rtt_s(),
            "timeline": self._timeline,
            "disk": {"rounds": self._disk_rounds, "origin": self._sender.counters.as_dict()},
            "layers": by_layer(self._split, self._sender, state_bytes),
        }

    def _wire(self) -> dict[str, Any]:
        """Bytes between the two workers, and what each path had a part in it."""
        assert self._session is not None
        sent, received = self._session.wire_bytes()
        status = self.progress.status
        payload = self._session.payload_bytes()
        channels = {channel.name.lower(): payload[channel] for channel in Channel if payload[channel]}
        found = {"sent": sent, "received": received, "channels": channels}
        return found | {"transport": status.transport, "paths": status.paths}

    def _back_out(self, error: BaseException) -> None:
        """Before the token, or after a refusal: the guest runs on here, and nothing is left behind."""
        log.warning("handoff %s of %s: %s", self.job.handoff, self.job.guest, error)
        # What is only to be told must not keep the guest from running on, on a full disk for example.
        with _anyhow("say that the handoff backs out"):
            self.progress.phase("back out", str(error))
        with _anyhow("say that the guest's clients stay"):
            clients.stayed(self.site, self.job.guest)
        try:
            self._resume()
        except (HaulierError, OSError) as why:
            # The record says still that a handoff is under way, so the agent goes on with backing out.
            text = f"{error}; and guest {self.job.guest!r} does not run on yet ({why}): the agent goes on trying"
            raise HandoffFailed(text) from error
        if self._joining is not None:
            with _anyhow("have the guest give up the address that it was to have"):
                self._joining.call_off()
        if isinstance(error, Cancelled):
            self._drain()
        if self._token.epoch and not self._token.refused:
            if self._control is not None:
                with contextlib.suppress(HaulierError):
                    self._control.send(failure(error))
            self._token.call_off(self._control)
            if self._session is not None:
                self._session.close(linger_s=3)
            # Where there is no session the agent may have the offer, and not have been able to say so.
            unheard = self._token.tell_agent(0.0 if self._session is not None else RESTART_S)
            if unheard:
                log.info("site %s is not told that handoff %s is off: %s", self.job.peer, self.job.handoff, unheard)
        self._drop_memory()
        if self._preparation is not None:
            self._preparation.close()
        self._keep_attempt(error)
        with contextlib.suppress(HaulierError):
            self._store.drop_manifest(incoming_name(self.job.handoff))
        with contextlib.suppress(HaulierError):
            self._store.drop_manifest(pin_name(self.spec.name, self.job.handoff))
        self._store.drop_lease(lease_of(self.job.handoff))

    def _close(self) -> None:
        self._over.set()
        self.progress.finish()
        self.report["phases"] = self.progress.phases
        if self._session is not None:
            self._session.close(linger_s=3)
        elif self._handed is not None:
            self._handed.close()
        self._host_network.close()
        if self._preparation is not None:
            self._preparation.close()
        self._let_go()
        self._store.close()
        self.progress.write(force=True)
