"""`haulier doctor`: what this host can do, and what is wrong."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from haulier.cli.common import Json, Root, client, print_json, print_table
from haulier.cli.progress import wait


def doctor(
    *,
    repair: Annotated[
        bool,
        Parameter(negative="", help="Read all of the store, put right what can be, fetch what is lost from others."),
    ] = False,
    root: Root = None,
    json: Json = False,
) -> int:
    """Examine this site's host, its store and the other sites. The exit code is 1 if something is wrong."""
    if repair:
        return _repair(root, json)
    found = client(root).get("/v1/doctor", timeout=120)
    if json:
        print_json(found)
    else:
        print_table(
            ("", "", "FOUND", "ADVICE"),
            [("ok" if c["ok"] else "WRONG", c["name"], c["found"], c["advice"]) for c in found["checks"]],
        )
    return 0 if found["ok"] else 1


def _repair(root: Root, json: bool) -> int:
    agent = client(root)
    done = wait(agent, agent.post("/v1/doctor/repair"), json)
    if json:
        print_json(done)
        return 0 if done["ok"] else 1
    found = done["found"]
    print_table(
        ("", ""),
        [
            ("chunks read", found["chunks"]),
            ("damaged", len(found["corrupt"])),
            ("missing", len(found["missing"])),
            ("reference counts put right", found["wrong_references"]),
            ("damaged manifests", " ".join(found["damaged_manifests"]) or 0),
            ("lost: no other site has them", len(done["lost"])),
            ("the store is", "whole" if done["ok"] else "NOT WHOLE"),
        ],
    )
    return 0 if done["ok"] else 1
