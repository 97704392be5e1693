"""Sites: what this one is, which others there are, joining, leaving, and renewing a certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import haulier
from haulier.agent import joining, membership
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
    return joining.listed(agent.journal)


def authority(agent: Agent, call: Call) -> dict[str, Any]:
    """Public: a joiner compares it with the fingerprint in its token before it believes it."""
    return {"ca": agent.site.ca_certificate.read_text()}


def join(agent: Agent, call: Call) -> dict[str, Any]:
    return joining.admit(agent.site, agent.journal, call.read(joining.JoinRequest))


def remove(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.membership.remove(call.names["name"], call.query.get("force") == "1")


def renew(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.membership.renew()


def needed(agent: Agent, call: Call) -> dict[str, Any]:
    return {"needed": agent.membership.needed(call.read(membership.Leaving).site)}


def refresh(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.membership.told(call.site)


def certificate(agent: Agent, call: Call) -> dict[str, Any]:
    return agent.membership.certify(call.site, call.read(membership.Renewal))


FACTS = (Route("GET", "/v1/site", Access.FLEET, show), Route("GET", "/v1/sites", Access.FLEET, listing))
"""What a coordinator on its own answers, too."""
TABLE = (
    *FACTS,
    Route("GET", "/v1/join", Access.ANYONE, authority),
    Route("POST", "/v1/join", Access.ANYONE, join),
    Route("DELETE", "/v1/sites/{name}", Access.OPERATOR, remove),
    Route("POST", "/v1/site/renew", Access.OPERATOR, renew),
    Route("POST", "/v1/peer/needed", Access.SITE, needed),
    Route("POST", "/v1/peer/refresh", Access.SITE, refresh),
    Route("POST", "/v1/peer/certificate", Access.SITE, certificate),
)
