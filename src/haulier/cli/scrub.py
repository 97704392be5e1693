"""`haulier scrub`: read all chunks again, and heal what has decayed."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from haulier.cli.common import Json, Root, client, parse_size, print_json, print_table, size
from haulier.cli.progress import wait


def scrub(
    *,
    rate: Annotated[str, Parameter(help="Bytes a second at most, for example 20M; 0 for no limit.")] = "0",
    root: Root = None,
    json: Json = False,
) -> int:
    """Read every chunk from the disk, compare it with its fingerprint, fetch damaged ones again from other sites.

    The agent does this by itself, once in two weeks. The exit code is 1 if something is lost.
    """
    agent = client(root)
    done = wait(agent, agent.post("/v1/scrub", {"rate": parse_size(rate)}), json)
    if json:
        print_json(done)
    else:
        print_table(
            ("", ""),
            [
                ("read", f"{done['chunks']} chunks, {size(done['bytes'])}"),
                ("damaged", done["corrupt"]),
                ("healed", done["healed"]),
                ("LOST" if done["lost"] else "lost", len(done["lost"])),
            ],
        )
    return 1 if done["lost"] else 0
