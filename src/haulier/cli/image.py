"""`haulier image`: import, commit, push, publish, warm, list, show, tree, remove."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from haulier.agent.client import path_segment
from haulier.cli import cache
from haulier.cli.common import (
    ImageName,
    Json,
    Root,
    client,
    console,
    parse_memory,
    plain,
    print_json,
    print_table,
    size,
    tell,
    words_of,
)
from haulier.cli.progress import wait
from haulier.units import CHUNK

image_app = App(name="image", help="Images of this site, their layers and golden snapshots.")

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
        "config": {"command": words_of(command)},
    }
    result = wait(agent, agent.post("/v1/images", body), json)
    tell(result, json, f"image {result['name']}: {size(result['size'])}, {result['chunks']} chunks")


@image_app.command
def warm(
    name: ImageName, /, *, memory: Memory = "512M", vcpus: Vcpus = 1, root: Root = None, json: Json = False
) -> None:
    """Boot an image to idle once and keep its memory, so that guests start from it in about a second."""
    agent = client(root)
    body = {"memory_mib": parse_memory(memory), "vcpus": vcpus}
    result = wait(agent, agent.post(f"/v1/images/{path_segment(name)}/warm", body), json)
    if json:
        print_json(result)
    else:
        for golden in result["golden"]:
            console.print(f"golden {golden['id'][:12]}: {golden['memory_mib']} MiB, {golden['accel']}", highlight=False)


@image_app.command
def commit(guest: str, name: str, /, *, root: Root = None, json: Json = False) -> None:
    """Make an image out of a guest: a layer of what it has written, on top of the image it was made from.

    The guest may run on meanwhile; its agent freezes the file systems for the end of it.

    Parameters
    ----------
    guest
        Name of the guest.
    name
        Name of the new image.
    """
    agent = client(root)
    result = wait(agent, agent.post("/v1/image-commits", {"guest": guest, "name": name}), json)
    if json:
        print_json(result)
        return
    how = "its file systems were at rest" if result["quiesced"] else "as after a power cut, for it has no agent"
    console.print(
        plain(f"image {name} on {result['parent']}: {size(result['own_bytes'])} of its own ({how})"), highlight=False
    )


@image_app.command
def publish(name: ImageName, /, *, root: Root = None, json: Json = False) -> None:
    """Bring an image's chunks to the object store that site.toml names, where every site of the fleet finds them."""
    agent = client(root)
    result = wait(agent, agent.post(f"/v1/images/{path_segment(name)}/publish"), json)
    if json:
        print_json(result)
        return
    text = f"{result['sent_chunks']} of {result['chunks']} chunks were new there, {size(result['sent_bytes'])}"
    console.print(plain(f"image {name} is published: {text}"), highlight=False)


@image_app.command
def push(
    name: ImageName,
    /,
    *,
    to: Annotated[str, Parameter(help="The site that it is brought to.")],
    warm: Annotated[bool, Parameter(help="Bring its golden snapshots, too.")] = True,
    root: Root = None,
    json: Json = False,
) -> None:
    """Bring an image and the layers below it to another site, ahead of need. Ctrl-C cancels; what came stays there."""
    agent = client(root)
    job = agent.post("/v1/image-pushes", {"name": name, "to": to, "warm": warm})
    try:
        result = wait(agent, job, json)
    except KeyboardInterrupt:
        agent.post(f"/v1/jobs/{path_segment(str(job['id']))}/cancel")
        result = wait(agent, job, json)
    if json:
        print_json(result)
        return
    whole = sum(item["bytes"] for item in result["items"])
    lacking = sum(item["lacking"] for item in result["items"]) * CHUNK
    text = f"{size(result['wire_bytes'])} sent for {size(lacking)} that it lacked of {size(whole)}"
    console.print(
        plain(f"image {name} is at {to}: {text if result['items'] else 'it was there already'}"), highlight=False
    )


@image_app.command(name="list")
def listing(*, root: Root = None, json: Json = False) -> None:
    """List the images of this site."""
    images = client(root).images()
    if json:
        print_json({"images": images})
        return
    print_table(
        ("IMAGE", "KIND", "LAYER", "ON", "SIZE", "CHUNKS", "OWN", "GOLDEN"),
        [
            (
                i["name"],
                i.get("kind", "vm"),
                i["layer"],
                i["parent"] or "-",
                size(i["size"]),
                i["chunks"],
                size(i["own_bytes"]),
                " ".join(f"{g['memory_mib']}M/{g['accel']}" for g in i["golden"]),
            )
            for i in images
        ],
    )


@image_app.command
def show(name: ImageName, /, *, root: Root = None, json: Json = False) -> None:
    """Show all about an image: what it consists of, and what lies on it."""
    facts = client(root).get(f"/v1/images/{path_segment(name)}")
    if json:
        print_json(facts)
        return
    rows: list[tuple[str, object]] = [(key, facts[key]) for key in ("name", "layer", "parent", "digest")]
    rows += [("disk", size(facts["size"])), ("chunks", f"{facts['chunks']}, {size(facts['bytes'])}")]
    rows += [(f"  {each['layer']} {each['name']}", size(each["bytes"])) for each in facts["layers"]]
    if facts["guest"]:
        rows.append(
            ("committed from", facts["guest"] + (", at rest" if facts["quiesced"] else ", as after a power cut"))
        )
    rows += [("golden", f"{g['memory_mib']} MiB, {g['vcpus']} vcpus, {g['accel']}") for g in facts["golden"]]
    rows += [("layers on it", " ".join(facts["children"]) or "-"), ("guests", " ".join(facts["guests"]) or "-")]
    print_table(("", ""), rows)


@image_app.command
def tree(*, root: Root = None, json: Json = False) -> None:
    """Show which image lies on which, with the guests made from each, and what each layer takes."""
    images = client(root).get("/v1/image-tree")["images"]
    if json:
        print_json({"images": images})
        return
    rows: list[tuple[object, ...]] = []
    for each in images:
        _branch(each, 0, rows)
    print_table(("NAME", "LAYER", "BYTES"), rows)


def _branch(image: dict[str, Any], depth: int, rows: list[tuple[object, ...]]) -> None:
    rows.append(("  " * depth + image["name"], image["layer"], size(image["bytes"])))
    for guest in image["guests"]:
        taken = guest.get("bytes", 0) + guest.get("overlay_bytes", 0)
        rows.append(("  " * (depth + 1) + guest["name"], guest["layer"], size(taken)))
    for child in image["children"]:
        _branch(child, depth + 1, rows)


@image_app.command
def remove(name: ImageName, /, *, root: Root = None, json: Json = False) -> None:
    """Remove an image and its golden snapshots. Refused while a guest or another layer needs it."""
    result = client(root).delete(f"/v1/images/{path_segment(name)}")
    tell(result, json, f"image {name} removed; 'haulier gc --all' frees its space now")


@image_app.command
def pin(name: ImageName, /, *, root: Root = None, json: Json = False) -> None:
    """Keep all of an image, however full the store is (as of the moment it was imported)."""
    cache.pin(name, True, False, root, json)


@image_app.command
def unpin(
    name: ImageName,
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="Even if no other site has all of it.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Let the cache's policy evict what only this image refers to, when room is needed."""
    cache.pin(name, False, force, root, json)
