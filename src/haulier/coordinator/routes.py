"""The coordinator's part of the control API. Sites report about themselves only: the certificate says who calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from haulier.agent.routes import Access, Call, Route
from haulier.agent.site import Site, check_name
from haulier.coordinator import messages as m
from haulier.coordinator.client import PREFIX
from haulier.coordinator.host import Host
from haulier.coordinator.service import Coordinator
from haulier.errors import UnknownThing, UsageError
from haulier.units import FINGERPRINT


class Daemon(Protocol):
    """An agent, or a coordinator's own daemon. `coordinator` is None where a site has none."""

    site: Site
    coordinator: Host | None


def _use(daemon: Daemon, work: Callable[[Coordinator], Any]) -> Any:
    if daemon.coordinator is None:
        raise UnknownThing(
            f"site {daemon.site.name!r} runs no coordinator: ask the one that 'haulier coordinator status' names"
        )
    return daemon.coordinator.use(work)


def _answer(message: Any) -> dict[str, Any]:
    return dict(msgspec.to_builtins(message))


def _who(daemon: Daemon, call: Call) -> str:
    """The site that reports; over the unix socket it is this one."""
    return call.site or daemon.site.name


def lacking(daemon: Daemon, call: Call) -> dict[str, Any]:
    query = call.read(m.LackingQuery)
    return _answer(_use(daemon, lambda c: c.lacking(query)))


def holders(daemon: Daemon, call: Call) -> dict[str, Any]:
    query = call.read(m.HoldersQuery)
    return _answer(_use(daemon, lambda c: c.holders(query)))


def image_holders(daemon: Daemon, call: Call) -> dict[str, Any]:
    query = call.read(m.ImageQuery)
    return _answer(_use(daemon, lambda c: c.image_holders(query)))


def facts(daemon: Daemon, call: Call) -> dict[str, Any]:
    query = call.read(m.FactsQuery)
    return _answer(_use(daemon, lambda c: c.facts(query)))


def unreferenced(daemon: Daemon, call: Call) -> dict[str, Any]:
    site = call.query.get("site") or None
    try:
        after = bytes.fromhex(call.query.get("after", ""))
    except ValueError:
        raise UsageError("'after' is what the last answer named") from None
    if len(after) not in (0, FINGERPRINT):
        raise UsageError("'after' is what the last answer named")
    return _answer(_use(daemon, lambda c: c.unreferenced(site, after)))


def status(daemon: Daemon, call: Call) -> dict[str, Any]:
    return {"coordinator": daemon.site.name, **_use(daemon, lambda c: c.status())}


def sites(daemon: Daemon, call: Call) -> dict[str, Any]:
    return {"sites": _use(daemon, lambda c: c.sites())}


def links(daemon: Daemon, call: Call) -> dict[str, Any]:
    return {"links": _use(daemon, lambda c: c.links())}


def images(daemon: Daemon, call: Call) -> dict[str, Any]:
    return {"images": _use(daemon, lambda c: c.images())}


def guests(daemon: Daemon, call: Call) -> dict[str, Any]:
    return {"guests": _use(daemon, lambda c: c.guests())}


def plan(daemon: Daemon, call: Call) -> dict[str, Any]:
    return {"coordinator": daemon.site.name, **_use(daemon, lambda c: c.plan())}


def hello(daemon: Daemon, call: Call) -> dict[str, Any]:
    report, who = call.read(m.HelloReport), _who(daemon, call)
    return _answer(_use(daemon, lambda c: c.hello(who, report)))


def holdings(daemon: Daemon, call: Call) -> dict[str, Any]:
    report, who = call.read(m.HoldingsReport), _who(daemon, call)
    return _answer(_use(daemon, lambda c: c.holdings(who, report)))


def manifests(daemon: Daemon, call: Call) -> dict[str, Any]:
    report, who = call.read(m.ManifestsReport), _who(daemon, call)
    return _answer(_use(daemon, lambda c: c.manifests(who, report)))


def manifest(daemon: Daemon, call: Call) -> dict[str, Any]:
    report, who = call.read(m.ManifestPart), _who(daemon, call)
    return _answer(_use(daemon, lambda c: c.manifest_part(who, report)))


def guest_report(daemon: Daemon, call: Call) -> dict[str, Any]:
    report, who = call.read(m.GuestsReport), _who(daemon, call)
    _use(daemon, lambda c: c.guest_report(who, report))
    return {}


def link_report(daemon: Daemon, call: Call) -> dict[str, Any]:
    report, who = call.read(m.LinksReport), _who(daemon, call)
    _use(daemon, lambda c: c.link_report(who, report))
    return {}


class ForgetRequest(m.Message, frozen=True, kw_only=True):
    site: m.Text


def forget(daemon: Daemon, call: Call) -> dict[str, Any]:
    name = check_name(call.read(ForgetRequest).site, "site")
    _use(daemon, lambda c: c.forget(name))
    return {"site": name}


TABLE = (
    Route("GET", PREFIX, Access.FLEET, status),
    Route("GET", f"{PREFIX}/sites", Access.FLEET, sites),
    Route("GET", f"{PREFIX}/links", Access.FLEET, links),
    Route("GET", f"{PREFIX}/images", Access.FLEET, images),
    Route("GET", f"{PREFIX}/guests", Access.FLEET, guests),
    Route("GET", f"{PREFIX}/plan", Access.FLEET, plan),
    Route("GET", f"{PREFIX}/unreferenced", Access.OPERATOR, unreferenced),
    Route("POST", f"{PREFIX}/lacking", Access.FLEET, lacking),
    Route("POST", f"{PREFIX}/holders", Access.FLEET, holders),
    Route("POST", f"{PREFIX}/image-holders", Access.FLEET, image_holders),
    Route("POST", f"{PREFIX}/facts", Access.FLEET, facts),
    Route("POST", f"{PREFIX}/hello", Access.FLEET, hello),
    Route("POST", f"{PREFIX}/holdings", Access.FLEET, holdings),
    Route("POST", f"{PREFIX}/manifests", Access.FLEET, manifests),
    Route("POST", f"{PREFIX}/manifest", Access.FLEET, manifest),
    Route("POST", f"{PREFIX}/guests", Access.FLEET, guest_report),
    Route("POST", f"{PREFIX}/links", Access.FLEET, link_report),
    Route("POST", f"{PREFIX}/forget", Access.OPERATOR, forget),
)
