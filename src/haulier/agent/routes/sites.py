"""Sites: what this one is, which others there are, and joining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

import haulier
from haulier.agent.joining import JoinRequest, admit
from haulier.agent.routes import Access, Call, Route

if TYPE_CHECKING:
    from haulier.agent.server import Agent


def show(agent: Agent, call: Call) -> dict[str, Any]:
    site = agent.site
    return {"name": site.name, "control": site.control, "bulk": list(site.bulk), "version": haulier.__version__}


def listing(agent: Agent, call: Call) -> dict[str, Any]:
    if not call.site:
        # the operator wants to see who joined lately; a site asking is answered from what is known, or two
        # sites could ask each other for ever
        agent.core.refresh_sites()
    return {"sites": [msgspec.to_builtins(row) for row in agent.journal.sites()]}


def authority(agent: Agent, call: Call) -> dict[str, Any]:
    """Public: a joiner compares it with the fingerprint in its token before it believes it."""
    return {"ca": agent.site.ca_certificate.read_text()}


def join(agent: Agent, call: Call) -> dict[str, Any]:
    return admit(agent.site, agent.journal, call.read(JoinRequest))


TABLE = (
    Route("GET", "/v1/site", Access.FLEET, show),
    Route("GET", "/v1/sites", Access.FLEET, listing),
    Route("GET", "/v1/join", Access.ANYONE, authority),
    Route("POST", "/v1/join", Access.ANYONE, join),
)
