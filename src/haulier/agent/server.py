"""The agent's daemon: two listeners (unix socket, HTTPS), one table of routes, and the loops that keep things going.

It may be killed at any moment: whatever it must remember is in the journal or beside the guest, and what runs
(guests, disk exports, workers) runs in processes of their own, which the next agent adopts.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from aiohttp import web

from haulier.agent import authority, packing
from haulier.agent.addresses import Addresses
from haulier.agent.cache import Cache
from haulier.agent.client import PATH_HEADER, PATH_VERSION
from haulier.agent.core import Core
from haulier.agent.guests import Guests
from haulier.agent.handing import Handing
from haulier.agent.handoffs import Handoffs
from haulier.agent.health import Health
from haulier.agent.images import Images
from haulier.agent.layers import Layers
from haulier.agent.membership import Membership
from haulier.agent.notify import notify
from haulier.agent.residuals import Residuals
from haulier.agent.routes import Access, Call, Route, guests, handoffs, images, peers, residuals, sites, upkeep
from haulier.agent.site import Site, split_address
from haulier.agent.tunnels import Tunnels
from haulier.agent.waypoints import Waypoints
from haulier.chunks.store import ChunkStore
from haulier.coordinator import routes as coordinator_routes
from haulier.coordinator.address import HERE
from haulier.coordinator.host import Host
from haulier.coordinator.reporter import REPORT_EVERY_S, Reporter
from haulier.errors import Conflict, HaulierError, NoRoom, NotTrusted, UnknownThing, UsageError
from haulier.fetch import wire as chunk_wire
from haulier.fetch.service import ChunkService
from haulier.guests.accel import qemu_info
from haulier.handoff import attempts
from haulier.handoff.spawning import STANDBY
from haulier.network import paths as networks

log = logging.getLogger(__name__)

MAX_BODY: Final = 1 << 20
_THREADS: Final = 32
_GRACE_S: Final = 3.0
GUESTS_EVERY_S: Final = 2.0
LAYERS_EVERY_S: Final = 10.0
HANDOFFS_EVERY_S: Final = 0.5
CACHE_EVERY_S: Final = 5.0
STORE_EVERY_S: Final = 60.0
FLEET_EVERY_S: Final = 30.0
TELL_EVERY_S: Final = 2.0
LOOP_END_S: Final = 10.0
_STATUS: Final = {2: 400, 3: 404, 4: 409, 5: 422, 6: 507, 7: 422, 8: 502, 9: 403, 10: 500, 11: 409, 12: 500}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def route_table() -> tuple[Route, ...]:
    """All routes of the control API of an agent."""
    own = (*sites.TABLE, *guests.TABLE, *images.TABLE, *handoffs.TABLE, *peers.TABLE, *residuals.TABLE, *upkeep.TABLE)
    return (*own, *coordinator_routes.TABLE)


class Daemon(Protocol):
    """What `serve` serves: an agent, or a coordinator on its own. `what` names it in messages and file names."""

    what: str
    site: Site
    core: Core

    @property
    def control(self) -> str:
        """HOST:PORT to listen on."""
        ...

    @property
    def socket(self) -> Path:
        """Path of the local control socket."""
        ...

    @property
    def store(self) -> ChunkStore | None:
        """Whose chunks it sends to other sites."""
        ...

    def routes(self) -> tuple[Route, ...]: ...

    def tidy(self) -> None:
        """Before anybody can call. Blocking."""
        ...

    def recover(self) -> None:
        """When both listeners accept. Blocking."""
        ...

    def close(self) -> None: ...


class Agent:
    """The parts of one running agent, as handlers see them."""

    what = "agent"

    def __init__(self, site: Site) -> None:
        self.site = site
        self.coordinator = Host.of(site) if site.coordinator == HERE else None
        self.core = Core(site)
        self.journal = self.core.journal
        self.store = ChunkStore(site.store)
        self.cache = Cache(self.core, self.store)
        self.health = Health(self.core, self.store)
        self.addresses = Addresses(self.core)
        self.guests = Guests(self.core, self.store, self.addresses)
        self.images = Images(self.core, self.store)
        self.layers = Layers(self.core, self.store, self.images, self.cache)
        self.residuals = Residuals(self.core, self.store)
        self.tunnels = Tunnels(self.core, self.addresses)
        self.membership = Membership(self.core, self.residuals)
        self.handoffs = Handoffs(self.core, self.residuals.check_may_leave)
        self.waypoints = Waypoints(self.core)
        self.reporter = Reporter(site, self.journal, self.store)
        self._stopping = threading.Event()
        self._loops: list[threading.Thread] = []

    @property
    def control(self) -> str:
        return self.site.control

    @property
    def socket(self) -> Path:
        return self.site.socket

    def routes(self) -> tuple[Route, ...]:
        return route_table()

    def tidy(self) -> None:
        """Before anybody can call: finishes what an earlier agent left half made or half removed here. Blocking."""
        for what, adopt in (
            ("golden snapshots", self.images.adopt),
            ("layers", self.layers.adopt),
            ("guests", self.guests.adopt),
            ("MPTCP", lambda: networks.tidy(self.site.run)),
        ):
            _try(what, adopt)

    def recover(self) -> None:
        """Takes up handoffs, which may need other sites, and begins to watch over guests and handoffs. Blocking."""
        _try("handoffs", self.handoffs.adopt)
        _try("a worker in waiting", STANDBY.open)
        # The first offer would otherwise wait for it: what QEMU can do here is asked once per process.
        _try("what QEMU can do", _ask_qemu)
        for name, every_s, watch in (
            ("guests", GUESTS_EVERY_S, self.guests.supervise),
            ("handoffs", HANDOFFS_EVERY_S, self.handoffs.supervise),
            ("layers", LAYERS_EVERY_S, self.layers.supervise),
            ("data left behind", GUESTS_EVERY_S, self.residuals.supervise),
            ("tunnels", GUESTS_EVERY_S, self.tunnels.supervise),
            ("guests' addresses", GUESTS_EVERY_S, self.addresses.supervise),
            ("what other sites keep for guests here", TELL_EVERY_S, self.residuals.tell),
            ("the coordinator", REPORT_EVERY_S, self.reporter.step),
            ("the fleet", FLEET_EVERY_S, self.membership.supervise),
            ("the cache", CACHE_EVERY_S, self.cache.tick),
            ("the store", STORE_EVERY_S, self.health.tick),
            ("what is kept for the next handoff", STORE_EVERY_S, self._expire),
        ):
            loop = threading.Thread(target=self._watch, args=(name, every_s, watch), name=f"watch {name}", daemon=True)
            self._loops.append(loop)
            loop.start()

    def _expire(self) -> None:
        attempts.expire(self.site)
        attempts.expire_chunks(self.store, self.site.keep_s)

    def _watch(self, name: str, every_s: float, watch: Callable[[], None]) -> None:
        while not self._stopping.wait(every_s):
            _try(name, watch)

    def close(self) -> None:
        self._stopping.set()
        for loop in self._loops:
            loop.join(LOOP_END_S)
        self.handoffs.close(LOOP_END_S)
        STANDBY.close()
        self.waypoints.close_all()
        if self.coordinator is not None:
            _try("the coordinator", self.coordinator.close)
        self.store.close()
        self.core.close()


def _ask_qemu() -> None:
    qemu_info()


def _try(what: str, act: Callable[[], None]) -> None:
    try:
        act()
    except Exception:
        # an agent that does not start helps nobody: what is wrong stands in the log, and is tried again
        log.exception("looking after %s", what)


# -- requests


def _failure(error: HaulierError, status: int | None = None) -> web.Response:
    body = {"error": str(error), "code": error.exit_code}
    return web.json_response(body, status=status or _STATUS.get(error.exit_code, 500))


def _http_failure(error: web.HTTPException, request: web.Request) -> web.Response:
    if error.status == 404:
        return _failure(UnknownThing(f"there is no {request.method} {request.path[:200]} in this control API"), 404)
    if error.status == 413:
        return _failure(NoRoom(f"the request is larger than {MAX_BODY >> 10} KiB"), 413)
    return _failure(UsageError(f"{request.method} {request.path[:200]}: {error.reason}"), error.status)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HaulierError as error:
        return _failure(error)
    except web.HTTPException as error:
        return _http_failure(error, request)
    except Exception:
        log.exception("%s %s", request.method, request.path)
        return _failure(HaulierError(f"{request.method} {request.path[:200]} failed inside the agent: see its log"))


class _Caller(NamedTuple):
    """Who calls: the operator, or the site that a certificate names, which is good since `begins` (Unix seconds)."""

    operator: bool
    site: str | None = None
    begins: float = 0.0


def _caller(request: web.Request) -> _Caller:
    transport = request.transport
    if transport is None:
        raise NotTrusted("the connection is gone")
    if transport.get_extra_info("socket").family == socket.AF_UNIX:
        return _Caller(True)
    certificate = transport.get_extra_info("peercert")
    return _Caller(False, authority.site_of(certificate), authority.begins_of(certificate))


def _authorize(agent: Daemon, route: Route, caller: _Caller) -> str:
    """The calling site's name, "" for the operator and for nobody. NotTrusted if the route is not for the caller."""
    if route.access is Access.ANYONE:
        return ""
    if caller.operator:
        if route.access is Access.SITE:
            raise NotTrusted(f"{route.method} {route.path} is for other sites, not for the operator")
        return ""
    if caller.site is None:
        raise NotTrusted(f"{route.method} {route.path} needs the certificate of a site of this fleet")
    site = agent.core.trusted_site(caller.site, caller.begins)
    if route.access is Access.OPERATOR:
        raise NotTrusted(
            f"{route.method} {route.path} is for the operator of site {agent.site.name!r}: use the command line there"
        )
    if site.name == agent.site.name and route.access is Access.SITE:
        raise NotTrusted("a site does not call itself")
    return site.name


