"""Starting a guest: as a clone of a golden snapshot, or by booting its image."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from haulier.disks.export import DiskExport
from haulier.errors import HaulierError, Unsupported, UsageError
from haulier.guests.accel import Accelerator, probe
from haulier.guests.agent import GuestAgent, wait_for_agent
from haulier.guests.golden import IMAGE_PREFIX, Golden, Progress
from haulier.guests.identity import Identity, inject
from haulier.guests.model import GuestSpec
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu, create_overlay

log = logging.getLogger(__name__)

RESTORE_S: Final = 120.0
AGENT_S: Final = 60.0
BOOT_S: Final = 300.0


def start_from_golden(
    golden: Golden,
    spec: GuestSpec,
    paths: GuestPaths,
    *,
    store_dir: Path,
    tap: str | None,
    accel: Accelerator | None = None,
    netns: str | None = None,
    progress: Progress | None = None,
) -> Qemu:
    """Start `spec` (made by `golden.spec`) as a clone; it runs, and is itself, when this returns.

    A disk export of the snapshot's manifest and a fresh overlay are made in `paths`. The NIC, on the existing tap
    `tap`, is plugged in with its link down; the link goes up once the guest's identity is its own. If anything fails
    nothing is left running, and the reason is raised: `GuestError` from QEMU or the guest, `NoRoom`, `Unsupported`
    when the snapshot was taken under another accelerator.
    """
    accel = accel or probe()
    _check_fit(golden, spec, accel)
    say = progress or _silent
    begun = time.monotonic()
    started = _Start(spec, paths)
    try:
        say(0.0, "starting QEMU")
        started.disk(store_dir, golden.manifest_name)
        qemu = started.qemu(accel, netns, incoming=True)
        say(0.2, "restoring memory")
        _restore(qemu, golden)
        if tap is not None:
            qemu.hotplug_nic(tap, up=False)
        qemu.cont()
        log.info("guest %s runs %.2f s after its start", spec.name, time.monotonic() - begun)
        say(0.5, "giving it its identity")
        with wait_for_agent(paths.qga_sock, name=spec.name, timeout=AGENT_S, alive=qemu.alive) as agent:
            _identify(qemu, agent, tap)
    except BaseException:
        started.undo()
        raise
    log.info("guest %s is itself %.2f s after its start", spec.name, time.monotonic() - begun)
    say(1.0, "running")
    return qemu


def boot_cold(
    spec: GuestSpec,
    paths: GuestPaths,
    *,
    store_dir: Path,
    tap: str | None,
    manifest: str = "",
    accel: Accelerator | None = None,
    netns: str | None = None,
    identity: bool = True,
    fresh_overlay: bool = True,
    progress: Progress | None = None,
) -> Qemu:
    """Boot `spec` from its image (or `manifest`) without a golden snapshot; it runs when this returns.

    With `identity` its agent is waited for and it gets its own identity before its link goes up; without, the link is
    up from the start and nobody waits. `fresh_overlay=False` boots a stopped guest again, on the writes it made.
    Failures as in `start_from_golden`.
    """
    say = progress or _silent
    started = _Start(spec, paths, keep_overlay=not fresh_overlay)
    try:
        say(0.0, "starting QEMU")
        started.disk(store_dir, manifest or IMAGE_PREFIX + spec.image)
        qemu = started.qemu(accel or probe(), netns, nic=tap)
        if identity:
            if tap is not None:
                qemu.set_link(False)
            say(0.1, "booting")
            with wait_for_agent(paths.qga_sock, name=spec.name, timeout=BOOT_S, alive=qemu.alive) as agent:
                say(0.9, "giving it its identity")
                _identify(qemu, agent, tap)
    except BaseException:
        started.undo()
        raise
    say(1.0, "running")
    return qemu


class _Start:
    """What was started for a guest so far, to be undone if the rest fails."""

    def __init__(self, spec: GuestSpec, paths: GuestPaths, *, keep_overlay: bool = False) -> None:
        self._spec = spec
        self._paths = paths
        self._keep = keep_overlay
        self._export: DiskExport | None = None
        self._qemu: Qemu | None = None

    def disk(self, store_dir: Path, manifest: str) -> None:
        self._paths.prepare()
        paths = self._paths
        self._export = DiskExport.start(store_dir, manifest, paths.nbd_sock, paths.nbd_ctl, paths.nbd_log)
        if not self._keep:
            create_overlay(paths.overlay, self._spec.disk_size)

    def qemu(self, accel: Accelerator, netns: str | None, *, incoming: bool = False, nic: str | None = None) -> Qemu:
        self._qemu = Qemu.start(self._spec, self._paths, incoming=incoming, nic=nic, accel=accel, netns=netns)
        return self._qemu

    def undo(self) -> None:
        if self._qemu is not None:
            self._qemu.kill()
        if self._export is not None:
            try:
                self._export.stop()
            except HaulierError as err:
                log.warning("disk export of guest %s did not stop: %s", self._spec.name, err)
            if not self._keep:
                self._paths.overlay.unlink(missing_ok=True)


def _restore(qemu: Qemu, golden: Golden) -> None:
    qemu.set_capabilities(events=True, mapped_ram=True, late_block_activate=True)
    mark = qemu.qmp.mark()
    qemu.prepare_incoming(f"file:{golden.memory}")
    qemu.wait_migration({"completed"}, timeout=RESTORE_S, since=mark)
    qemu.wait_status({"paused"}, timeout=RESTORE_S)
    # Capabilities stay: with this one still set, a later handoff would be refused.
    qemu.set_capabilities(mapped_ram=False, late_block_activate=False)


def _identify(qemu: Qemu, agent: GuestAgent, tap: str | None) -> None:
    said = inject(agent, Identity.fresh(qemu.spec, nic=tap is not None))
    if said:
        log.info("guest %s: %s", qemu.spec.name, said)
    if tap is not None:
        qemu.set_link(True)


def _check_fit(golden: Golden, spec: GuestSpec, accel: Accelerator) -> None:
    meta = golden.meta
    if meta.accel != accel.kind:
        raise Unsupported(
            f"golden snapshot {golden.id[:12]} was taken under {meta.accel} and this site has {accel.kind}: "
            f"warm image {meta.image} here, or boot with --cold"
        )
    for name in ("memory_mib", "vcpus", "disk_size", "machine", "cpu", "free_page_hint"):
        want, have = getattr(spec, name), getattr(meta, name)
        if want != have:
            raise UsageError(f"guest {spec.name} wants {name}={want}, golden snapshot {golden.id[:12]} has {have}")
    if spec.golden != golden.id:
        raise UsageError(f"guest {spec.name} is of golden snapshot {spec.golden[:12] or 'none'}, not {golden.id[:12]}")


def _silent(share: float, what: str) -> None:
    pass
