"""Serves one manifest out of a chunk store to NBD clients on a unix socket (asyncio).

The event loop never waits for a disk: it gives what lies in memory (of the kernel, or a small cache here), all else is
fetched by threads. So one slow read delays only the requests that need that chunk. A chunk that is missing or corrupt
is asked for again and again for `patience_s` (another process may be fetching or healing it) before the request fails
with EIO; the guest's device then stops the guest (rerror=stop) instead of showing it an error.

A request works on the manifest that was current when it came. `swap` replaces the manifest for the requests that come
after it; a request that must wait for a chunk of the old one starts again on the new one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol, cast

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import Manifest
from haulier.disks import nbdproto as p
from haulier.disks.heat import Heat
from haulier.errors import Conflict, Corrupt, HaulierError, UnknownThing
from haulier.units import CHUNK

log = logging.getLogger(__name__)

EXPORT_NAME: Final = "disk0"
THREADS: Final = 8
"""Reads from disk under way at once; beyond the queue depth of a guest's busy disk more give nothing."""
CACHE_CHUNKS: Final = 256
"""16 MiB of chunks last read: a guest reads files in pieces smaller than a chunk."""
MAX_UNDER_WAY: Final = 128
"""Requests of one connection under way before no more are read from it (QEMU's own client sends 16)."""
PATIENCE_S: Final = 30.0
"""How long a read may wait. QEMU stops the guest then (rerror=stop), and it goes on when what it read has come."""
RETRY_S: Final = 0.1
RETRY_MAX_S: Final = 1.0


class ChunkSource(Protocol):
    """What is needed of a chunk store: the whole chunk, and a part of it if that needs no waiting."""

    def get(self, fp: bytes) -> bytes: ...
    def read_now(self, fp: bytes, offset: int, length: int) -> bytes | None: ...


class Elsewhere(Protocol):
    """Where chunks that the store lacks come from."""

    async def get(self, fp: bytes) -> None:
        """Return when the store has it, or it is of no disk that is served. May take as long as a link is down."""
        ...

    def touched(self, first: int, last: int) -> None: ...


class Counters:
    """What the server has done since it started."""

    def __init__(self) -> None:
        self.reads = 0
        self.read_bytes = 0
        self.loads = 0
        """Chunks read from the store."""
        self.retries = 0
        self.errors = 0
        self.swaps = 0
        self.connections = 0
        """Connections open now."""
        self.waiting = 0
        """Requests that wait for a missing chunk now."""

    def as_dict(self) -> dict[str, int]:
        return dict(self.__dict__)