def _handler(agent: Daemon, route: Route, pool: concurrent.futures.Executor, handing: Handing) -> Handler:
    def work(caller: _Caller, call: Callable[[str], Call], hands: bool) -> tuple[str, Path | None]:
        said = call(_authorize(agent, route, caller))
        text = json.dumps(route.handler(agent, said))
        return text, route.worker(agent, said) if hands and route.worker is not None else None

    async def handle(request: web.Request) -> web.StreamResponse:
        caller = _caller(request)
        body = await request.read()
        if request.headers.get("Content-Encoding") == packing.ENCODING:
            body = packing.unpack(body, MAX_BODY)
        names, query = dict(request.match_info), dict(request.query)
        heard = time.time()
        hands = not caller.operator and request.headers.get(PATH_HEADER) == PATH_VERSION
        loop = asyncio.get_running_loop()
        text, worker = await loop.run_in_executor(
            pool, work, caller, lambda site: Call(site=site, names=names, body=body, query=query), hands
        )
        if not _packs(request):
            return web.Response(text=text, content_type="application/json")
        answer = web.Response(body=packing.pack(text.encode()), content_type="application/json")
        answer.headers["Content-Encoding"] = packing.ENCODING
        return answer if worker is None else await handing.answer(request, answer, worker, heard)

    return handle


