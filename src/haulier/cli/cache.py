"""`haulier cache`: what the site keeps although nothing refers to it, and by which rule."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter

from haulier.cli.common import Json, Root, client, console, parse_size, print_json, print_table, size

cache_app = App(name="cache", help="The cache of this site: chunks kept beyond what guests and images need.")


@cache_app.command
def show(*, root: Root = None, json: Json = False) -> None:
    """Show budget, policy, what is in use and what is cached."""
    _print(client(root).get("/v1/cache"), json)


@cache_app.command
def policy(name: str, /, *, root: Root = None, json: Json = False) -> None:
    """Choose the policy: lru, lfu, gdsf, s3-fifo or coordinated. It rules from now on, and is kept in site.toml.

    Parameters
    ----------
    name
        Name of the policy.
    """
    _print(client(root).post("/v1/cache", {"policy": name}), json)


@cache_app.command
def budget(
    amount: Annotated[str, Parameter(help="For example 40G, 500M, or 0 for no limit.")],
    /,
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Set how many bytes the store may take. What is in use stays, whatever the budget; the cache gives way."""
    _print(client(root).post("/v1/cache", {"budget": parse_size(amount)}, timeout=600), json)


def _print(facts: dict[str, Any], json: bool) -> None:
    if json:
        print_json(facts)
        return
    limit = size(facts["budget"]) if facts["budget"] else "no limit"
    rows = [
        ("policy", facts["policy"]),
        ("budget", limit),
        ("in use", f"{size(facts['referenced'])}, {facts['chunks'] - facts['cached_chunks']} chunks"),
        ("cached", f"{size(facts['cached'])}, {facts['cached_chunks']} chunks"),
        ("evicted since the agent started", f"{size(facts['evicted_bytes'])}, {facts['evicted_chunks']} chunks"),
    ]
    if facts["over"]:
        rows.append(("OVER BUDGET", f"what is in use takes {size(facts['over'])} more than the budget"))
    for image in facts["images"]:
        state = "pinned" if image["pinned"] else "cached"
        rows.append((f"image {image['name']}", f"{state}, {image['here']} of {image['chunks']} chunks here"))
    print_table(("", ""), rows)


def pin(name: str, pinned: bool, force: bool, root: Any, json: bool) -> None:
    """What `haulier image pin` and `unpin` do."""
    from haulier.agent.client import path_segment

    found = client(root).post(f"/v1/images/{path_segment(name)}/pin", {"pinned": pinned, "force": force}, timeout=600)
    if json:
        print_json(found)
    else:
        state = "is kept" if found["pinned"] else "may be evicted when room is needed"
        console.print(f"image {name} {state}: {found['here']} of {found['chunks']} chunks here", highlight=False)
