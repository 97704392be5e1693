"""Jobs, the cache, garbage collection, and the examination of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from haulier.agent import upkeep
from haulier.agent.cache import Change, PinRequest
from haulier.agent.health import ScrubRequest
from haulier.agent.routes import Access, Call, Route

if TYPE_CHECKING:
    from haulier.agent.server import Agent


def jobs(agent: Agent, call: Call) -> dict[str, Any]:
    return {"jobs": [msgspec.to_builtins(job) for job in agent.core.jobs.all()]}


def job(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.core.jobs.get(call.names["id"])))


def cancel(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.core.jobs.cancel(call.names["id"])))


def gc(agent: Agent, call: Call) -> dict[str, Any]:
    request = call.read(upkeep.GcRequest)
    return dict(msgspec.to_builtins(upkeep.collect(agent.core, agent.store, agent.cache, request)))


def cache(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.cache.facts()


def change_cache(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.cache.change(call.read(Change))


def pin(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.cache.pin(call.names["name"], call.read(PinRequest))


def doctor(agent: Agent, call: Call) -> dict[str, Any]:
    return upkeep.examine(agent.core, agent.health)


def repair(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.health.repair()))


def scrub(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.health.scrub(call.read(ScrubRequest))))


def network(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.tunnels.facts() | {"waypoints": agent.waypoints.facts()}


TABLE = (
    Route("GET", "/v1/doctor/network", Access.OPERATOR, network),
    Route("GET", "/v1/jobs", Access.OPERATOR, jobs),
    Route("GET", "/v1/jobs/{id}", Access.OPERATOR, job),
    Route("POST", "/v1/jobs/{id}/cancel", Access.OPERATOR, cancel),
    Route("POST", "/v1/gc", Access.OPERATOR, gc),
    Route("GET", "/v1/cache", Access.OPERATOR, cache),
    Route("POST", "/v1/cache", Access.OPERATOR, change_cache),
    Route("POST", "/v1/images/{name}/pin", Access.OPERATOR, pin),
    Route("GET", "/v1/doctor", Access.OPERATOR, doctor),
    Route("POST", "/v1/doctor/repair", Access.OPERATOR, repair),
    Route("POST", "/v1/scrub", Access.OPERATOR, scrub),
)