def _packs(request: web.Request) -> bool:
    """Who packs what it says understands answers that are packed, and need not say so."""
    return packing.ENCODING in (request.headers.get("Accept-Encoding"), request.headers.get("Content-Encoding"))


async def _spare(request: web.Request, response: web.StreamResponse) -> None:
    """Says no more about itself than a site that counts bytes has use for."""
    if _packs(request):
        for name in ("Server", "Date", "Content-Type"):
            response.headers.popall(name, None)


def _chunk_handler(agent: Daemon, service: ChunkService, pool: concurrent.futures.Executor) -> Handler:
    """Chunks for other sites of the fleet: the one route that is no request and answer."""
    route = Route("GET", chunk_wire.PATH, Access.SITE, lambda agent, call: {})

    async def handle(request: web.Request) -> web.StreamResponse:
        caller = _caller(request)
        loop = asyncio.get_running_loop()
        site = await loop.run_in_executor(pool, _authorize, agent, route, caller)
        return await service.handle(request, site)

    return handle


# -- the daemon


@contextlib.contextmanager
def _only_one(site: Site, what: str) -> Iterator[None]:
    """Conflict if another such daemon serves this site. The lock ends with the process, however it ends."""
    descriptor = os.open(site.run / f"{what}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"an {what} of site {site.name!r} runs already in {site.root}") from None
        yield
    finally:
        os.close(descriptor)


def _listener(site: Site, control: str) -> socket.socket:
    """Bound to the configured address and to nothing else."""
    host, port = split_address(control)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # What is accepted has it, too: acks go with answers.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise HaulierError(
            f"site {site.name!r} cannot listen on {control} ({error.strerror or error}): "
            "is the address this host's, and the port free? An agent's is 'control' in site.toml"
        ) from None
    return listener


async def serve(agent: Daemon, stop: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
    """Listens until `stop` is set. `ready` is called when both listeners accept."""
    site = agent.site
    local = site.check_socket_path(agent.socket)
    context, loop = authority.server_context(site), asyncio.get_running_loop()
    # Not while a connection is being accepted, which this loop does.
    agent.core.reload = partial(loop.call_soon_threadsafe, authority.reload, context, site)
    app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY)
    with concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="request") as pool:
        app.on_response_prepare.append(_spare)
        handing = Handing()
        for route in agent.routes():
            app.router.add_route(route.method, route.path, _handler(agent, route, pool, handing))
        service = ChunkService(agent.store) if agent.store is not None else None
        if service is not None:
            app.router.add_get(chunk_wire.PATH, _chunk_handler(agent, service, pool))
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_GRACE_S)
        await runner.setup()
        try:
            await loop.run_in_executor(pool, agent.tidy)
            await web.UnixSite(runner, str(local)).start()
            local.chmod(0o600)
            await web.SockSite(runner, _listener(site, agent.control), ssl_context=context).start()
            await loop.run_in_executor(pool, agent.recover)
            ready()
            await stop.wait()
        finally:
            handing.close()
            if service is not None:
                await service.close()
            await runner.cleanup()
            local.unlink(missing_ok=True)


async def _main(agent: Daemon) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def ready() -> None:
        log.info("%s of site %s listens on %s and %s", agent.what, agent.site.name, agent.control, agent.socket)
        notify("READY=1")

    await serve(agent, stop, ready)
    notify("STOPPING=1")
    log.info("site %s: the %s ends; guests go on", agent.site.name, agent.what)


def run_daemon(site: Site, what: str, make: Callable[[Site], Daemon]) -> None:
    """Runs what `make` makes until SIGTERM or SIGINT. Conflict if one such runs already at this site."""
    site.make_directories()
    with _only_one(site, what):
        daemon = make(site)
        try:
            asyncio.run(_main(daemon))
        finally:
            daemon.close()


def run(root: Path) -> None:
    """Runs the agent of the site at `root` until SIGTERM or SIGINT. Guests and workers go on after it."""
    run_daemon(Site.load(root), "agent", Agent)
