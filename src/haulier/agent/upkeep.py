"""Housekeeping of a site: freeing what nothing refers to, and saying what is wrong."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.agent import authority, containers
from haulier.agent.cache import Cache
from haulier.agent.client import Client
from haulier.agent.core import Core
from haulier.agent.health import Health
from haulier.agent.jobs import Job, Progress
from haulier.chunks.store import ChunkStore
from haulier.containers.criu import find_criu, self_test
from haulier.containers.lxc import version as lxc_version
from haulier.containers.runc import runc_version
from haulier.errors import HaulierError, Unsupported
from haulier.guests.accel import probe, qemu_version
from haulier.guests.tap import BRIDGE, check_bridge
from haulier.handoff import attempts, residence
from haulier.handoff.journal import SiteRow
from haulier.units import MIB

log = logging.getLogger(__name__)

LOW_DISK: Final = 2 << 30
LOW_TMPFS: Final = 512 * MIB
RENEW_DAYS: Final = 60.0
KEEP_HANDOFF_S: Final = 30 * 86400.0
PEERS_S: Final = 30.0
"""For all sites together: who asks for an examination waits for two minutes."""
PEERS_AT_ONCE: Final = 16


class GcRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`everything`: all that nothing refers to, whatever the budget has room for."""

    dry_run: bool = False
    everything: bool = False


def collect(core: Core, store: ChunkStore, cache: Cache, request: GcRequest) -> Job:
    """Frees chunks that are neither referred to nor worth their room, and what handoffs that are over left."""

    def work(progress: Progress) -> dict[str, Any]:
        with core.alone("the store", "being collected"):
            progress(0.1, "handoffs that are over")
            leases, manifests = _over(core, store)
            files = _old_files(core, store, request.dry_run)
            files += attempts.expire(core.site, everything=request.everything, dry_run=request.dry_run)
            if not request.dry_run:
                files += attempts.expire_chunks(store, 0 if request.everything else core.site.keep_s)
            progress(0.2, "chunks")
            report = cache.collect(request.dry_run, request.everything, leases, manifests)
        over = [*leases, *manifests, *files]
        return {"dry_run": request.dry_run, "handoffs": over, "store": msgspec.to_builtins(report)}

    return core.jobs.start("gc", core.site.name, work)


def _over(core: Core, store: ChunkStore) -> tuple[list[str], list[str]]:
    """Leases and manifests of handoffs that are over."""
    live = {row.id for row in core.journal.handoffs(live=True)}
    leases = [name for name in store.leases() if name.startswith("handoff/") and name[8:] not in live]
    using = {row.manifest for row in core.journal.guests()}
    manifests = [
        name
        for name in store.manifest_names("incoming/")
        if name.removeprefix("incoming/") not in live and name not in using and not _served(core, name)
    ]
    return leases, manifests


def _old_files(core: Core, store: ChunkStore, dry_run: bool) -> list[str]:
    """Mirrors and files of handoffs that are over, unpacked layers that nobody has; removed unless it is a dry run."""
    live = {row.id for row in core.journal.handoffs(live=True)}
    found = []
    for path in core.site.handoffs.iterdir() if core.site.handoffs.is_dir() else ():
        if path.name in live:
            continue
        mirror = core.site.mirror(path.name)
        if mirror.exists():
            found.append(str(mirror))
            if not dry_run:
                mirror.unlink(missing_ok=True)
        if time.time() - path.stat().st_mtime > KEEP_HANDOFF_S:
            found.append(str(path))
            if not dry_run:
                shutil.rmtree(path, ignore_errors=True)
    for path in containers.unused_layers(core.site, core.journal, store):
        found.append(str(path))
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True)
    return found


def _served(core: Core, manifest: str) -> bool:
    """Whether a guest's disk export serves a manifest under this name."""
    from haulier.disks.export import ExportState

    for row in core.journal.guests():
        try:
            state = ExportState.load(residence.guest_paths(core.site, row.name).nbd_ctl)
        except HaulierError:
            continue
        if state.manifest == manifest:
            return True
    return False


# -- doctor --------------------------------------------------------------------------------------------------------


