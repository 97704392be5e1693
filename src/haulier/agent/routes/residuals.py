"""Data left behind: shown, filled, released; and what the two sites say to each other about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from haulier.agent.residuals import ResidualMessage
from haulier.agent.routes import Access, Call, Route

if TYPE_CHECKING:
    from haulier.agent.server import Agent


class FillRequest(msgspec.Struct, forbid_unknown_fields=True):
    mode: str = "full"


class ReleaseRequest(msgspec.Struct, forbid_unknown_fields=True):
    force: bool = False


def listing(agent: Agent, call: Call) -> dict[str, Any]:
    return {"here": agent.residuals.here(), "left": agent.residuals.left()}


def fill(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.residuals.fill(call.names["name"], call.read(FillRequest).mode)))


def release(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.residuals.release(call.names["name"], call.read(ReleaseRequest).force)


def told(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.residuals.told(call.read(ResidualMessage), call.site)


def asked(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.residuals.asked(call.read(ResidualMessage), call.site)


TABLE = (
    Route("GET", "/v1/residuals", Access.FLEET, listing),
    Route("POST", "/v1/guests/{name}/fill", Access.OPERATOR, fill),
    Route("POST", "/v1/guests/{name}/release", Access.OPERATOR, release),
    Route("POST", "/v1/peer/residual", Access.SITE, told),
    Route("POST", "/v1/peer/residual/left", Access.SITE, asked),
)
