"""What a source makes ready while the target looks at the offer: the block index, and what sends memory.

It is made for what the target will most probably answer, and made again where the answer differs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from haulier.agent.site import Site
from haulier.chunks.blocks import StoreBlockFinder
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError
from haulier.guests.command import RAM_ID
from haulier.guests.model import GuestSpec
from haulier.handoff import attempts, retained
from haulier.handoff.messages import Accept
from haulier.handoff.residence import guest_paths
from haulier.handoff.shared import blocks_of, golden_manifest, images_named
from haulier.memory.ahead import AheadReader
from haulier.memory.base import MemoryBase
from haulier.memory.proxy import SourceProxy


@dataclass(frozen=True, slots=True)
class MemorySender:
    """What sends a VM's memory, from the picture `picture` (as `base`, where there is one) on."""

    picture: str
    base: MemoryBase | None
    proxy: SourceProxy
    ahead: AheadReader

    def close(self) -> None:
        self.ahead.close()
        self.proxy.close()


class Preparation:
    """Of one handoff at its source. Work goes on in one thread of its own until `settle`."""

    def __init__(
        self,
        site: Site,
        store: ChunkStore,
        handoff: str,
        spec: GuestSpec,
        manifest: Manifest,
        worth: Callable[[], set[bytes]] | None = None,
    ) -> None:
        """`worth` tells which chunks to index where the target has all of them already; None: always all."""
        self._worth = worth
        self._site, self._store, self._handoff, self._spec, self._manifest = site, store, handoff, spec, manifest
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._finder = self._pool.submit(self._index)
        self._memory: Future[MemorySender] | None = None

    @property
    def finder(self) -> StoreBlockFinder:
        """Finds pages in what both sites hold: one object, from `settle` on."""
        return self._finder.result()

    def foresee(self, picture: str) -> None:
        """Prepares memory as well, from the picture that the target will most probably have."""
        self._memory = self._pool.submit(self._from_picture, picture)

    def settle(self, accept: Accept, *, memory: bool) -> None:
        """The target has said what it has: keeps what was prepared for just that, or prepares again.

        `memory`: what sends memory as well, but for a picture of an attempt, which must be agreed on first. Conflict
        when what both hold is gone meanwhile.
        """
        foreseen = accept.golden if self._worth is None else accept.complete
        again = not foreseen or bool(accept.images)
        if again or not self._foreseen(accept.memory_base):
            self._drop_memory()
        if again:
            self._finder = self._pool.submit(self._index, accept)
        if memory and self._memory is None and not attempts.is_attempt(accept.memory_base):
            self._memory = self._pool.submit(self._from_picture, accept.memory_base)
        self._finder.result()

    def memory(self) -> MemorySender:
        """What `settle` prepared for sending memory; raises what went wrong with it."""
        if self._memory is None:
            raise RuntimeError("no memory was prepared")
        return self._memory.result()

    def memory_on(self, picture: str, base: MemoryBase | None) -> MemorySender:
        """The same from a picture of an attempt, after both sites agreed on what it holds."""
        self._drop_memory()
        self._memory = self._pool.submit(self._sender, picture, base)
        return self._memory.result()

    def close(self) -> None:
        """Lets go of everything; may be called again."""
        self._pool.shutdown()
        self._drop_memory()

    def _index(self, accept: Accept | None = None) -> StoreBlockFinder:
        golden = golden_manifest(self._store, self._spec.golden) if accept is None or accept.golden else None
        images = images_named(self._store, accept.images) if accept is not None else []
        ready = self._site.golden / self._spec.golden / "blocks.idx"
        only = self._worth() if self._worth is not None and (accept is None or accept.complete) else None
        return StoreBlockFinder(*blocks_of(self._store, self._manifest, golden, ready, images, only))

    def _foreseen(self, picture: str) -> bool:
        if self._memory is not None:
            # One that failed is made again, and says what is wrong where that is heard.
            with contextlib.suppress(HaulierError, OSError):
                return self._memory.result().picture == picture
        return False

    def _from_picture(self, picture: str) -> MemorySender:
        return self._sender(picture, retained.open_base(self._site, self._spec.name, self._spec.uuid, picture))

    def _sender(self, picture: str, base: MemoryBase | None) -> MemorySender:
        paths = guest_paths(self._site, self._spec.name)
        proxy = SourceProxy(self._site.mirror(self._handoff), base, self.finder, clock=time.thread_time, recent=True)
        try:
            ahead = AheadReader(paths.ram, RAM_ID)
            if (mirror := proxy.prepare()) is not None and RAM_ID in mirror.first:
                ahead.plan(mirror, proxy.finder)
        except BaseException:
            proxy.close()
            raise
        return MemorySender(picture, base, proxy, ahead)

    def _drop_memory(self) -> None:
        ready, self._memory = self._memory, None
        if ready is not None and ready.exception() is None:
            ready.result().close()


def foreseeable(pictures: tuple[str, ...], golden: bool) -> str | None:
    """The picture that the target will most probably start from, where one can know it without asking."""
    first = next(iter(pictures), "")
    return first if golden and first and not attempts.is_attempt(first) else None
