"""What a disk export does about chunks that are not here: fetch them, those that the guest reads first.

A chunk that is read and missing is fetched at once, from whoever is nearest. In the background follows the rest: what
was read most often before, then in the order of the disk; and the neighbours of whatever is being read go before that.
While the guest waits for something the background keeps to a quarter of the link.

`haulier.fetch` is imported only where something is missing: it costs a quarter of a second, and most disks are whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.disks.heat import Heat
from haulier.errors import HaulierError
from haulier.units import CHUNK

if TYPE_CHECKING:
    from haulier.fetch.fetcher import Fetcher
    from haulier.fetch.source import Source

log = logging.getLogger(__name__)

NEIGHBOURS: Final = 8
EASE_S: Final = 0.3
COMMIT_S: Final = 1.0
AGAIN_S: Final = 5.0
"""After so long it is tried again to keep what could not be kept."""
SOURCES_S: Final = 30.0


class Mode(enum.Enum):
    """How chunks that nobody waits for are fetched."""

    OFF = "off"
    """Not at all: only what is read."""
    BACKGROUND = "background"
    """As much as leaves the guest alone."""
    FULL = "full"
    """As fast as it goes."""


class Filler:
    """Belongs to one export and its event loop. `sources` tells who can be asked; it may read files."""

    def __init__(
        self,
        store: ChunkStore,
        heat: Heat,
        sources: Callable[[], list[Source]],
        mode: Mode,
        hints: Callable[[Sequence[bytes]], Mapping[str, Collection[bytes]]] = lambda fps: {},
    ) -> None:
        self._hints = hints
        self._store = store
        self._heat = heat
        self._make_sources = sources
        self._manifest: Manifest | None = None
        self._arriving = False
        self._name = ""
        self._places: dict[bytes, int] = {}
        self._missing: set[bytes] = set()
        self._fetcher: Fetcher | None = None
        self._starting: asyncio.Future[Fetcher] | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._uncommitted = False
        self._looked = 0.0
        self._again_at: float | None = None
        self._error = ""
        self._awaited: Counter[bytes] = Counter()
        """What somebody waits for now, and how many."""
        self.mode = mode
        self.fetched = 0
        """Chunks fetched since the start, and ..."""
        self.demanded = 0
        """... those that were read when they were not here."""
        self.unserved: set[bytes] = set()
        """What somebody read, was refused in the end, and has not come yet."""

    # -- what is missing

    async def follow(self, name: str, manifest: Manifest) -> None:
        """This is the disk from now on. What it lacks is fetched as the mode says."""
        loop = asyncio.get_running_loop()
        self._name, self._manifest, self._arriving, self._places = name, manifest, False, {}
        missing: list[bytes] = []
        if not await loop.run_in_executor(None, self._store.is_complete, name):
            missing = await loop.run_in_executor(None, self._store.missing, manifest.unique())
        if self._manifest is manifest:  # and no other has taken its place meanwhile
            self._lacks(missing)

    def arriving(self, name: str, manifest: Manifest) -> None:
        """This is the disk from now on, and still arriving: only what is read before it has come is fetched."""
        self._name, self._manifest, self._arriving, self._places = name, manifest, True, {}
        self._missing = self._asked()

    def _lacks(self, missing: Iterable[bytes]) -> None:
        self._missing = self._asked().union(missing)
        if not self._missing or self._manifest is None:
            return
        # Where each is first used.
        self._places = {}
        for index, fp in enumerate(self._manifest.chunks()):
            if fp in self._missing:
                self._places.setdefault(fp, index)
        self._arrange()
        self.set_mode(self.mode)

    def _asked(self) -> set[bytes]:
        return self.unserved.union(self._awaited)

    def _busy(self) -> bool:
        return bool(self._missing or self.unserved or self._awaited or self._uncommitted)

    def _arrange(self) -> None:
        if self._tidying is None:
            self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    def set_mode(self, mode: Mode) -> None:
        """Fetch in the background from now on, or no more."""
        self.mode = mode
        if not self._missing:
            return
        if mode is Mode.OFF:
            if self._fetcher is not None:
                self._fetcher.forget_background()
            return
        asyncio.get_running_loop().create_task(self._begin())

    async def _begin(self) -> None:
        from haulier.fetch.scheduler import Urgency

        fetcher = await self._fetching()
        # A chunk that was read and found corrupt may be missing, too: who reads it has asked for it.
        order = self._heat.order(self._places[fp] for fp in self._missing if fp in self._places)
        manifest = self._manifest
        assert manifest is not None
        missing = [manifest[index] for index in order]
        loop = asyncio.get_running_loop()
        fetcher.hint(await loop.run_in_executor(None, self._hints, missing))
        fetcher.want(missing, Urgency.BULK)

    # -- chunks

    async def get(self, fp: bytes) -> None:
        """Fetch a chunk that somebody waits for; returns when it can be read from the store, or is of no disk that is
        served any more."""
        self.demanded += 1
        self._missing.add(fp)
        self._arrange()
        self._ease()
        self.unserved.add(fp)
        self._awaited[fp] += 1
        try:
            fetcher = await self._fetching()
            await fetcher.get(fp)
        finally:
            self._awaited[fp] -= 1
            if not self._awaited[fp]:
                del self._awaited[fp]
        self.unserved.discard(fp)
        self._ease()

    def touched(self, first: int, last: int) -> None:
        """Chunks `first` to `last` were read: their neighbours will probably be next."""
        if not self._missing or self._fetcher is None or self._manifest is None or self.mode is Mode.OFF:
            return
        from haulier.fetch.scheduler import Urgency

        near = range(last + 1, min(last + 1 + NEIGHBOURS, len(self._manifest)))
        found = [fp for index in near if (fp := self._manifest[index]) in self._missing]
        if found:
            self._fetcher.want(found, Urgency.SOON)

    def _ease(self) -> None:
        if self._fetcher is not None and self.mode is not Mode.FULL:
            self._fetcher.scheduler.eased_until = time.monotonic() + EASE_S

    # -- the fetcher

    async def _fetching(self) -> Fetcher:
        if self._fetcher is not None:
            return self._fetcher
        starting = self._starting
        if starting is None or (starting.done() and starting.exception() is not None):
            # That nobody could be found to ask is true until it is mended, and not for ever.
            self._starting = starting = asyncio.ensure_future(self._start())
        return await asyncio.shield(starting)

    async def _again(self) -> None:
        """Begins once more where there was nobody to ask, or no room; first what was read and could not be had."""
        from haulier.fetch.scheduler import Urgency

        fetcher = await self._fetching()
        fetcher.want(list(self.unserved), Urgency.DEMAND)
        if self.mode is not Mode.OFF:
            await self._begin()

    async def _start(self) -> Fetcher:
        from haulier.fetch.fetcher import Fetcher

        loop = asyncio.get_running_loop()
        sources = await loop.run_in_executor(None, self._make_sources)
        fetcher = Fetcher(sources, self._keep)
        fetcher.on_kept, fetcher.on_not_kept = self._kept, self._not_kept
        fetcher.start()
        self._fetcher = fetcher
        return fetcher

    def _keep(self, fp: bytes, chunk: bytes) -> None:
        self._store.put(chunk, fp)
        self._uncommitted = True

    def _kept(self, fp: bytes) -> None:
        self.fetched += 1
        self._missing.discard(fp)
        self.unserved.discard(fp)

    def _not_kept(self, fp: bytes, error: HaulierError) -> None:
        """It came and could not be kept. The rest would cross the link only to be thrown away: it waits a while."""
        self._error = str(error)
        self._again_at = time.monotonic() + AGAIN_S
        if self._fetcher is not None:
            self._fetcher.forget_background()

    async def _tidy(self) -> None:
        """Makes what came durable, now and then; notes when all is here; looks for new sources."""
        self._looked = time.monotonic()
        pause = COMMIT_S
        while True:
            await asyncio.sleep(pause)
            pause = COMMIT_S
            try:
                if await self._turn():
                    self._tidying = None
                    return
            except HaulierError as error:
                log.error("filling %s: %s", self._name, error)
                self._error, pause = str(error), AGAIN_S
            except Exception:
                # Whatever it was: a disk whose chunks are no longer made durable is never whole.
                log.exception("filling %s failed inside", self._name)

    async def _turn(self) -> bool:
        """True when all is here and durable, and nobody waits."""
        loop = asyncio.get_running_loop()
        if asked := self._asked():
            await self._look(asked)
        await self._seek()
        if self._uncommitted:
            self._uncommitted = False  # before: more is put meanwhile
            try:
                await loop.run_in_executor(None, self._store.commit)
            except BaseException:
                self._uncommitted = True
                raise
        if self._again_at is None:
            self._error = ""
        manifest = self._manifest
        if not self._busy() and manifest is not None and not self._arriving:
            # A commit that failed may have thrown away what had come.
            missing = await loop.run_in_executor(None, self._store.missing, manifest.unique())
            if missing and self._manifest is manifest:
                self._lacks(missing)
        if not self._busy():
            await self._whole()
        return not self._busy()

    async def _look(self, asked: set[bytes]) -> None:
        """What is read may come by another way, with a handoff under way say; or be of a disk that is not served any
        more: then who waits for it starts again on the new one."""
        manifest = self._manifest

        def lacking() -> set[bytes]:
            missing = set(self._store.missing(asked))
            return missing if manifest is None else missing & manifest.unique()

        settled = asked - await asyncio.get_running_loop().run_in_executor(None, lacking)
        self._missing -= settled
        self.unserved -= settled
        if self._fetcher is not None:
            self._fetcher.settle(settled)

    async def _seek(self) -> None:
        now = time.monotonic()
        if self._again_at is not None and now >= self._again_at:
            self._again_at = None
            await self._again()
        if now - self._looked <= SOURCES_S:
            return
        self._looked = now
        if self._fetcher is not None:
            for source in await asyncio.get_running_loop().run_in_executor(None, self._make_sources):
                self._fetcher.add_source(source)
        elif self.unserved or (self._missing and self.mode is not Mode.OFF):
            await self._again()

    async def _whole(self) -> None:
        fetcher, self._fetcher, self._starting = self._fetcher, None, None
        self._again_at, self._error = None, ""
        if fetcher is not None:
            await fetcher.close()
        log.info("%s is whole: %d chunks were fetched, %d of them while somebody waited", self._name, self.fetched,
                 self.demanded)  # fmt: skip

    async def close(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
        if self._fetcher is not None:
            await self._fetcher.close()
        with contextlib.suppress(HaulierError):
            await asyncio.get_running_loop().run_in_executor(None, self._store.commit)

    def facts(self) -> dict[str, Any]:
        """For `stats`: what is missing and how it goes. `rate` is bytes (of the wire) a second over all sources."""
        found: dict[str, Any] = {
            "missing": len(self._missing),
            "missing_bytes": len(self._missing) * CHUNK,
            "mode": self.mode.value,
            "fetched": self.fetched,
            "demanded": self.demanded,
            "unserved": len(self.unserved),
        }
        if self._error:
            found["error"] = self._error
        if self._fetcher is not None:
            sources = self._fetcher.facts()
            found["fetched_bytes"] = sum(source.bytes for source in sources)
            found["sources"] = [
                {"name": s.name, "up": s.up, "rtt_s": round(s.rtt, 4), "rate": round(s.bps), "chunks": s.chunks}
                | ({"why": self._fetcher.why[s.name]} if s.name in self._fetcher.why else {})
                for s in sources
            ]
            found["rate"] = round(sum(source.bps for source in sources if source.up))
        return found


def sources_for(site_root: Path) -> Callable[[], list[Source]]:
    """All sources of the site at `site_root`, looked up when they are needed."""

    def make() -> list[Source]:
        from haulier.agent.site import Site
        from haulier.fetch.holders import sources_of

        return sources_of(Site.load(site_root))

    return make


def hints_at(site_root: Path) -> Callable[[Sequence[bytes]], Mapping[str, Collection[bytes]]]:
    """Who is said to hold chunks, by the coordinator that the site at `site_root` knows."""

    def ask(fingerprints: Sequence[bytes]) -> Mapping[str, Collection[bytes]]:
        from haulier.agent.site import Site
        from haulier.fetch.holders import hints_for

        return hints_for(Site.load(site_root), fingerprints)

    return ask
