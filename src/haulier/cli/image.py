"""`haulier image`: import, warm, list, remove."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from haulier.agent.client import path_segment
from haulier.cli.common import Json, Root, client, console, parse_memory, print_json, print_table, size
from haulier.cli.progress import wait

image_app = App(name="image", help="Images of this site and their golden snapshots.")

Memory = Annotated[str, Parameter(name="--memory", help="Memory of the snapshot's guests, for example 512M.")]
Vcpus = Annotated[int, Parameter(name="--vcpus", help="Processors of the snapshot's guests.")]


@image_app.command(name="import")
def import_(
    file: Path,
    /,
    *,
    name: Annotated[str, Parameter(help="Name of the image [default: the file's, without its ending].")] = "",
    warm: Annotated[bool, Parameter(help="Boot it once and keep a golden snapshot.")] = True,
    memory: Memory = "512M",
    vcpus: Vcpus = 1,
    kind: Annotated[str, Parameter(help="vm or container [default: by what it is].")] = "",
    base: Annotated[str, Parameter(help="Container image that this is a layer on top of.")] = "",
    command: Annotated[str, Parameter(help="What a container runs, as one text.")] = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Import an image: a disk (raw or qcow2), or for containers a root file system (directory, tar) or OCI layout.

    Parameters
    ----------
    file
        The image, on the agent's host.
    """
    agent = client(root)
    body = {
        "file": str(file.absolute()),
        "name": name or file.name.split(".")[0].lower(),
        "warm": warm,
        "memory_mib": parse_memory(memory),
        "vcpus": vcpus,
        "kind": kind,
        "base": base,
        "config": {"command": shlex.split(command)},
    }
    result = wait(agent, agent.post("/v1/images", body), json)
    if json:
        print_json(result)
    else:
        console.print(f"image {result['name']}: {size(result['size'])}, {result['chunks']} chunks", highlight=False)


@image_app.command
def warm(name: str, /, *, memory: Memory = "512M", vcpus: Vcpus = 1, root: Root = None, json: Json = False) -> None:
    """Boot an image to idle once and keep its memory, so that guests start from it in about a second.

    Parameters
    ----------
    name
        Name of the image.
    """
    agent = client(root)
    body = {"memory_mib": parse_memory(memory), "vcpus": vcpus}
    result = wait(agent, agent.post(f"/v1/images/{path_segment(name)}/warm", body), json)
    if json:
        print_json(result)
    else:
        for golden in result["golden"]:
            console.print(f"golden {golden['id'][:12]}: {golden['memory_mib']} MiB, {golden['accel']}", highlight=False)


@image_app.command(name="list")
def listing(*, root: Root = None, json: Json = False) -> None:
    """List the images of this site."""
    images = client(root).images()
    if json:
        print_json({"images": images})
        return
    print_table(
        ("IMAGE", "KIND", "SIZE", "CHUNKS", "GOLDEN"),
        [
            (
                i["name"],
                i.get("kind", "vm"),
                size(i["size"]),
                i["chunks"],
                " ".join(f"{g['memory_mib']}M/{g['accel']}" for g in i["golden"]),
            )
            for i in images
        ],
    )


@image_app.command
def remove(name: str, /, *, root: Root = None, json: Json = False) -> None:
    """Remove an image and its golden snapshots. Guests made from it keep their disks.

    Parameters
    ----------
    name
        Name of the image.
    """
    result = client(root).delete(f"/v1/images/{path_segment(name)}")
    if json:
        print_json(result)
    else:
        console.print(f"image {name} removed; 'haulier gc' frees its space", highlight=False)