class ExportServer:
    """One disk. Use from the event loop only; `manifest` may be replaced by `swap`."""

    def __init__(
        self,
        store: ChunkSource,
        manifest: Manifest,
        patience_s: float = PATIENCE_S,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.store = store
        self.elsewhere = elsewhere
        self.heat = Heat(len(manifest))
        self.manifest = manifest
        self.patience_s = patience_s
        self.counters = Counters()
        self._cache: OrderedDict[bytes, bytes] = OrderedDict()
        self._loading: dict[bytes, asyncio.Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()

    def swap(self, manifest: Manifest) -> None:
        """Serve `manifest` from now on. Conflict when its size differs: clients learn the size once."""
        if manifest.size != self.manifest.size:
            raise Conflict(
                f"the disk served has {self.manifest.size} bytes, the new manifest {manifest.size}: "
                "a disk cannot change its size while it is open"
            )
        self.manifest = manifest
        self.counters.swaps += 1

    def connection(self) -> asyncio.Protocol:
        """A protocol instance for a new client."""
        return _Connection(self)

    def close(self) -> None:
        """Drop all clients; QEMU's client connects again when there is a server again."""
        for task in list(self._tasks):
            task.cancel()
        for connection in list(self._connections):
            connection.abort()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- chunks

    def pieces_now(self, manifest: Manifest, request: p.Request) -> list[tuple[int, p.Buffer | None]] | None:
        """What a request asks for, as pieces of a reply; None when any of it must be waited for."""
        pieces: list[tuple[int, p.Buffer | None]] = []
        for fp, within, length in spans(manifest, request):
            if fp == ZERO:
                pieces.append((length, None))
                continue
            chunk = self._cached(fp)
            data = self.store.read_now(fp, within, length) if chunk is None else _part(chunk, within, length)
            if data is None:
                return None
            pieces.append((length, data))
        return pieces

    def _cached(self, fp: bytes) -> bytes | None:
        data = self._cache.get(fp)
        if data is not None:
            self._cache.move_to_end(fp)
        return data

    async def chunk(self, fp: bytes) -> bytes:
        """A whole chunk, from memory or the store."""
        data = self._cached(fp)
        return data if data is not None else await asyncio.shield(self.load(fp))

    def load(self, fp: bytes) -> asyncio.Future[bytes]:
        """The chunk from the store, read by a thread; readers of one chunk share one read."""
        future = self._loading.get(fp)
        if future is None:
            self.counters.loads += 1
            future = asyncio.ensure_future(self._load(fp))
            self._loading[fp] = future
            future.add_done_callback(lambda done: self._loaded(fp, done))
        return future

    async def _load(self, fp: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self.store.get, fp)
        except (UnknownThing, Corrupt):
            if self.elsewhere is None:
                raise
        # A bad one was dropped from the store: another site heals it.
        await self.elsewhere.get(fp)
        return await loop.run_in_executor(self._pool, self.store.get, fp)

    def _loaded(self, fp: bytes, future: asyncio.Future[bytes]) -> None:
        self._loading.pop(fp, None)
        if future.cancelled() or future.exception() is not None:
            return
        self._cache[fp] = future.result()
        if len(self._cache) > CACHE_CHUNKS:
            self._cache.popitem(last=False)

    def touched(self, request: p.Request) -> None:
        """Note what is read: what will be read next, here or where the guest goes."""
        if request.length:
            first, last = request.offset // CHUNK, (request.offset + request.length - 1) // CHUNK
            self.heat.touch(first, last)
            if self.elsewhere is not None:
                self.elsewhere.touched(first, last)

    def start(self, connection: _Connection, request: p.Request, manifest: Manifest) -> None:
        task = asyncio.get_running_loop().create_task(self._slow(connection, request, manifest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _slow(self, connection: _Connection, request: p.Request, manifest: Manifest) -> None:
        try:
            reply = await self._patient(connection.core, request, manifest)
            connection.finish(reply)
        except asyncio.CancelledError:
            raise
        except Exception:
            # A client must get an answer to everything, or QEMU waits for ever.
            log.exception("request for %d bytes at %d failed", request.length, request.offset)
            connection.finish(connection.core.reply_error(request, p.EIO))

    async def _patient(self, core: p.ServerCore, request: p.Request, manifest: Manifest) -> list[p.Buffer]:
        deadline = time.monotonic() + self.patience_s
        pause = RETRY_S
        while True:
            try:
                needed = dict.fromkeys(fp for fp, _within, _length in spans(manifest, request) if fp != ZERO)
                # All at once: a long read takes as long as its slowest chunk, not as their sum.
                found = await asyncio.wait_for(asyncio.gather(*map(self.chunk, needed)), deadline - time.monotonic())
                chunks = dict(zip(needed, found, strict=True))
                pieces: list[tuple[int, p.Buffer | None]] = [
                    (length, None if fp == ZERO else _part(chunks[fp], within, length))
                    for fp, within, length in spans(manifest, request)
                ]
                return self.answer(core, request, pieces)
            except (HaulierError, OSError, LookupError, TimeoutError, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                    raise  # not the fetching of a chunk was ended, but this server
                if self.counters.retries % 100 == 0:
                    log.warning("chunk for %d bytes at %d: %s; trying on", request.length, request.offset, error)
                self.counters.retries += 1
                if time.monotonic() >= deadline:
                    log.error("gave up on %d bytes at %d: %s", request.length, request.offset, error)
                    self.counters.errors += 1
                    return core.reply_error(request, p.EIO)
            self.counters.waiting += 1
            try:
                await asyncio.sleep(pause)
            finally:
                self.counters.waiting -= 1
            pause = min(pause * 1.5, RETRY_MAX_S)
            manifest = self.manifest

    def answer(
        self, core: p.ServerCore, request: p.Request, pieces: list[tuple[int, p.Buffer | None]]
    ) -> list[p.Buffer]:
        """The reply to a read or cache request whose pieces are at hand."""
        if request.command == p.CMD_CACHE:
            return core.reply_done(request)
        self.counters.reads += 1
        self.counters.read_bytes += request.length
        return core.reply_read(request, pieces)


def spans(manifest: Manifest, request: p.Request) -> Iterator[tuple[bytes, int, int]]:
    """(fingerprint, offset within the chunk, length) of each chunk that a request touches, in order."""
    offset, end = request.offset, request.offset + request.length
    while offset < end:
        index, within = divmod(offset, CHUNK)
        length = min(CHUNK - within, end - offset)
        yield manifest[index], within, length
        offset += length


def _part(chunk: bytes, within: int, length: int) -> bytes:
    return chunk if length == CHUNK else chunk[within : within + length]


def extents(manifest: Manifest, request: p.Request) -> list[tuple[int, int]]:
    """(length, flags) of ``base:allocation`` over the range of a request, zero chunks as holes."""
    found: list[tuple[int, int]] = []
    only_one = bool(request.flags & p.CMD_FLAG_REQ_ONE)
    offset, end = request.offset, request.offset + request.length
    while offset < end:
        index, within = divmod(offset, CHUNK)
        length = min(CHUNK - within, end - offset)
        flags = p.STATE_HOLE | p.STATE_ZERO if manifest[index] == ZERO else 0
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + length, flags)
        elif (found and only_one) or len(found) == p.MAX_EXTENTS:
            break
        else:
            found.append((length, flags))
        offset += length
    return found


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: ExportServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._under_way = 0
        self._writing_paused = False
        size = server.manifest.size
        self.core = p.ServerCore(lambda name: size if name in ("", EXPORT_NAME) else None, [EXPORT_NAME])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.counters.connections += 1
        self._server._connections.add(self)
        self._transport.writelines(self.core.take_output())

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.counters.connections -= 1
        self._server._connections.discard(self)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._throttle()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._throttle()

    def _throttle(self) -> None:
        """Read no requests while replies pile up: a client bounds its own memory, not ours."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._writing_paused or self._under_way >= MAX_UNDER_WAY:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        try:
            requests = self.core.receive(data)
        except Corrupt as error:
            log.warning("%s", error)
            transport.abort()
            return
        out = self.core.take_output()
        for request in requests:
            out += self._handle(request)
        if out:
            transport.writelines(out)
        if self.core.closed:
            transport.close()

    def _handle(self, request: p.Request) -> list[p.Buffer]:
        server, manifest = self._server, self._server.manifest
        if request.command == p.CMD_BLOCK_STATUS:
            return self.core.reply_status(request, extents(manifest, request))
        server.touched(request)
        pieces = server.pieces_now(manifest, request)
        if pieces is None:
            self._under_way += 1
            self._throttle()
            server.start(self, request, manifest)
            return []
        return server.answer(self.core, request, pieces)

    def finish(self, reply: list[p.Buffer]) -> None:
        """Send the reply to a request that had to wait."""
        self._under_way -= 1
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(reply)
        self._throttle()
