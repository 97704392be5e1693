"""`fetch`: bring chunks into a store from whatever sources there are. What other parts of haulier call."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.store import ChunkStore
from haulier.errors import Cancelled, PeerError
from haulier.fetch.fetcher import Fetcher
from haulier.fetch.scheduler import SourceFacts, Urgency
from haulier.fetch.source import Source

STALL_S: Final = 60.0
COMMIT_CHUNKS: Final = 1024


@dataclass(frozen=True)
class FetchReport:
    """`chunks` that came, `here` that were here already, wire `bytes`, `seconds`, and what each source gave."""

    chunks: int
    here: int
    bytes: int
    seconds: float
    sources: list[SourceFacts] = field(default_factory=list)


def fetch(
    fingerprints: Iterable[bytes],
    sources: Sequence[Source],
    store: ChunkStore,
    *,
    lease: str = "",
    urgency: Urgency = Urgency.BULK,
    hints: Mapping[str, Collection[bytes]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    on_kept: Callable[[bytes], None] | None = None,
    stall_s: float = STALL_S,
) -> FetchReport:
    """Bring those of `fingerprints` that `store` lacks into it, from several sources at once; durable on return.

    The order of `fingerprints` is the order of asking. `lease` keeps what came (without one, it is kept as long as
    `store` is open, or a manifest refers to it); `progress(done, wanted)` counts chunks; `on_kept(fp)` is told of each
    chunk once it can be read here. Blocking; not to be called on an event loop.

    Raises PeerError when nothing came for `stall_s` seconds and some are still missing (what came is kept), Cancelled
    when `cancelled()` says so, NoRoom when the store is full.
    """
    wanted = [fp for fp in dict.fromkeys(fingerprints) if fp != ZERO]
    missing = store.missing(wanted, lease)
    call = _Call(missing, sources, store, lease, urgency, hints or {}, progress, cancelled, on_kept, stall_s)
    began = time.monotonic()
    try:
        if missing:
            asyncio.run(call.run())
    finally:
        store.commit()
    facts = call.facts
    return FetchReport(
        len(missing), len(wanted) - len(missing), sum(s.bytes for s in facts), time.monotonic() - began, facts
    )


class _Call:
    def __init__(
        self,
        missing: list[bytes],
        sources: Sequence[Source],
        store: ChunkStore,
        lease: str,
        urgency: Urgency,
        hints: Mapping[str, Collection[bytes]],
        progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool],
        on_kept: Callable[[bytes], None] | None,
        stall_s: float,
    ) -> None:
        self._missing = missing
        self._sources = sources
        self._store = store
        self._lease = lease
        self._urgency = urgency
        self._hints = hints
        self._progress = progress
        self._cancelled = cancelled
        self._on_kept = on_kept
        self._stall_s = stall_s
        self._uncommitted = 0
        self.facts: list[SourceFacts] = []

    def _keep(self, fp: bytes, chunk: bytes) -> None:
        self._store.put(chunk, fp, self._lease)
        self._uncommitted += 1
        if self._uncommitted >= COMMIT_CHUNKS:
            self._uncommitted = 0
            self._store.commit()

    async def run(self) -> None:
        fetcher = Fetcher(self._sources, self._keep)
        if self._on_kept is not None:
            fetcher.on_kept = self._on_kept
        fetcher.hint(self._hints)
        fetcher.want(self._missing, self._urgency)
        fetcher.start()
        left, heard = fetcher.left, time.monotonic()
        try:
            while fetcher.left:
                fetcher.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(fetcher.changed.wait(), 0.2)
                if fetcher.error is not None:
                    raise fetcher.error
                if fetcher.left < left:
                    left, heard = fetcher.left, time.monotonic()
                    if self._progress is not None:
                        self._progress(len(self._missing) - left, len(self._missing))
                if self._cancelled():
                    raise Cancelled(f"fetching of {len(self._missing)} chunks cancelled with {left} to go")
                if time.monotonic() - heard > self._stall_s:
                    raise PeerError(self._stalled(fetcher, left))
        finally:
            self.facts = fetcher.facts()
            await fetcher.close()
            # asyncio closes a TLS connection some turns after it was told to.
            await asyncio.sleep(0.02)

    def _stalled(self, fetcher: Fetcher, left: int) -> str:
        why = "; ".join(f"{name}: {text}" for name, text in fetcher.why.items()) or "none of them holds them"
        names = ", ".join(source.name for source in self._sources) or "no source is known"
        return f"{left} chunks came from nowhere for {self._stall_s:.0f} s (asked: {names}; {why[:500]})"
