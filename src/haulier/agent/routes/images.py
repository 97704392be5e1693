"""Images: import, warm, list, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from haulier.agent.images import ImportRequest, WarmRequest
from haulier.agent.routes import Access, Call, Route

if TYPE_CHECKING:
    from haulier.agent.server import Agent


def listing(agent: Agent, call: Call) -> dict[str, Any]:
    return {"images": agent.images.list()}


def add(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.images.add(call.read(ImportRequest))))


def warm(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.images.warm(call.names["name"], call.read(WarmRequest))))


def remove(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.images.remove(call.names["name"])


TABLE = (
    Route("GET", "/v1/images", Access.FLEET, listing),
    Route("POST", "/v1/images", Access.OPERATOR, add),
    Route("POST", "/v1/images/{name}/warm", Access.OPERATOR, warm),
    Route("DELETE", "/v1/images/{name}", Access.OPERATOR, remove),
)
