"""Drives a scheduler with real sources: what arrives is checked, kept and told to whoever waits.

Belongs to one event loop; the disk export has one for as long as its disk lacks chunks, `fetch` makes one for a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from haulier.errors import Corrupt, HaulierError
from haulier.fetch import wire
from haulier.fetch.scheduler import Ask, Hurry, Inquire, Probe, Scheduler, SourceFacts, Urgency
from haulier.fetch.source import Source

log = logging.getLogger(__name__)

TICK_S: Final = 0.05
IDLE_TICK_S: Final = 0.5


class Fetcher:
    """Fetches chunks into `keep(fp, chunk)`, which is called on a thread and must not return before others may read it.

    `start` on a running loop; then `want` and `get`; `close` ends it. A chunk that nobody holds stays wanted.
    """

    def __init__(self, sources: Sequence[Source], keep: Callable[[bytes, bytes], None]) -> None:
        self.scheduler = Scheduler()
        self._sources = {source.name: source for source in sources}
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fetched")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ticking: asyncio.Task[None] | None = None
        self._waiting: dict[bytes, list[asyncio.Future[None]]] = {}
        self._keeping: set[bytes] = set()
        self._turn: asyncio.Handle | None = None
        self.error: HaulierError | None = None
        """Why nothing more can be kept here (no room, say)."""
        self.why: dict[str, str] = {}
        """Why a source is not up."""
        self.on_kept: Callable[[bytes], None] = lambda fp: None
        self.on_not_kept: Callable[[bytes, HaulierError], None] = lambda fp, error: None
        """Told of a chunk that came and could not be kept: it is not wanted any more."""
        self.changed = asyncio.Event()
        for source in sources:
            self.scheduler.add_source(source.name, cost=source.cost, tells=source.tells)

    def start(self) -> None:
        """Connect to the sources."""
        loop = asyncio.get_running_loop()
        self._tasks = {name: loop.create_task(source.run(self)) for name, source in self._sources.items()}
        self._ticking = loop.create_task(self._tick())

    def add_source(self, source: Source) -> None:
        """One more source, from now on; nothing happens if there is one of that name."""
        if source.name not in self._sources:
            self._sources[source.name] = source
            self.scheduler.add_source(source.name, cost=source.cost, tells=source.tells)
            self._tasks[source.name] = asyncio.get_running_loop().create_task(source.run(self))

    async def close(self) -> None:
        """Let go of the sources; who waits is told with CancelledError."""
        tasks = [*self._tasks.values(), *([self._ticking] if self._ticking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for futures in self._waiting.values():
            for future in futures:
                future.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._pool.shutdown)

    # -- wishes

    def hint(self, held: Mapping[str, Iterable[bytes]]) -> None:
        """What sources are said to hold; sources that are not ours are passed over."""
        for name, fps in held.items():
            if name in self._sources:
                self.scheduler.hint(name, fps)

    def want(self, fingerprints: Iterable[bytes], urgency: Urgency) -> None:
        """Have these fetched."""
        self.scheduler.want(fingerprints, urgency, time.monotonic())
        self._soon()

    async def get(self, fp: bytes) -> None:
        """Wait until a chunk is kept, ahead of all that nobody waits for."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(fp, []).append(future)
        if fp not in self._keeping:
            self.want([fp], Urgency.DEMAND)
        try:
            await future
        finally:
            left = self._waiting.get(fp)
            if left is not None and future in left:
                left.remove(future)
                if not left:
                    del self._waiting[fp]

    def settle(self, fingerprints: Collection[bytes]) -> None:
        """These need not come any more: who waits for one is to look for it again."""
        self.scheduler.forget(fingerprints)
        for fp in fingerprints:
            for future in self._waiting.pop(fp, []):
                if not future.done():
                    future.set_result(None)

    def forget_background(self) -> None:
        """Fetch only what somebody waits for."""
        self.scheduler.forget_background()

    @property
    def left(self) -> int:
        """Chunks wanted and not kept yet."""
        return self.scheduler.wanted + len(self._keeping)

    def facts(self) -> list[SourceFacts]:
        return self.scheduler.sources()

    # -- what sources report

    def up(self, name: str, rtt: float) -> None:
        self.why.pop(name, None)
        self.scheduler.up(name, time.monotonic(), rtt)
        self._soon()

    def lost(self, name: str, why: str) -> None:
        if self.why.get(name) != why:
            log.info("source %s: %s", name, why)
        self.why[name] = why
        self.scheduler.lost(name, time.monotonic())
        self._soon()

    def pong(self, name: str, rtt: float) -> None:
        self.scheduler.pong(name, time.monotonic(), rtt)

    def holdings(self, name: str, held: Sequence[bytes], not_held: Sequence[bytes]) -> None:
        self.scheduler.holdings(name, held, not_held, time.monotonic())
        self._soon()

    def absent(self, name: str, fingerprints: Sequence[bytes]) -> None:
        self.scheduler.absent(name, fingerprints, time.monotonic())
        self._soon()

    def lied(self, name: str, why: str) -> None:
        log.error("source %s is not asked any more: %s", name, why)
        self.why[name] = why
        self.scheduler.lied(name, time.monotonic())
        task = self._tasks.get(name)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self._soon()

    def data(self, name: str, fp: bytes, codec: int, packed: bytes | memoryview, wire_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        if not self.scheduler.is_wanted(fp):
            self.scheduler.arrived(name, fp, wire_bytes, time.monotonic())
            return
        try:
            # On the loop: a tenth of a millisecond, and the wrong bytes must not count as an answer.
            chunk = wire.unpack(codec, packed, fp)
        except Corrupt as error:
            self.lied(name, str(error))
            return
        self.scheduler.arrived(name, fp, wire_bytes, time.monotonic())
        self._keeping.add(fp)
        kept = loop.run_in_executor(self._pool, self._keep, fp, chunk)
        kept.add_done_callback(lambda done: self._kept(fp, done))
        self._soon()

    def _kept(self, fp: bytes, done: asyncio.Future[None]) -> None:
        self._keeping.discard(fp)
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:
            self.error = error if isinstance(error, HaulierError) else HaulierError(f"a chunk cannot be kept: {error}")
            log.error("chunk %s cannot be kept: %s", fp[:6].hex(), error)
            self.on_not_kept(fp, self.error)
        else:
            self.on_kept(fp)
        for future in self._waiting.pop(fp, []):
            if not future.done():
                if self.error is not None and error is not None:
                    future.set_exception(self.error)
                else:
                    future.set_result(None)
        self.changed.set()

    # -- turns

    def _soon(self) -> None:
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._poll)

    def _poll(self) -> None:
        self._turn = None
        for request in self.scheduler.poll(time.monotonic()):
            source = self._sources[request.source]
            if isinstance(request, Ask):
                source.ask(request.fingerprints, request.urgent)
            elif isinstance(request, Hurry):
                source.hurry(request.fingerprints)
            elif isinstance(request, Inquire):
                source.inquire(request.fingerprints)
            elif isinstance(request, Probe):
                source.probe()

    async def _tick(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(TICK_S if self.scheduler.wanted else IDLE_TICK_S)
            self._soon()
