"""Images: import, warm, list, remove, commit, push, show, tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from haulier.agent import publishing
from haulier.agent.images import ImportRequest, WarmRequest
from haulier.agent.layers import CommitRequest, PushRequest
from haulier.agent.routes import Access, Call, Route
from haulier.images.messages import PushOffer

if TYPE_CHECKING:
    from haulier.agent.server import Agent


def listing(agent: Agent, call: Call) -> dict[str, Any]:
    return {"images": [each | agent.layers.facts(each["name"]) for each in agent.images.list()]}


def show(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.layers.show(call.names["name"])


def manifest(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.layers.manifest(call.names["name"])


def tree(agent: Agent, call: Call) -> dict[str, Any]:
    return {"images": agent.layers.tree()}


def add(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.images.add(call.read(ImportRequest))))


def warm(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.images.warm(call.names["name"], call.read(WarmRequest))))


def commit(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.layers.commit(call.read(CommitRequest))))


def publish(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(publishing.publish(agent.core, agent.store, call.names["name"])))


def push(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.layers.push(call.read(PushRequest))))


def take(agent: Agent, call: Call) -> dict[str, Any]:
    return dict(msgspec.to_builtins(agent.layers.take(call.read(PushOffer), call.site)))


def remove(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.layers.remove(call.names["name"])


TABLE = (
    Route("GET", "/v1/images", Access.FLEET, listing),
    Route("POST", "/v1/images", Access.OPERATOR, add),
    Route("GET", "/v1/images/{name}", Access.FLEET, show),
    Route("GET", "/v1/images/{name}/manifest", Access.FLEET, manifest),
    Route("POST", "/v1/images/{name}/warm", Access.OPERATOR, warm),
    Route("DELETE", "/v1/images/{name}", Access.OPERATOR, remove),
    Route("GET", "/v1/image-tree", Access.FLEET, tree),
    Route("POST", "/v1/image-commits", Access.OPERATOR, commit),
    Route("POST", "/v1/images/{name}/publish", Access.OPERATOR, publish),
    Route("POST", "/v1/image-pushes", Access.OPERATOR, push),
    Route("POST", "/v1/peer/pushes", Access.SITE, take),
)
