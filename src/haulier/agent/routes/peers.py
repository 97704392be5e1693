"""What another site may ask of this one in the course of a handoff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from haulier.agent import offers
from haulier.agent.handoffs import OwnershipMessage
from haulier.agent.routes import Access, Call, Route
from haulier.agent.tunnels import RoutedMessage
from haulier.agent.waypoints import WaypointRequest
from haulier.handoff.messages import Offer, Resumption

if TYPE_CHECKING:
    from haulier.agent.server import Agent


def offer(agent: Agent, call: Call) -> dict[str, Any]:
    return offers.take(agent.core, agent.store, agent.cache, call.read(dict[str, Any]), call.site)


def offered(agent: Agent, call: Call) -> Path | None:
    """Where the worker of an offer that was taken waits for its connection."""
    path = agent.site.offer_socket(call.read(Offer).handoff)
    return path if path.is_socket() else None


def prefetch(agent: Agent, call: Call) -> dict[str, Any]:
    return offers.take_prefetch(agent.core, agent.store, agent.cache, call.read(dict[str, Any]), call.site)


def look(agent: Agent, call: Call) -> dict[str, Any]:
    return offers.look(agent.core, agent.store, agent.cache, call.read(dict[str, Any]), call.site)


def probe(agent: Agent, call: Call) -> dict[str, Any]:
    """The caller measures the link by how long this takes."""
    return {"bytes": len(call.body)}


def lacking(agent: Agent, call: Call) -> dict[str, Any]:
    return offers.lacking(agent.store, call.read(offers.Lacking))


def ownership(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.handoffs.ownership(call.read(OwnershipMessage), call.site)


def resumption(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.handoffs.resume_target(call.read(Resumption), call.site)


def routed(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.tunnels.routed(call.read(RoutedMessage), call.site)


def waypoint(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.waypoints.open(call.read(WaypointRequest), call.site)


def no_waypoint(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.waypoints.close(call.names["id"], call.site)


TABLE = (
    Route("POST", "/v1/peer/routed", Access.SITE, routed),
    Route("POST", "/v1/peer/offers", Access.SITE, offer, offered),
    Route("POST", "/v1/peer/prefetches", Access.SITE, prefetch),
    Route("POST", "/v1/peer/look", Access.SITE, look),
    Route("POST", "/v1/peer/probe", Access.SITE, probe),
    Route("POST", "/v1/peer/lacking", Access.SITE, lacking),
    Route("POST", "/v1/peer/ownership", Access.SITE, ownership),
    Route("POST", "/v1/peer/resumptions", Access.SITE, resumption),
    Route("POST", "/v1/peer/waypoints", Access.SITE, waypoint),
    Route("DELETE", "/v1/peer/waypoints/{id}", Access.SITE, no_waypoint),
)
