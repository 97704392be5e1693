"""Where a guest lives on this host: its QEMU, export, tap and files, and how they go away or come to life.

Workers and recovery share this, so that a handoff that ends in a crash is tidied like one that ends well. Everything
here may be repeated: each step looks at what is there first.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path

import msgspec

from haulier.agent.site import Site
from haulier.chunks.store import ChunkStore
from haulier.containers import container as containers
from haulier.containers import dumping
from haulier.containers.container import Container, ContainerPaths
from haulier.disks.export import DiskExport
from haulier.disks.rounds import clean_up
from haulier.errors import GuestError, HaulierError, UnknownThing
from haulier.guests.model import GuestSpec
from haulier.guests.qemu import GuestPaths, Qemu
from haulier.guests.tap import delete_tap, tap_name
from haulier.handoff import attempts
from haulier.handoff.journal import GuestRow
from haulier.process import holding, started_as

log = logging.getLogger(__name__)


def guest_paths(site: Site, guest: str) -> GuestPaths:
    return GuestPaths(site.guest_root(guest), site.ram_dir)


def container_paths(site: Site, guest: str) -> ContainerPaths:
    return ContainerPaths(site.guest_root(guest), site.run / "runc")


def images_dir(site: Site, handoff: str) -> Path:
    """Where a dump of a container's processes lies while it is handed over: in memory."""
    return site.ram_dir / f"images-{handoff}"


def spec_of(row: GuestRow) -> GuestSpec:
    """The spec in a journal row; UsageError for one that makes no sense."""
    return msgspec.convert(row.spec, GuestSpec)


def lease_of(handoff: str) -> str:
    """The store's lease for chunks that arrive, or are made, during a handoff."""
    return f"handoff/{handoff}"


def manifest_name(guest: str) -> str:
    """The manifest that a guest's overlay lies on."""
    return f"guest/{guest}"


def retained_name(guest: str) -> str:
    """The manifest of a guest that has moved away; keeps its chunks for the way back."""
    return f"retained/{guest}"


def incoming_name(handoff: str) -> str:
    """The manifest of a copy that is being built."""
    return f"incoming/{handoff}"


def adopt(site: Site, guest: str, *, worker: bool = False) -> Qemu | None:
    """The guest's QEMU, or None if none runs."""
    try:
        return Qemu.adopt(guest_paths(site, guest), worker=worker)
    except UnknownThing:
        return None


def adopt_container(site: Site, guest: str) -> Container | None:
    """The guest's container, or None if none runs."""
    try:
        return Container.adopt(container_paths(site, guest))
    except UnknownThing:
        return None


def resume_original(site: Site, guest: str) -> bool:
    """Makes the owner's guest run on, whatever a handoff was doing with it. False if it is gone."""
    container = adopt_container(site, guest)
    if container is not None:
        dumping.end_left(container.paths.log_dir)
        container.thaw()
        return True
    qemu = adopt(site, guest, worker=True)
    if qemu is None:
        return False
    try:
        if not run_on(qemu):
            return False
        clean_up(qemu.qmp)
    finally:
        qemu.close()
    return True


def run_on(qemu: Qemu) -> bool:
    """Makes the owner's guest run on. False where post-copy had begun: what it had in memory is lost, its disk is not.

    Its QEMU is ended then; the guest can be booted again with `haulier guest start`.
    """
    if not qemu.going_first():
        qemu.resume_source()
        return True
    log.error(
        "guest %s cannot run on here, its post-copy had begun: its memory is lost, its disk is not", qemu.spec.name
    )
    qemu.kill()
    return False


def copy_alive(site: Site, guest: str) -> bool:
    """A complete, stopped copy is here."""
    container = adopt_container(site, guest)
    if container is not None:
        return container.status() in {"paused", "running"}
    qemu = adopt(site, guest, worker=True)
    if qemu is None:
        return False
    try:
        return qemu.status() in {"paused", "running"}
    except GuestError:
        return False
    finally:
        qemu.close()


