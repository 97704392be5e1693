"""Another site of the fleet as a source: one WebSocket over mutual TLS to its agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp

from haulier.agent import authority
from haulier.agent.site import Site, split_address
from haulier.errors import Corrupt, HaulierError, PeerError
from haulier.fetch import wire
from haulier.fetch.source import Events
from haulier.handoff.journal import SiteRow

log = logging.getLogger(__name__)

CONNECT_S: Final = 10.0
HEARTBEAT_S: Final = 5.0
RETRY_S: Final = (0.2, 0.5, 1.0, 2.0, 4.0)
MAX_UNSENT: Final = 1024


class PeerSource:
    """See the module. `row` may change: a site that has moved is found where `find` says it is now."""

    tells = True

    def __init__(self, site: Site, find: Callable[[], SiteRow], name: str, cost: float = 0.0) -> None:
        self.name = name
        self.cost = cost
        self._site = site
        self._find = find
        self._outbox: asyncio.Queue[bytes] | None = None
        self._inquiries: dict[int, list[bytes]] = {}
        self._pings: dict[int, float] = {}
        self._number = 0

    # -- requests

    def ask(self, fingerprints: Sequence[bytes], urgent: bool) -> None:
        self._post(wire.fingerprints(wire.WANT_NOW if urgent else wire.WANT, fingerprints))

    def hurry(self, fingerprints: Sequence[bytes]) -> None:
        self._post(wire.fingerprints(wire.HURRY, fingerprints))

    def inquire(self, fingerprints: Sequence[bytes]) -> None:
        self._number += 1
        self._inquiries[self._number] = list(fingerprints)
        self._post(wire.fingerprints(wire.HAVE, fingerprints, self._number))

    def probe(self) -> None:
        self._number += 1
        self._pings[self._number] = time.monotonic()
        self._post(wire.ping(wire.PING, self._number))

    def _post(self, message: bytes) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    # -- the connection

    async def run(self, events: Events) -> None:
        attempt = 0
        while True:
            began = time.monotonic()
            try:
                await self._connected(events)
                why = "it ended the connection"
            except Corrupt as error:
                events.lied(self.name, str(error))
                return
            except (aiohttp.ClientError, HaulierError, OSError, ssl.SSLError, TimeoutError) as error:
                why = str(error) or type(error).__name__
            finally:
                self._outbox = None
            events.lost(self.name, why)
            attempt = 0 if time.monotonic() - began > 10 else attempt + 1
            await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])

    async def _connected(self, events: Events) -> None:
        row = self._find()
        host, port = split_address(row.control)
        url = f"https://[{host}]:{port}{wire.PATH}" if ":" in host else f"https://{host}:{port}{wire.PATH}"
        connector = aiohttp.TCPConnector(ssl=authority.client_context(self._site), limit=1, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_connect=CONNECT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
            opening = session.ws_connect(
                url,
                protocols=(wire.PROTOCOL,),
                server_hostname=authority.server_name(row.name),
                max_msg_size=wire.MAX_ANSWER,
                compress=0,
                heartbeat=HEARTBEAT_S,
            )
            began = time.monotonic()
            stream = await asyncio.wait_for(opening, CONNECT_S)
            # TCP, TLS and the upgrade take one round trip each.
            rtt = (time.monotonic() - began) / 3
            self._outbox = asyncio.Queue()
            self._inquiries, self._pings = {}, {}
            writer = asyncio.create_task(self._write(stream, self._outbox))
            try:
                self.probe()
                events.up(self.name, rtt)
                await self._read(stream, events)
            finally:
                writer.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await writer
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(stream.close(), 1.0)

    async def _write(self, stream: aiohttp.ClientWebSocketResponse, outbox: asyncio.Queue[bytes]) -> None:
        while True:
            await stream.send_bytes(await outbox.get())

    async def _read(self, stream: aiohttp.ClientWebSocketResponse, events: Events) -> None:
        async for message in stream:
            if message.type is aiohttp.WSMsgType.ERROR:
                raise PeerError(f"the connection broke ({message.data})")
            if message.type is not aiohttp.WSMsgType.BINARY:
                raise Corrupt("a frame that is not binary")
            frame: bytes = message.data
            kind = frame[0] if frame else 0
            if kind == wire.DATA:
                fp, codec, packed = wire.read_data(frame)
                events.data(self.name, fp, codec, packed, len(frame) + 40)
            elif kind == wire.ABSENT:
                events.absent(self.name, wire.read_fingerprints(frame)[1])
            elif kind == wire.HOLDINGS:
                asked = self._inquiries.pop(wire.number(frame), None)
                if asked is None:
                    raise Corrupt("an answer to a question that was not asked")
                events.holdings(self.name, *wire.read_holdings(frame, asked))
            elif kind == wire.PONG:
                sent = self._pings.pop(wire.read_ping(frame), None)
                if sent is None:
                    raise Corrupt("a pong without a ping")
                events.pong(self.name, time.monotonic() - sent)
            else:
                raise Corrupt(f"a frame of kind {kind}")
