"""Guests: run, start, stop, remove, verify, list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from haulier.agent.guests import AdoptRequest, RunRequest
from haulier.agent.routes import Access, Call, Route
from haulier.agent.tunnels import NetRequest

if TYPE_CHECKING:
    from haulier.agent.server import Agent


class StopRequest(msgspec.Struct, forbid_unknown_fields=True):
    deadline_s: float = 60.0
    force: bool = False


def listing(agent: Agent, call: Call) -> dict[str, Any]:
    return {"guests": agent.guests.list()}


def show(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.guests.show(call.names["name"])


def run(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.guests.run(call.read(RunRequest))))


def adopt(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.guests.adopt_lxc(call.read(AdoptRequest))


def start(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.guests.start(call.names["name"])))


def stop(agent: Agent, call: Call) -> dict[str, Any]:
    request = call.read(StopRequest)
    job = agent.guests.stop(call.names["name"], min(max(request.deadline_s, 0.0), 3600.0), request.force)
    return dict(msgspec.to_builtins(job))


def remove(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.guests.remove(call.names["name"], force=call.query.get("force") == "1")


def net(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.tunnels.set_net(call.names["name"], call.read(NetRequest))


def verify(agent: Agent, call: Call) -> dict[str, Any]:
    name = call.names["name"]
    agent.guests.show(name)

    def work(progress: Any) -> dict[str, Any]:
        from haulier.handoff.verify import verify_guest

        return dict(verify_guest(agent.site, agent.journal, name, progress))

    return dict(msgspec.to_builtins(agent.core.jobs.start("verify", name, work)))


TABLE = (
    Route("GET", "/v1/guests", Access.FLEET, listing),
    Route("POST", "/v1/guests", Access.OPERATOR, run),
    Route("POST", "/v1/lxc", Access.OPERATOR, adopt),
    Route("GET", "/v1/guests/{name}", Access.OPERATOR, show),
    Route("DELETE", "/v1/guests/{name}", Access.OPERATOR, remove),
    Route("POST", "/v1/guests/{name}/start", Access.OPERATOR, start),
    Route("POST", "/v1/guests/{name}/stop", Access.OPERATOR, stop),
    Route("POST", "/v1/guests/{name}/net", Access.OPERATOR, net),
    Route("POST", "/v1/guests/{name}/verify", Access.OPERATOR, verify),
)