def run_copy(site: Site, qemu: Qemu) -> float:
    """Runs the copy that was waiting; returns when it did, by QEMU's RESUME event (Unix seconds)."""
    mark = qemu.qmp.mark()
    if qemu.status() == "running":
        return time.time()
    qemu.cont()
    return qemu.qmp.wait_event("RESUME", timeout=10, since=mark).at


def end_copy(site: Site, guest: str) -> None:
    """Ends the QEMU of a guest whose memory can never be whole. Its disk stays, and so does all else."""
    qemu = adopt(site, guest, worker=True)
    if qemu is not None:
        qemu.kill()


def memory_lost(guest: str) -> str:
    """What to say of a guest that ran before its memory was whole, when the rest was lost."""
    return (
        f"guest {guest!r} ran here before its memory was whole, and the rest of it is lost with the QEMU that had it: "
        f"its disk is right, as after a power cut; boot it with 'haulier guest start {guest}'"
    )


def discard_copy(site: Site, guest: str, handoff: str) -> None:
    """Throws a copy away: QEMU, export, tap, files, the manifest that pinned its chunks, their lease.

    The chunks themselves stay in the cache for the next attempt.
    """
    clear(site, guest)
    shutil.rmtree(images_dir(site, handoff), ignore_errors=True)
    with ChunkStore(site.store) as store:
        attempts.keep_chunks(store, guest, incoming_name(handoff))
        _drop(store, incoming_name(handoff))
        store.drop_lease(lease_of(handoff))


def retire(site: Site, guest: str, handoff: str) -> None:
    """Clears away an original whose guest runs elsewhere now. Its chunks stay in the cache, under `retained_name`.

    That is the disk as it was handed over, or, where a crash kept that from being noted, as it was before.
    """
    clear(site, guest)
    shutil.rmtree(images_dir(site, handoff), ignore_errors=True)
    with ChunkStore(site.store) as store:
        for name in (incoming_name(handoff), manifest_name(guest)):
            if name in store.manifest_names(name):
                store.save_manifest(retained_name(guest), store.load_manifest(name), partial=True, pinned=False)
                break
        _drop(store, incoming_name(handoff))
        _drop(store, manifest_name(guest))
        store.drop_lease(lease_of(handoff))


def pin_name(guest: str, handoff: str) -> str:
    """The manifest that keeps, where a guest came from, what it left behind there."""
    return f"residual/{guest}/{handoff}"


def copy_manifest(store: ChunkStore, name: str, to: str) -> None:
    """Saves a manifest under a second name, with its notes, complete or not."""
    meta = store.manifest_meta(name)
    store.save_manifest(to, store.load_manifest(name), meta, partial=not store.is_complete(name))


def _drop(store: ChunkStore, name: str) -> None:
    with contextlib.suppress(UnknownThing):
        store.drop_manifest(name)


def _end_strays(paths: GuestPaths) -> None:
    """Ends a QEMU or export of this guest that nobody knows: whoever started it died before it was written down."""
    for program, argument in (("qemu-system", paths.pid_file), ("haulier.disks.export", paths.nbd_ctl)):
        # More than once, for one that is just leaving its parent has a child that was not there before.
        for _ in range(3):
            for process in started_as(program, str(argument)):
                process.kill()
    # An export that waited for its guest holds the lock beside its control socket, and its command line says nothing.
    for _ in range(3):
        for process in holding("haulier.disks.export", str(paths.nbd_ctl)):
            process.kill()


def clear(site: Site, guest: str) -> None:
    """Ends everything of a guest on this host and removes its files; manifests and the journal stay."""
    paths = guest_paths(site, guest)
    if containers.is_container(container_paths(site, guest)):
        containers.clear(container_paths(site, guest))
        return
    qemu = adopt(site, guest, worker=True)
    if qemu is not None:
        qemu.kill()
    with contextlib.suppress(HaulierError, OSError):
        DiskExport.attach(paths.nbd_ctl).stop()
    _end_strays(paths)
    Qemu.clear(paths)
    with contextlib.suppress(HaulierError, OSError):
        delete_tap(tap_name(guest))
    shutil.rmtree(paths.root, ignore_errors=True)
