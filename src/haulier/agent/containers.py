"""What the agent does differently for a guest that is a container: made, started again, ended, described."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haulier.chunks.fingerprint import ZERO
from haulier.chunks.images import PREFIX
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.containers import container as containers
from haulier.containers import lxc
from haulier.containers.importing import import_container, import_layer, is_container, layers_of
from haulier.containers.layers import layer_id, make_layers, regions, unused
from haulier.containers.model import DEFAULT_DISK, DEFAULT_PATH, ContainerSpec, ImageConfig, parse_user
from haulier.containers.runc import runc_binary
from haulier.errors import Conflict, UsageError
from haulier.guests.model import GuestSpec, new_spec
from haulier.handoff import residence
from haulier.images.commit import still_mark
from haulier.units import CHUNK

if TYPE_CHECKING:
    from haulier.agent.guests import AdoptRequest, RunRequest
    from haulier.agent.jobs import Progress
    from haulier.agent.site import Site
    from haulier.handoff.journal import Journal


def spec_for(request: RunRequest, meta: dict[str, Any], image: Manifest, gateway: str) -> GuestSpec:
    """The spec of a container that is to be made from an image with these notes. UsageError, Unsupported."""
    if not is_container(meta):
        raise UsageError(f"image {request.image!r} is a disk of a VM: leave out --kind container, or name another")
    runc_binary()
    found = layers_of(meta)
    config = ImageConfig(command=request.command, env=request.env, user=request.user).over(found.config)
    uid, gid = parse_user(config.user)
    env = config.env if any(word.startswith("PATH=") for word in config.env) else (DEFAULT_PATH, *config.env)
    container = ContainerSpec(
        layers=found.layers, command=config.command, env=env, cwd=config.cwd or "/", uid=uid, gid=gid
    )
    return new_spec(
        request.name,
        request.image,
        memory_mib=request.memory_mib,
        vcpus=request.vcpus,
        disk_size=container.disk_size(request.disk_bytes or DEFAULT_DISK),
        mac=request.mac,
        address=request.address,
        gateway=gateway,
        address6=request.address6,
        gateway6=request.gateway6,
        container=container,
    )


def taken_over(store: ChunkStore, request: AdoptRequest, gateway: str) -> tuple[GuestSpec, Manifest, lxc.Found]:
    """The spec and disk of a container that LXC runs; its files are all its own, on top of an empty layer."""
    found = lxc.Found(request.container or request.name, Path(request.folder or lxc.DEFAULT_PATH))
    with tempfile.TemporaryDirectory(dir=store.path, prefix=".empty-") as folder:
        layer = import_layer(store, Path(folder))
        store.commit()
    command = next((line.partition(" = ")[2] for line in found.kept if line.startswith("lxc.init.cmd")), "/sbin/init")
    container = ContainerSpec(layers=(len(layer),), command=(command,), lxc=found.kept or ("lxc.tty.max = 0",))
    spec = new_spec(
        request.name,
        "lxc",
        memory_mib=request.memory_mib,
        vcpus=1,
        disk_size=container.disk_size(request.disk_bytes or DEFAULT_DISK),
        mac=found.mac,
        address=request.address if found.cable else "",
        gateway=gateway if found.cable else "",
        container=container,
    )
    return spec, first_manifest(spec, Manifest(len(layer) * CHUNK, b"".join(layer))), found


def first_manifest(spec: GuestSpec, image: Manifest) -> Manifest:
    """The disk of a container that has written nothing yet: its image's layers, then nothing."""
    count = spec.disk_size // CHUNK - len(image)
    return Manifest(spec.disk_size, image.fingerprints + ZERO * count)


def launch(site: Site, store: ChunkStore, spec: GuestSpec, manifest: str, progress: Progress) -> None:
    """Makes what is missing of its layers and starts it. What fails leaves nothing running.

    Conflict if it ran before; it goes on then.
    """
    assert spec.container is not None
    paths = residence.container_paths(site, spec.name)
    lower = make_layers(site.layers, store, spec.container, store.load_manifest(manifest), progress)
    progress(0.9, "starting")
    try:
        containers.driver_of(spec).prepare(spec, paths, lower, "run").run()
    except Conflict:
        raise
    except BaseException:
        containers.clear_runtime(paths)
        raise


def start_again(site: Site, store: ChunkStore, spec: GuestSpec, manifest: str, progress: Progress) -> None:
    """Starts a stopped one on what it wrote.

    Conflict for one that LXC runs: a second one would be on the same files and address.
    """
    assert spec.container is not None
    paths = residence.container_paths(site, spec.name)
    if lxc.run_by_lxc(paths):
        raise Conflict(
            f"LXC itself runs the container of guest {spec.name!r} (it restarted, or somebody started it): "
            f"end it with 'haulier guest stop {spec.name}' first"
        )
    containers.clear_runtime(paths)
    launch(site, store, spec, manifest, progress)


def commit(site: Site, store: ChunkStore, spec: GuestSpec, name: str, progress: Progress) -> float:
    """Makes an image out of what a container wrote, on top of its own; seconds for which it stood still."""
    assert spec.container is not None
    paths = residence.container_paths(site, spec.name)
    if not paths.upper.is_dir():
        raise UsageError(f"guest {spec.name!r} has written nothing here yet: start it first")
    config = ImageConfig(command=spec.container.command, env=spec.container.env, cwd=spec.container.cwd)
    container = residence.adopt_container(site, spec.name)
    began = time.monotonic()
    try:
        if container is not None:
            still_mark(paths.root).touch()
            container.freeze()
        import_container(store, name, paths.upper, base=spec.image, config=config, uuid=spec.uuid, progress=progress)
    finally:
        if container is not None:
            release(site, spec.name)
    return time.monotonic() - began if container is not None else 0.0


def release(site: Site, name: str) -> None:
    """Lets one run on that stands still for a commit. GuestError if it cannot be let."""
    container = residence.adopt_container(site, name)
    if container is not None:
        container.thaw()
    still_mark(residence.container_paths(site, name).root).unlink(missing_ok=True)


def unused_layers(site: Site, journal: Journal, store: ChunkStore) -> list[Path]:
    """Unpacked layers that neither a guest nor an image of this site has."""
    wanted: set[str] = set()
    for image in store.manifest_names(PREFIX):
        meta = store.manifest_meta(image)
        if is_container(meta):
            spec = ContainerSpec(layers=layers_of(meta).layers, command=("-",))
            wanted |= {layer_id(region) for region in regions(spec, store.load_manifest(image))}
    for row in journal.guests():
        if row.spec.get("container"):
            made = residence.spec_of(row).container
            names = [row.manifest, residence.manifest_name(row.name), residence.retained_name(row.name)]
            names += [residence.incoming_name(row.handoff)] if row.handoff else []
            for known in names:
                if made is not None and known and known in store.manifest_names(known):
                    wanted |= {layer_id(region) for region in regions(made, store.load_manifest(known))}
    return unused(site.layers, wanted)


def stop(site: Site, name: str, deadline_s: float) -> bool:
    """True if it ended by itself, or was not running."""
    paths = residence.container_paths(site, name)
    container = residence.adopt_container(site, name)
    if container is None:
        containers.clear_runtime(paths)
        return True
    if deadline_s > 0:
        return container.shutdown(deadline_s)
    container.kill()
    return False


def status(site: Site, name: str) -> tuple[str, int] | None:
    """(status, first process) of a container that runs; None if none does."""
    container = residence.adopt_container(site, name)
    if container is None:
        return None
    with contextlib.suppress(OSError):
        return container.status(), container.pid
    return "running", container.pid
