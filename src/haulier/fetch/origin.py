"""An S3-compatible object store as a source: one object a chunk, compressed, named by its fingerprint.

    <prefix>/chunks/<first two hex digits>/<fingerprint in hex>      zstd, one frame, one chunk

It is asked without being asked what it holds first (a question costs as much as an answer there), and only for what no
site that answers holds, because it is paid by the byte. Credentials come from the environment, as for other S3 tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from haulier.agent.site import Site
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.store import ChunkStore
from haulier.compress import zstd
from haulier.errors import HaulierError, PeerError, UnknownThing, UsageError
from haulier.fetch import wire
from haulier.fetch.source import Events
from haulier.units import CHUNK

if TYPE_CHECKING:
    from obstore.store import S3Store

log = logging.getLogger(__name__)

NAME: Final = "origin"
CONCURRENT: Final = 32
UPLOADS: Final = 16
COST: Final = 1.0
RETRY_S: Final = (1.0, 2.0, 5.0, 10.0)
LEVEL: Final = 9
MAX_OBJECT: Final = CHUNK + 4096


def key(prefix: str, fp: bytes) -> str:
    """Name of the object that holds a chunk."""
    text = fp.hex()
    return f"{prefix}/chunks/{text[:2]}/{text}" if prefix else f"chunks/{text[:2]}/{text}"


def open_store(url: str, endpoint: str = "") -> tuple[S3Store, str]:
    """(the bucket, prefix) of ``s3://BUCKET[/PREFIX]``. UsageError for another URL."""
    from obstore.store import S3Store

    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UsageError(f"bad origin {url[:80]!r}: write s3://BUCKET or s3://BUCKET/PREFIX")
    options: dict[str, Any] = {}
    if endpoint:
        options["endpoint"] = endpoint
        options["virtual_hosted_style_request"] = False
        options["client_options"] = {"allow_http": True}
    return S3Store(bucket, **options), prefix.strip("/")


class OriginSource:
    """See the module."""

    tells = False

    def __init__(self, url: str, endpoint: str = "", cost: float = COST, name: str = NAME) -> None:
        self.name = name
        self.cost = cost
        self._store, self._prefix = open_store(url, endpoint)
        self._queue: asyncio.PriorityQueue[tuple[int, int, bytes]] | None = None
        self._number = 0
        self._asked: dict[bytes, int] = {}
        self._events: Events | None = None
        self._up = False

    @classmethod
    def of(cls, site: Site) -> OriginSource:
        """The origin in the site's configuration."""
        return cls(site.origin, site.origin_endpoint, site.origin_cost)

    # -- requests

    def ask(self, fingerprints: Sequence[bytes], urgent: bool) -> None:
        if self._queue is None:
            return
        for fp in fingerprints:
            self._number += 1
            self._asked[fp] = self._number
            self._queue.put_nowait((0 if urgent else 1, self._number, fp))

    def hurry(self, fingerprints: Sequence[bytes]) -> None:
        self.ask([fp for fp in fingerprints if fp in self._asked], urgent=True)

    def inquire(self, fingerprints: Sequence[bytes]) -> None:
        raise NotImplementedError("an origin is not asked what it holds")

    def probe(self) -> None:
        """Round trips are measured by the objects themselves."""

    # -- objects

    async def run(self, events: Events) -> None:
        import obstore

        self._events = events
        attempt = 0
        while True:
            try:
                began = time.monotonic()
                with contextlib.suppress(FileNotFoundError):
                    await obstore.head_async(self._store, key(self._prefix, ZERO))
                self._queue = asyncio.PriorityQueue()
                self._asked = {}
                events.up(self.name, time.monotonic() - began)
                attempt = 0
                async with asyncio.TaskGroup() as group:
                    for _ in range(CONCURRENT):
                        group.create_task(self._work(events))
            except* Exception as errors:
                self._queue = None
                events.lost(self.name, str(errors.exceptions[0])[:200])
            attempt += 1
            await asyncio.sleep(RETRY_S[min(attempt - 1, len(RETRY_S) - 1)])

    async def _work(self, events: Events) -> None:
        import obstore

        assert self._queue is not None
        while True:
            _urgency, number, fp = await self._queue.get()
            if self._asked.get(fp) != number:
                continue
            began = time.monotonic()
            try:
                found = await obstore.get_async(self._store, key(self._prefix, fp))
                size = int(found.meta["size"])
                if size > MAX_OBJECT:
                    events.absent(self.name, [fp])
                    continue
                packed = bytes(await found.bytes_async())
            except FileNotFoundError:
                events.absent(self.name, [fp])
                continue
            finally:
                self._asked.pop(fp, None)
            events.pong(self.name, time.monotonic() - began)
            events.data(self.name, fp, wire.ZSTD, packed, len(packed) + 200)


def upload(
    store: ChunkStore, fingerprints: Iterable[bytes], url: str, endpoint: str = "", *, known: bool = True
) -> tuple[int, int]:
    """Bring chunks to the origin, those that it has not yet (unless `known` is false: all). (chunks, bytes) sent.

    Raises PeerError when it cannot be written, UnknownThing for a chunk that is not here.
    """
    import obstore

    bucket, prefix = open_store(url, endpoint)

    async def one(fp: bytes, turn: asyncio.Semaphore) -> int:
        async with turn:
            name = key(prefix, fp)
            if known:
                with contextlib.suppress(FileNotFoundError):
                    await obstore.head_async(bucket, name)
                    return 0
            packed = zstd.compress(await asyncio.to_thread(store.get, fp), LEVEL)
            await obstore.put_async(bucket, name, packed)
            return len(packed)

    async def work() -> list[int]:
        turn = asyncio.Semaphore(UPLOADS)
        wanted = [fp for fp in dict.fromkeys(fingerprints) if fp != ZERO]
        return await asyncio.gather(*(one(fp, turn) for fp in wanted))

    try:
        sent = asyncio.run(work())
    except (UnknownThing, UsageError):
        raise
    except HaulierError:
        raise
    except Exception as error:
        raise PeerError(
            f"the origin {url} cannot be written ({str(error)[:300]}): check its address and credentials"
        ) from None
    return sum(1 for count in sent if count), sum(sent)
