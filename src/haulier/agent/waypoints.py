"""Waypoints that this site is for handoffs between other sites of the fleet."""

from __future__ import annotations

import logging
import threading
from typing import Any, Final

import msgspec

from haulier.agent.core import Core
from haulier.agent.site import check_name, split_address
from haulier.errors import Conflict, NoRoom, UsageError
from haulier.network.rules import AUTO
from haulier.network.waypoint import Waypoint

log = logging.getLogger(__name__)

MOST: Final = 8
_LOWEST_PORT: Final = 1024


class WaypointRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The caller's handoff `handoff` goes to `port` at site `to`: the worker there listens on it."""

    handoff: str
    to: str
    port: int


class Waypoints:
    """One agent's. Blocking; any thread may call. None outlives the agent: a session has other paths."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], Waypoint] = {}

    def open(self, request: WaypointRequest, caller: str) -> dict[str, Any]:
        """Opens one; where it is to be reached. It leads to a site of the fleet alone, never to another address.

        Raises UsageError, UnknownThing for another site, NoRoom when there are enough.
        """
        check_name(request.handoff, "handoff")
        if request.to == caller or not _LOWEST_PORT <= request.port < 1 << 16:
            raise UsageError(f"port {request.port} of site {request.to[:40]!r} is nothing that a handoff leads to")
        there = self.core.other_site(request.to)
        site = self.core.site
        key = (caller, request.handoff)
        with self._lock:
            self._forget_closed()
            if key in self._open:
                raise Conflict(f"site {site.name!r} is a waypoint of handoff {request.handoff} already")
            if len(self._open) >= MOST:
                raise NoRoom(f"site {site.name!r} is a waypoint of {MOST} handoffs already: leave it out, or wait")
            addresses = [each for each in there.bulk if each != AUTO] or [split_address(there.control)[0]]
            found = self._open[key] = Waypoint(site.listening(), addresses, request.port)
        log.info("waypoint of handoff %s from site %s to %s, port %d", request.handoff, caller, there.name, found.port)
        return {"port": found.port, "bulk": list(site.reachable())}

    def close(self, handoff: str, caller: str) -> dict[str, Any]:
        """The handoff is over; what was carried. No error if there is none."""
        with self._lock:
            found = self._open.pop((caller, handoff), None)
        if found is not None:
            found.close()
            log.info("waypoint of handoff %s from site %s: %d bytes", handoff, caller, found.carried)
        return {"carried": found.carried if found is not None else 0}

    def facts(self) -> list[dict[str, Any]]:
        """Those that are open."""
        with self._lock:
            self._forget_closed()
            return [
                {"source": caller, "handoff": handoff, "port": found.port, "carried": found.carried}
                for (caller, handoff), found in sorted(self._open.items())
            ]

    def close_all(self) -> None:
        with self._lock:
            found, self._open = list(self._open.values()), {}
        for waypoint in found:
            waypoint.close()

    def _forget_closed(self) -> None:
        self._open = {key: found for key, found in self._open.items() if found.open}
