"""`haulier site`: make a site, admit another, join a fleet, leave it, renew a certificate, list the sites."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from haulier.agent import authority, joining
from haulier.agent.client import Client, path_segment
from haulier.agent.site import Site, default_root
from haulier.cli.common import Json, Root, SiteName, client, console, load_site, print_json, print_table, tell
from haulier.cli.progress import wait
from haulier.coordinator.client import CoordinatorClient
from haulier.errors import HaulierError, UsageError
from haulier.handoff.journal import Journal

site_app = App(name="site", help="This site and the others of the fleet.")

Address = Annotated[str, Parameter(name="--address", help="HOST:PORT of this site's control API.")]
Bulk = Annotated[
    list[str] | None,
    Parameter(
        name="--bulk", negative="", help="Address on which guests arrive; once for each path. [the control host]"
    ),
]


def _made(site: Site, json: bool) -> None:
    facts = {"name": site.name, "root": str(site.root), "control": site.control, "bulk": list(site.bulk)}
    if json:
        print_json(facts)
    else:
        console.print(f"site {site.name} made in {site.root}; start it with 'haulier agent'", highlight=False)


@site_app.command
def init(name: SiteName, /, *, address: Address, bulk: Bulk = None, root: Root = None, json: Json = False) -> None:
    """Make the first site of a fleet, with a certificate authority for all of it."""
    _made(joining.init(root or default_root(), name, address, bulk or ()), json)


@site_app.command
def token(
    *,
    site: Annotated[str, Parameter(help="Only for this site; it may exist already and is then set up anew.")] = "",
    minutes: Annotated[float, Parameter(help="How long the token is good.")] = authority.TOKEN_LIFETIME_S / 60,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make a token with which one other site may join, once. At the site that made the fleet."""
    if not 0 < minutes <= 7 * 24 * 60:
        raise UsageError(f"a token is good for more than 0 minutes and at most a week, not {minutes:g} minutes")
    here = load_site(root)
    with Journal(here.journal) as journal:
        text = authority.new_token(here, journal, site, minutes * 60)
    if json:
        print_json({"token": text, "minutes": minutes, "site": site, "via": here.control})
    else:
        print(text)


@site_app.command
def join(
    name: SiteName,
    /,
    *,
    via: Annotated[str, Parameter(help="HOST:PORT of the site that made the token; its agent must run.")],
    token: Annotated[str, Parameter(help="What 'haulier site token' printed there.")],
    address: Address,
    bulk: Bulk = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make a site that belongs to an existing fleet."""
    _made(joining.join(root or default_root(), name, address, bulk or (), via, token), json)


@site_app.command
def remove(
    name: SiteName,
    /,
    *,
    force: Annotated[
        bool, Parameter(negative="", help="Also while others need it: that site is gone for good, with all it had.")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Put a site out of the fleet. At the site that made the fleet.

    Its certificate is heard no more, here at once and at the other sites when they hear of it. It may join again.
    """
    here = load_site(root)
    agent = Client.local(here)
    job = agent.delete(f"/v1/sites/{path_segment(name)}{'?force=1' if force else ''}")
    facts = wait(agent, job, json)
    facts["coordinator"] = _forgotten(here, name)
    untold, known = facts["untold"], facts["coordinator"]
    text = f"site {name} is out of the fleet"
    if untold:
        text += f"; {', '.join(untold)} did not answer and will learn of it within an hour of being back"
    if not known:
        text += f"; run 'haulier coordinator forget {name}' where the coordinator runs"
    tell(facts, json, text)


def _forgotten(here: Site, name: str) -> bool:
    """Whether no coordinator counts on what that site has, as far as it can be told from here."""
    if not here.coordinator:
        return True
    try:
        CoordinatorClient.near(here).forget(name)
    except HaulierError:
        return False
    return True


@site_app.command
def renew(*, root: Root = None, json: Json = False) -> None:
    """Renew this site's certificate. The agent does so by itself, a year before the end."""
    facts = client(root).post("/v1/site/renew")
    tell(facts, json, f"the certificate of site {facts['site']} is good for {facts['days']:.0f} days")


@site_app.command(name="list")
def listing(*, root: Root = None, json: Json = False) -> None:
    """List the sites of the fleet."""
    here = load_site(root)
    sites = client(root).sites()
    if json:
        print_json({"sites": sites})
        return
    print_table(
        ("SITE", "CONTROL", "BULK", ""),
        [(s["name"], s["control"], " ".join(s["bulk"]), "this site" if s["name"] == here.name else "") for s in sites],
    )
