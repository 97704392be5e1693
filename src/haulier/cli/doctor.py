"""`haulier doctor`: what this host can do, and what is wrong."""

from __future__ import annotations

from haulier.cli.common import Json, Root, client, print_json, print_table


def doctor(*, root: Root = None, json: Json = False) -> int:
    """Examine this site's host and the other sites. The exit code is 1 if something is wrong."""
    found = client(root).get("/v1/doctor", timeout=120)
    if json:
        print_json(found)
    else:
        print_table(
            ("", "", "FOUND", "ADVICE"),
            [("ok" if c["ok"] else "WRONG", c["name"], c["found"], c["advice"]) for c in found["checks"]],
        )
    return 0 if found["ok"] else 1
