"""The serving side: other sites of the fleet ask for chunks over one WebSocket each, on the control address.

What is asked for urgently goes ahead of everything queued before. Bounded: connections by site and in all, wants
queued by connection, bytes by frame; and little is handed to TCP in advance, so that what is urgent overtakes what was
asked before. A chunk that is not here is answered at once with ABSENT. Nothing is pinned for whoever asks.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from aiohttp import WSCloseCode, WSMsgType, web

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, HaulierError
from haulier.fetch import wire

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 128
MAX_BY_SITE: Final = 16
MAX_QUEUED: Final = 8192
THREADS: Final = 4
READ_AHEAD: Final = 2
NOT_SENT: Final = 48 << 10
"""Bytes that the kernel takes ahead of the link."""


class ChunkService:
    """One site's service. `handle` serves one WebSocket until it ends; `close` ends them all."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="serve")
        self._open: dict[web.WebSocketResponse, str] = {}
        self.served: Counter[str] = Counter()
        """Chunks given, by site."""

    async def handle(self, request: web.Request, site: str) -> web.WebSocketResponse:
        """Serve `site`, which the caller has made sure of."""
        stream = web.WebSocketResponse(
            protocols=(wire.PROTOCOL,), max_msg_size=wire.MAX_REQUEST, compress=False, heartbeat=20.0
        )
        await stream.prepare(request)
        mine = sum(1 for other in self._open.values() if other == site)
        if len(self._open) >= MAX_CONNECTIONS or mine >= MAX_BY_SITE:
            await stream.close(code=WSCloseCode.TRY_AGAIN_LATER, message=b"too many connections")
            return stream
        self._open[stream] = site
        _short_buffers(request)
        try:
            await _Connection(stream, self._store, self._pool, lambda: self._count(site)).run()
        except Corrupt as error:
            log.warning("site %s asks for chunks in a way that makes no sense: %s", site, error)
            await stream.close(code=WSCloseCode.POLICY_VIOLATION)
        except (ConnectionError, HaulierError, RuntimeError) as error:
            log.info("chunk service for site %s: %s", site, error)
        finally:
            self._open.pop(stream, None)
        return stream

    def _count(self, site: str) -> None:
        self.served[site] += 1

    async def close(self) -> None:
        """End all connections: those who ask go elsewhere, or come back."""
        for stream in list(self._open):
            await stream.close(code=WSCloseCode.GOING_AWAY)
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Connection:
    def __init__(
        self, stream: web.WebSocketResponse, store: ChunkStore, pool: ThreadPoolExecutor, sent: Callable[[], None]
    ) -> None:
        self._stream = stream
        self._store = store
        self._pool = pool
        self._sent = sent
        self._urgent: OrderedDict[bytes, None] = OrderedDict()
        self._later: OrderedDict[bytes, None] = OrderedDict()
        self._news = asyncio.Event()

    async def run(self) -> None:
        sender = asyncio.create_task(self._send())
        try:
            async for message in self._stream:
                if message.type is WSMsgType.ERROR:
                    break
                if message.type is not WSMsgType.BINARY:
                    raise Corrupt("a frame that is not binary")
                await self._take(message.data)
                if sender.done():
                    break
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        if sender.done() and not sender.cancelled() and (error := sender.exception()) is not None:
            raise error

    async def _take(self, message: bytes) -> None:
        kind = message[0] if message else 0
        if kind == wire.PING:
            await self._stream.send_bytes(wire.ping(wire.PONG, wire.read_ping(message)))
        elif kind in (wire.WANT, wire.WANT_NOW):
            _number, fps = wire.read_fingerprints(message)
            if len(self._urgent) + len(self._later) + len(fps) > MAX_QUEUED:
                raise Corrupt(f"more than {MAX_QUEUED} chunks asked for at a time")
            queue = self._urgent if kind == wire.WANT_NOW else self._later
            queue.update(dict.fromkeys(fps))
            self._news.set()
        elif kind == wire.HURRY:
            for fp in wire.read_fingerprints(message)[1]:
                if fp in self._later:
                    del self._later[fp]
                    self._urgent[fp] = None
            self._news.set()
        elif kind == wire.HAVE:
            number, fps = wire.read_fingerprints(message)
            loop = asyncio.get_running_loop()
            missing = set(await loop.run_in_executor(self._pool, self._store.missing, fps))
            await self._stream.send_bytes(wire.holdings(number, [fp not in missing for fp in fps]))
        else:
            raise Corrupt(f"a frame of kind {kind}")

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[list[tuple[bytes, bytes | None]]] | None = None
        while True:
            if ready is None and (ready := self._next(loop)) is None:
                self._news.clear()
                await self._news.wait()
                continue
            frames = await ready
            # The next ones are read and packed while these go out.
            ready = self._next(loop)
            for fp, frame in frames:
                if frame is None:
                    await self._stream.send_bytes(wire.fingerprints(wire.ABSENT, [fp]))
                else:
                    await self._stream.send_bytes(frame)
                    self._sent()

    def _next(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[list[tuple[bytes, bytes | None]]] | None:
        queue = self._urgent or self._later
        if not queue:
            return None
        # A few at a time: a thread's turn costs more than packing a chunk. Only one where somebody waits for it.
        count = 1 if queue is self._urgent else READ_AHEAD
        fps = [queue.popitem(last=False)[0] for _ in range(min(count, len(queue)))]
        return loop.run_in_executor(self._pool, self._frames, fps)

    def _frames(self, fps: list[bytes]) -> list[tuple[bytes, bytes | None]]:
        return [(fp, self._frame(fp)) for fp in fps]

    def _frame(self, fp: bytes) -> bytes | None:
        if fp == ZERO:
            return None
        try:
            return wire.data(fp, self._store.get(fp))
        except HaulierError:
            return None


def _short_buffers(request: web.Request) -> None:
    transport = request.transport
    if transport is None:
        return
    raw = transport.get_extra_info("socket")
    try:
        raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", 25), NOT_SENT)
    except OSError:
        pass  # a matter of promptness only