def examine(core: Core, health: Health) -> dict[str, Any]:
    """What this host can do and what is wrong: {"checks": [{"name", "ok", "found", "advice"}]}."""
    checks = [
        _check("qemu", _qemu, "install QEMU >= 8.2 (Debian: qemu-system-x86)"),
        _check("accelerator", _accelerator, ""),
        _check("qemu-img", _qemu_img, "install qemu-utils"),
        _check("containers", _containers, ""),
        _check("memory for guests", lambda: _tmpfs(core.site.ram_dir), "enlarge the tmpfs, or stop guests"),
        _check("disk", lambda: _disk(core.site.root), "run 'haulier gc --all', or give the site a larger disk"),
        _check("bridge", _bridge, f"make {BRIDGE} with the same MAC and address at every site (docs/sites.md)"),
        _check("certificate", lambda: _certificate(core), "run 'haulier site renew'"),
        _check("store", health.check, "run 'haulier doctor --repair'"),
        *(
            [_check("coordinator", lambda: _coordinator(core), "it is not needed; 'haulier coordinator status' there")]
            if core.site.coordinator
            else []
        ),
        *_peers(core, [row for row in core.journal.sites() if row.name != core.site.name]),
    ]
    return {"site": core.site.name, "ok": all(check["ok"] for check in checks), "checks": checks}


def _check(name: str, look: Callable[[], tuple[bool, str]], advice: str) -> dict[str, Any]:
    try:
        ok, found = look()
    except (HaulierError, OSError, subprocess.SubprocessError) as error:
        ok, found = False, str(error)
    except (IndexError, ValueError) as error:
        ok, found = False, f"what it says makes no sense ({error})"
    return {"name": name, "ok": ok, "found": found, "advice": "" if ok else advice}


def _qemu() -> tuple[bool, str]:
    return True, ".".join(map(str, qemu_version()))


def _accelerator() -> tuple[bool, str]:
    accelerator = probe()
    return True, f"{accelerator.kind}: {accelerator.reason}"


def _qemu_img() -> tuple[bool, str]:
    done = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, timeout=20, check=False)
    return done.returncode == 0, (done.stdout or done.stderr).splitlines()[0]


def _containers() -> tuple[bool, str]:
    """Says what is there; a host that has VMs only is in order without."""
    try:
        runc, criu = runc_version(), find_criu()
    except Unsupported as error:
        return True, f"cannot be run here: {error}"
    problem = self_test(criu.path)
    where = "its own, with libraries" if criu.private else "the system's"
    lxc = f", LXC {lxc_version()}" if lxc_version() else ""
    found = f"runc {runc}{lxc}, CRIU {criu.version} ({where}, {criu.path})"
    return True, f"{found}: {f'cannot be handed over: {problem}' if problem else 'a dump and restore was tried'}"


def _tmpfs(path: Path) -> tuple[bool, str]:
    there = path
    while not there.exists():
        there = there.parent
    space = os.statvfs(there)
    free = space.f_bavail * space.f_frsize
    return free >= LOW_TMPFS, f"{free // MIB} MiB free in {path}"


def _disk(path: Path) -> tuple[bool, str]:
    free = shutil.disk_usage(path).free
    return free >= LOW_DISK, f"{free // MIB} MiB free in {path}"


def _bridge() -> tuple[bool, str]:
    wrong = check_bridge()
    return not wrong, "; ".join(wrong) or f"{BRIDGE} is there, with a MAC of its own"


def _certificate(core: Core) -> tuple[bool, str]:
    days = authority.days_left(core.site.certificate)
    return days > RENEW_DAYS, f"good for {days:.0f} days"


def _coordinator(core: Core) -> tuple[bool, str]:
    from haulier.coordinator.client import CoordinatorClient

    client = CoordinatorClient.of(core.site)
    if client is None:
        return True, "none"
    began = time.monotonic()
    sites = client.sites()
    return True, f"{client.where} answers in {(time.monotonic() - began) * 1000:.0f} ms, knows {len(sites)} sites"


def _peers(core: Core, rows: Sequence[SiteRow]) -> list[dict[str, Any]]:
    """Asks many at once, and says so of those for whose answer there was no time."""
    pool = ThreadPoolExecutor(PEERS_AT_ONCE, thread_name_prefix="examine")
    advice = "start its agent, or check the link and address"
    asked = [pool.submit(_check, f"site {row.name}", partial(_peer, core, row), advice) for row in rows]
    done = wait(asked, PEERS_S).done
    pool.shutdown(wait=False, cancel_futures=True)
    found = []
    for row, each in zip(rows, asked, strict=True):
        if each in done:
            found.append(each.result())
        else:
            why = f"{PEERS_S:g} s are for all sites together"
            text = f"not asked in time: {why}" if each.cancelled() else f"has not answered in time: {why}"
            found.append({"name": f"site {row.name}", "ok": False, "found": text, "advice": advice})
    return found


def _peer(core: Core, row: SiteRow) -> tuple[bool, str]:
    began = time.monotonic()
    facts = Client.peer(core.site, row).site()
    return True, f"answers in {(time.monotonic() - began) * 1000:.0f} ms, haulier {str(facts.get('version'))[:20]}"
