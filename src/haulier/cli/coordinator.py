"""`haulier coordinator`: run it, say which one this site uses, and ask it."""

from __future__ import annotations

import time
from typing import Annotated, Any

from cyclopts import App, Parameter

from haulier.cli.common import Json, Root, SiteName, console, load_site, print_json, print_table, size
from haulier.coordinator.address import HERE, Address
from haulier.coordinator.client import CoordinatorClient
from haulier.errors import UsageError
from haulier.units import CHUNK

coordinator_app = App(name="coordinator", help="Who holds which chunk, and what the fleet consists of.")


@coordinator_app.command
def run(
    *,
    listen: Annotated[
        str, Parameter(env_var="HAULIER_LISTEN", help="HOST:PORT to listen on. [this site's control address]")
    ] = "",
    database: Annotated[
        str, Parameter(env_var="HAULIER_DATABASE", help="postgresql://..., instead of a file of this site.")
    ] = "",
    root: Root = None,
) -> None:
    """Run the coordinator, in the foreground, until SIGTERM. Agents go on without it."""
    from haulier.cli.agent import set_up_log
    from haulier.coordinator import daemon

    site = load_site(root)
    set_up_log(site.root / "coordinator.log")
    daemon.run(site.root, listen, database)


@coordinator_app.command
def use(
    where: str,
    /,
    *,
    database: Annotated[str, Parameter(help="With 'here': postgresql://..., instead of a file of this site.")] = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Say which coordinator this site reports to and asks.

    Parameters
    ----------
    where
        https://HOST:PORT, https://SITE@HOST:PORT, 'here' for one in this site's agent, or 'none'.
    """
    site = load_site(root)
    text = "" if where == "none" else str(Address.parse(where))
    if database and text != HERE:
        raise UsageError("--database goes with 'here': a coordinator elsewhere has its own")
    restart = (text == HERE) != (site.coordinator == HERE) or database != site.database
    site.set(coordinator=text, database=database)
    facts = {"site": site.name, "coordinator": text, "restart_agent": restart}
    if json:
        print_json(facts)
    else:
        told = "restart its agent" if restart else "its agent takes that up within seconds"
        console.print(f"site {site.name} uses coordinator {text or 'none'}; {told}", highlight=False)


@coordinator_app.command
def status(*, root: Root = None, json: Json = False) -> None:
    """Show what this site's coordinator knows: sites, links, images, guests, and the size of its index."""
    facts = _client(root).status()
    if json:
        print_json(facts)
        return
    database, chunks = facts["database"], facts["chunks"]
    console.print(
        f"coordinator of site {facts['coordinator']}: {database['kind']} at {database['where']},"
        f" {size(database['bytes'])}; {chunks['held']} chunks ({size(chunks['held'] * CHUNK)}) at {len(facts['sites'])}"
        f" sites, {chunks['unreferenced']} of them in no manifest",
        highlight=False,
    )
    now = facts["time"]
    print_table(
        ("SITE", "CONTROL", "SEEN", "CHUNKS", "MANIFESTS", "GUESTS"),
        [
            (s["name"], s["control"], f"{max(now - s['seen'], 0):.0f} s ago", s["chunks"], s["manifests"], s["guests"])
            for s in facts["sites"]
        ],
    )
    if facts["links"]:
        print_table(
            ("FROM", "TO", "RATE", "RTT", "MEASURED"),
            [
                (
                    link["from"],
                    link["to"],
                    f"{link['rate_bps'] / 1e6:.1f} Mbps",
                    f"{link['rtt_s'] * 1000:.0f} ms",
                    time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(link["measured"])),
                )
                for link in facts["links"]
            ],
        )
    if facts["images"]:
        print_table(
            ("IMAGE", "LAYER", "DIGEST", "SIZE", "AT"),
            [(i["name"], i["layer"], i["digest"][:12], size(i["size"]), " ".join(i["sites"])) for i in facts["images"]],
        )
    if facts["guests"]:
        print_table(
            ("GUEST", "OWNER", "EPOCH", ""),
            [(g["name"], g["owner"], g["epoch"], "DISPUTED" if g["disputed"] else "") for g in facts["guests"]],
        )


@coordinator_app.command
def plan(*, root: Root = None, json: Json = False) -> None:
    """Show which layers each site had best keep in its cache, by the coordinator's plan over all sites."""
    facts = _client(root).plan()
    if json:
        print_json(facts)
        return
    console.print(
        f"plan of {facts['layers']} layers for {len(facts['sites'])} sites: expected to save"
        f" {facts['fetch_s_saved']:.1f} of {facts['fetch_s_now']:.1f} s of fetching",
        highlight=False,
    )
    print_table(
        ("SITE", "PLAN", "LAYER", "SIZE", "HERE", ""),
        [
            (site["site"], what, " ".join(each["names"]), size(each["bytes"]), size(each["here"]), _remark(each))
            for site in facts["sites"]
            for what in ("keep", "missing", "over")
            for each in site[what]
        ],
    )


def _remark(layer: dict[str, Any]) -> str:
    if layer["pinned"]:
        return "in use or pinned"
    return "no other site keeps it" if layer.get("elsewhere") is False else ""


@coordinator_app.command
def forget(site: SiteName, /, *, root: Root = None, json: Json = False) -> None:
    """Forget what a site reported, because it has left the fleet. Where the coordinator runs."""
    _client(root).forget(site)
    if json:
        print_json({"site": site})


@coordinator_app.command
def spread(
    *,
    database: Annotated[str, Parameter(help="postgresql://... of the coordinator; it must hold no chunks yet.")],
    shard: Annotated[list[str], Parameter(negative="", help="postgresql://... of an empty database; once for each.")],
    json: Json = False,
) -> None:
    """Spread the chunk dictionary over several PostgreSQL servers, once, before the coordinator is first used."""
    from haulier.coordinator.host import needs_psycopg
    from haulier.coordinator.shards import spread as work

    needs_psycopg()
    names = work(database, shard)
    if json:
        print_json({"servers": names})
    else:
        console.print(f"the chunk dictionary is spread over {' '.join(names)}", highlight=False)


def _client(root: Root) -> CoordinatorClient:
    return CoordinatorClient.near(load_site(root))
