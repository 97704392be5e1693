"""Handoffs: plan, begin, show, cancel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from haulier.agent.client import Client
from haulier.agent.handoffs import StartRequest
from haulier.agent.routes import Access, Call, Route
from haulier.handoff import attempts
from haulier.handoff.messages import Offer, Options

if TYPE_CHECKING:
    from haulier.agent.server import Agent


class PlanRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    guest: str
    to: str
    options: Options = Options()


class _Peer:
    """The target's agent, as a plan needs it."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def look(self, offer: Offer) -> dict[str, Any]:
        return self._client.look(msgspec.to_builtins(offer))

    def measure(self) -> tuple[float, float]:
        return self._client.measure()

    def lacking(self, fingerprints: Sequence[bytes]) -> list[int]:
        return self._client.lacking(fingerprints)


def plan(agent: Agent, call: Call) -> dict[str, Any]:
    from haulier.handoff.plan import make_plan

    request = call.read(PlanRequest)
    agent.guests.show(request.guest)
    return dict(
        make_plan(
            agent.site, agent.journal, request.guest, request.to, _Peer(agent.core.peer(request.to)), request.options
        )
    )


def listing(agent: Agent, call: Call) -> dict[str, Any]:
    return {"handoffs": agent.handoffs.list(call.query.get("guest", ""))}


def show(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.handoffs.show(call.names["id"])


def start(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.handoffs.start(call.read(StartRequest))


def prefetch(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.handoffs.prefetch(call.read(StartRequest))


def cancel(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.handoffs.cancel(call.names["id"])


def reclaim(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.handoffs.reclaim(call.names["name"])


def kept(agent: Agent, call: Call) -> dict[str, Any]:
    """What lies here for guests that are elsewhere, or are to go."""
    return attempts.facts(agent.site)


TABLE = (
    Route("GET", "/v1/kept", Access.OPERATOR, kept),
    Route("POST", "/v1/plan", Access.OPERATOR, plan),
    Route("GET", "/v1/handoffs", Access.FLEET, listing),
    Route("POST", "/v1/handoffs", Access.OPERATOR, start),
    Route("POST", "/v1/prefetches", Access.OPERATOR, prefetch),
    Route("GET", "/v1/handoffs/{id}", Access.FLEET, show),
    Route("POST", "/v1/handoffs/{id}/cancel", Access.OPERATOR, cancel),
    Route("POST", "/v1/guests/{name}/reclaim", Access.OPERATOR, reclaim),
)
