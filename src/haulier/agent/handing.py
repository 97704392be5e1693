"""The connection over which an offer came becomes the first path of the workers' session: no second handshake.

Both ends are known by their certificates then, and have the session's secret. The source's worker keeps its end. Here
TLS cannot leave the agent, which therefore passes bytes on between the connection and the worker: good enough for what
little a small handoff has to say. A session that has more to say dials its own paths and lets this one go.

    source   the offer's request, with   Haulier-Path: 2              the version of the bulk protocol
    target   its answer, with            Haulier-Path: 2 HEARD TOOK   what follows its body, both ways, are frames

HEARD is the target's clock when the request had come, TOOK how long it took to answer it, in seconds: with its own
clock the source has how the two differ. A target of another version, or whose worker is not there, answers as always,
and the source dials.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Final

from aiohttp import web

from haulier.agent.client import PATH_HEADER, PATH_VERSION

log = logging.getLogger(__name__)

QUIET_S: Final = 0.3
END_S: Final = 2.0


class _End(asyncio.Protocol):
    """One of two connections: what comes in here goes out at the other."""

    other: _End

    def __init__(self, over: asyncio.Future[None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = over.get_loop().create_future()
        self._over = over
        self._held: bytes | None = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._held is None:
            self.other.write(data)
        else:
            self._held += data
            if self.transport is not None:
                self.transport.pause_reading()

    def release(self) -> None:
        """From here on the other end takes what comes in here; what came before was kept."""
        held, self._held = self._held, None
        if held:
            self.other.write(held)
        if self.transport is not None:
            self.transport.resume_reading()

    @property
    def _live(self) -> asyncio.Transport | None:
        """Closed twice, a transport of TLS forgets what it would need to be aborted; and it takes nothing more."""
        return None if self.transport is None or self.transport.is_closing() else self.transport

    def write(self, data: bytes) -> None:
        if (live := self._live) is not None:
            live.write(data)

    def pause_writing(self) -> None:
        if (live := self.other._live) is not None:
            live.pause_reading()

    def resume_writing(self) -> None:
        if (live := self.other._live) is not None:
            live.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        _tell(self.lost)
        _tell(self._over)

    def close(self) -> None:
        if (live := self._live) is not None:
            live.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Outer(_End):
    """The end of the other site; `server` is what has served it so far, and has to hear of its end."""

    def __init__(self, over: asyncio.Future[None], transport: asyncio.Transport, server: asyncio.Protocol) -> None:
        super().__init__(over)
        self.transport = transport
        self._server = server

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._server.connection_lost(error)


class Handing:
    """All such connections of an agent. `close` ends them: their sessions dial."""

    def __init__(self) -> None:
        self._over: set[asyncio.Future[None]] = set()

    def close(self) -> None:
        for over in self._over:
            _tell(over)

    async def answer(self, request: web.Request, answer: web.Response, worker: Path, heard: float) -> web.Response:
        """Answers, then passes bytes on between that connection and the worker at `worker`, to the end of either.

        `heard`: when the request had come. Where no worker waits there, nothing is done: `answer` is still to be given.
        """
        loop = asyncio.get_running_loop()
        transport, server = request.transport, request.protocol
        if transport is None:
            return answer
        over: asyncio.Future[None] = loop.create_future()
        inner, outer = _End(over), _Outer(over, transport, server)
        inner.other, outer.other = outer, inner
        try:
            await loop.create_unix_connection(lambda: inner, str(worker))
        except OSError as error:
            log.info("the worker takes no connection at %s: %s", worker, error)
            return answer
        self._over.add(over)
        try:
            answer.headers[PATH_HEADER] = f"{PATH_VERSION} {heard:.4f} {time.time() - heard:.4f}"
            # Before the answer goes: what follows on it is not for the server any more.
            transport.set_protocol(outer)
            outer.release()
            await answer.prepare(request)
            await answer.write_eof()
            inner.release()
            await over
        except ConnectionError as error:
            log.info("the connection of an offer was lost: %s", error)
        finally:
            self._over.discard(over)
            answer.force_close()
            await _end(inner, outer)
        return answer


def _tell(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)


async def _end(inner: _End, outer: _End) -> None:
    """What was said goes out; then both are closed, if need be against their will."""
    inner.close()
    try:
        # Mostly the other site closes by itself: it has heard the same goodbye.
        await asyncio.wait([outer.lost], timeout=QUIET_S)
        outer.close()
        await asyncio.wait([inner.lost, outer.lost], timeout=END_S)
    finally:
        for end in (inner, outer):
            if not end.lost.done():
                end.abort()
