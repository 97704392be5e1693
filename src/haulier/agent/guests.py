"""The guests of this site: begun, stopped, removed, and kept going.

What must survive a kill of the agent is written before it is done: a guest's record says "creating" before its first
file exists and "removing" before the first one goes, and `Guests.adopt` finishes either when the next agent starts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from typing import Any, Final

import msgspec

from haulier.agent import containers
from haulier.agent.addresses import AUTO, Addresses
from haulier.agent.core import Core
from haulier.agent.jobs import Job, Progress
from haulier.agent.site import check_name
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.containers import lxc
from haulier.containers.bundle import LOG
from haulier.containers.importing import is_container
from haulier.disks.export import DiskExport, ExportState
from haulier.errors import Conflict, Corrupt, GuestError, HaulierError, NoRoom, UnknownThing, UsageError
from haulier.fetch.fetching import fetch
from haulier.fetch.holders import sources_of
from haulier.guests import launch
from haulier.guests.accel import probe
from haulier.guests.console import shorten
from haulier.guests.golden import IMAGE_PREFIX, Golden, find_golden
from haulier.guests.model import GuestSpec, check_net, new_spec
from haulier.guests.qemu import Qemu, memory_reasons
from haulier.guests.tap import create_tap, delete_tap, tap_name
from haulier.handoff import clients, residence, retained
from haulier.handoff.journal import GuestRow
from haulier.handoff.ownership import MAY_RUN, UNDER_WAY, State

log = logging.getLogger(__name__)

RUN_LEASE: Final = "run/"
"""What a guest begins with is kept under it until the guest has a manifest of its own and runs."""
GO_ON_S: Final = 10.0
"""For a guest that stopped at an I/O error, until it is said to stop there again."""
RUN_ON_S: Final = 5.0
"""The same where it is tried again before long."""
HIDDEN: Final = frozenset({State.ABSENT, State.REFUSED})
"""Records that only keep an epoch from being used twice."""


class RunRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A guest to be made. `cold` boots it even where there is a golden snapshot; without `agent` it is booted, and
    nobody waits for an agent inside or gives it an identity. The last fields are for containers."""

    name: str
    image: str
    memory_mib: int = 512
    vcpus: int = 1
    address: str = ""
    gateway: str = ""
    address6: str = ""
    """Of IPv6, beside an `address` of IPv4."""
    gateway6: str = ""
    mac: str = ""
    cold: bool = False
    agent: bool = True
    kind: str = ""
    """ "vm" or "container"; "" = what the image is of."""
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    net: str = "hook"
    """What its clients notice of a move: "hook", "keep" or "mptcp"."""
    disk_bytes: int = 0
    """Of a container: room for what it writes; 0 = the usual."""


class AdoptRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A container that LXC runs here, to become the guest `name`. `container` is LXC's name of it, `folder` where LXC
    has it; "" = the same name, and LXC's usual place."""

    name: str
    container: str = ""
    folder: str = ""
    memory_mib: int = 512
    address: str = ""
    gateway: str = ""
    disk_bytes: int = 0


class Guests:
    """All guests of which this site has a record."""

    def __init__(self, core: Core, store: ChunkStore, addresses: Addresses) -> None:
        self.core = core
        self.addresses = addresses
        self.site = core.site
        self.journal = core.journal
        self.store = store
        self._cut_off: set[str] = set()
        """Guests whose disk export died, until they are seen to run with the next one."""

    # -- seen ----------------------------------------------------------------------------------------------------

    def list(self) -> list[dict[str, Any]]:
        """Guests that are here, on their way, or were here last."""
        return [self._describe(row) for row in self.journal.guests() if row.state not in HIDDEN]

    def show(self, name: str) -> dict[str, Any]:
        """UnknownThing if there is none."""
        row = self._known(name)
        paths = residence.guest_paths(self.site, name)
        facts = self._describe(row) | {"spec": row.spec, "root": str(paths.root), "serial_log": str(paths.serial_log)}
        if spec_kind(row) == "container":
            facts["root_files"] = str(residence.container_paths(self.site, name).rootfs)
            facts["serial_log"] = str(residence.container_paths(self.site, name).rootfs) + LOG
        facts["handoffs"] = [h.id for h in self.journal.handoffs(guest=name)[:10]]
        with contextlib.suppress(HaulierError, OSError):
            facts["export"] = DiskExport.attach(paths.nbd_ctl).stats()
        return facts

    def _known(self, name: str) -> GuestRow:
        row = self.journal.guest(check_name(name, "guest"))
        if row.state in HIDDEN:
            raise UnknownThing(f"no guest {name!r} at this site: 'haulier guest list' shows those there are")
        return row

    def _describe(self, row: GuestRow) -> dict[str, Any]:
        status, pid, accel = self._status(row)
        spec = row.spec
        return {
            "name": row.name,
            "kind": spec_kind(row),
            "state": row.state,
            "status": status,
            "site": row.owner or self.site.name,
            "epoch": row.epoch,
            "handoff": row.handoff if row.state in UNDER_WAY else "",
            "pid": pid,
            "accel": accel,
            **{
                k: spec.get(k)
                for k in ("image", "golden", "memory_mib", "vcpus", "disk_size", "address", "address6", "mac", "net")
            },
        }

    def _status(self, row: GuestRow) -> tuple[str, int, str]:
        if row.state in (State.AWAY, State.SERVING):
            return f"at {row.owner}", 0, ""
        if row.wanted in ("creating", "removing"):
            return row.wanted, 0, ""
        if spec_kind(row) == "container":
            found = containers.status(self.site, row.name)
            if found is not None:
                return *found, "lxc" if (row.spec.get("container") or {}).get("lxc") else "runc"
        qemu = residence.adopt(self.site, row.name)
        if qemu is None:
            stopped = row.wanted == "stopped" or row.state not in MAY_RUN
            return ("stopped" if stopped else "dead"), 0, ""
        with self.core.asking:
            try:
                return qemu.status(), qemu.pid, qemu.accel
            except GuestError:
                return "does not answer", qemu.pid, qemu.accel
            finally:
                qemu.close()

    # -- made ----------------------------------------------------------------------------------------------------

    def run(self, request: RunRequest) -> Job:
        """Begins a guest; what can be known at once is refused at once. The job's result is what `show` gives."""
        if request.address == AUTO:
            request = msgspec.structs.replace(request, address=self.addresses.choose(request.name))
        spec, golden, manifest = self._prepare(request)
        row = self.journal.find_guest(spec.name)
        if row is not None and row.state not in HIDDEN:
            where = f"at site {row.owner!r}" if row.state == State.AWAY else "here"
            raise Conflict(f"there is a guest {spec.name!r} already, {where}: choose another name, or remove it first")
        stray = residence.adopt_container(self.site, spec.name)
        if stray is not None:
            # Whatever it is, it is not to be ended with what is made now, should that fail.
            raise Conflict(
                f"process {stray.pid} runs in {stray.paths.root}, of no guest that this site knows: "
                "end it first, or choose another name"
            )

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone(spec.name, "being made"):
                self._make(spec, golden, manifest, request.agent, progress)
            return self.show(spec.name)

        return self.core.jobs.start("run", spec.name, work)

    def adopt_lxc(self, request: AdoptRequest) -> dict[str, Any]:
        """Takes over a container that LXC runs; what `show` tells of it. It runs on, untouched."""
        check_name(request.name, "guest")
        row = self.journal.find_guest(request.name)
        if row is not None and row.state not in HIDDEN:
            raise Conflict(f"there is a guest {request.name!r} already: choose another name, or remove it first")
        gateway = request.gateway or default_gateway(request.address)
        with self.core.alone(request.name, "being taken over"):
            spec, manifest, found = containers.taken_over(self.store, request, gateway)
            self._enter(spec, wanted="creating")
            try:
                self.store.save_manifest(residence.manifest_name(spec.name), manifest)
                lxc.take_over(spec, residence.container_paths(self.site, spec.name), found)
                self.journal.advance(spec.name, State.OWNER.value, State.OWNER.value, wanted="running")
            except BaseException:
                self._erase(spec.name)
                raise
        return self.show(spec.name)

    def _enter(self, spec: GuestSpec, *, wanted: str) -> None:
        """From now on this site owns the guest, whose epoch goes on from where an earlier one of its name ended.

        `taken` stays: this epoch came from nobody. Were it raised, a token that was refused here, and is repeated by a
        source that has not heard of it, would be answered as one that was taken, and that source's guest be retired.
        """
        last = (self.journal.find_guest(spec.name) or GuestRow(name=spec.name)).last_epoch
        self.journal.advance(
            spec.name,
            {state.value for state in HIDDEN},
            State.OWNER.value,
            owner=self.site.name,
            epoch=last + 1,
            pending=0,
            handoff="",
            spec=msgspec.to_builtins(spec),
            manifest=residence.manifest_name(spec.name),
            wanted=wanted,
        )

    def _prepare(self, request: RunRequest) -> tuple[GuestSpec, Golden | None, str]:
        check_name(request.name, "guest")
        check_name(request.image, "image")
        name = IMAGE_PREFIX + request.image
        try:
            image = self.store.load_manifest(name)
        except UnknownThing:
            raise UnknownThing(
                f"no image {request.image!r} at this site: bring it in with 'haulier image import', "
                "'haulier image list' shows those there are"
            ) from None
        gateway = request.gateway or default_gateway(request.address)
        request = msgspec.structs.replace(request, gateway6=request.gateway6 or default_gateway(request.address6))
        meta = self.store.manifest_meta(name)
        if request.kind not in ("", "vm", "container"):
            raise UsageError(f"{request.kind[:40]!r} is no kind of guest: give vm or container")
        if request.kind == "container" or (not request.kind and is_container(meta)):
            spec = containers.spec_for(request, meta, image, gateway)
            self.site.check_socket_path(residence.container_paths(self.site, spec.name).rootfs)
            return msgspec.structs.replace(spec, net=check_net(request.net)), None, name
        if is_container(meta):
            raise UsageError(f"image {request.image!r} is one of containers: give --kind container, or name another")
        golden = None
        if request.agent and not request.cold:
            golden = find_golden(
                self.site.golden,
                request.image,
                request.memory_mib,
                request.vcpus,
                accel=probe().kind,
                image_manifest=image.digest.hex(),
            )
        if golden is not None:
            spec = golden.spec(
                request.name,
                mac=request.mac,
                address=request.address,
                gateway=gateway,
                address6=request.address6,
                gateway6=request.gateway6,
            )
            name = golden.manifest_name
        else:
            spec = new_spec(
                request.name,
                request.image,
                memory_mib=request.memory_mib,
                vcpus=request.vcpus,
                disk_size=image.size,
                mac=request.mac,
                address=request.address,
                gateway=gateway,
                address6=request.address6,
                gateway6=request.gateway6,
            )
        paths = residence.guest_paths(self.site, spec.name)
        self.site.check_socket_path(paths.handoff_sock)
        reasons = memory_reasons(spec, self.site.ram_dir)
        if reasons:
            raise NoRoom(f"{'; '.join(reasons)}: stop another guest, or give this one less memory")
        if request.net == "mptcp":
            if not request.agent:
                raise UsageError("a guest's address of this site is set by its agent: leave out --no-agent")
            self.addresses.leases.check()
        return msgspec.structs.replace(spec, net=check_net(request.net)), golden, name

    def _make(self, spec: GuestSpec, golden: Golden | None, source: str, agent: bool, progress: Progress) -> None:
        manifest = residence.manifest_name(spec.name)
        lease = RUN_LEASE + spec.name
        self._enter(spec, wanted="creating")
        try:
            # a name of its own, so that the image may be removed while its guests live
            image = self.store.load_manifest(source)
            self._bring(lease, image, golden, progress)
            self.store.save_manifest(manifest, containers.first_manifest(spec, image) if spec.container else image)
            self._launch(spec, golden, agent, progress)
            if spec.net == "mptcp":
                self.addresses.begin(spec.name)
            self.journal.advance(spec.name, State.OWNER.value, State.OWNER.value, wanted="running")
        except BaseException:
            self._erase(spec.name)
            raise
        finally:
            self.store.drop_lease(lease)

    def _bring(self, lease: str, image: Manifest, golden: Golden | None, progress: Progress) -> None:
        """Keeps what the guest begins with under a lease, and fetches what the cache gave up of an unpinned image."""
        needed = image.unique()
        if golden is not None:
            needed |= self.store.load_manifest(golden.manifest_name).unique()
        missing = self.store.missing(needed, lease)
        if missing:
            fetch(
                missing,
                sources_of(self.site),
                self.store,
                lease=lease,
                progress=lambda done, total: progress(0.5 * done / total, "fetching what is not here of the image"),
            )

    def _launch(self, spec: GuestSpec, golden: Golden | None, agent: bool, progress: Progress) -> None:
        paths = residence.guest_paths(self.site, spec.name)
        manifest = residence.manifest_name(spec.name)
        if spec.container is not None:
            containers.launch(self.site, self.store, spec, manifest, progress)
            return
        tap = self._tap(spec)
        if golden is None:
            qemu = launch.boot_cold(
                spec, paths, store_dir=self.site.store, tap=tap, manifest=manifest, identity=agent, progress=progress
            )
        else:
            qemu = launch.start_from_golden(golden, spec, paths, store_dir=self.site.store, tap=tap, progress=progress)
            DiskExport.attach(paths.nbd_ctl).swap(manifest)
        qemu.close()

    def _tap(self, spec: GuestSpec) -> str | None:
        if not spec.address:
            return None
        tap = tap_name(spec.name)
        create_tap(tap)
        return tap

    def start(self, name: str) -> Job:
        """Boots a stopped guest again, on the writes it made; one that stopped at an I/O error goes on where it was."""
        self._owned(name, "start")
        if self._alive(name) and not self._stands(name):
            raise Conflict(f"guest {name!r} runs already")

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone(name, "being started"):
                row = self._owned(name, "start")
                if self._stands(name, go_on=True):
                    return self.show(name)
                spec = residence.spec_of(row)
                if not row.manifest:
                    raise Conflict(f"guest {name!r} has only just arrived: try again in a moment")
                if spec.container is not None:
                    containers.start_again(self.site, self.store, spec, row.manifest, progress)
                    self.journal.advance(name, State.OWNER.value, State.OWNER.value, wanted="running")
                    return self.show(name)
                paths = residence.guest_paths(self.site, name)
                Qemu.clear(paths)
                self._stop_export(name)
                qemu = launch.boot_cold(
                    spec,
                    paths,
                    store_dir=self.site.store,
                    tap=self._tap(spec),
                    manifest=row.manifest,
                    identity=False,
                    fresh_overlay=False,
                    progress=progress,
                )
                qemu.close()
                # The watch over addresses gives it that of this site again, once its agent answers.
                fresh = msgspec.to_builtins(msgspec.structs.replace(spec, site_address=""))
                self.journal.advance(name, State.OWNER.value, State.OWNER.value, wanted="running", spec=fresh)
            return self.show(name)

        return self.core.jobs.start("start", name, work)

    def _stands(self, name: str, go_on: bool = False) -> bool:
        """It stopped at an I/O error, for want of room say. GuestError if it does again when it is let go on."""
        with self.core.asking:
            qemu = residence.adopt(self.site, name)
            if qemu is None:
                return False
            try:
                stands = qemu.status() == "io-error"
                if stands and go_on:
                    qemu.recover_io(GO_ON_S)
                return stands
            finally:
                qemu.close()

    # -- ended ---------------------------------------------------------------------------------------------------

    def stop(self, name: str, deadline_s: float = 60.0, force: bool = False) -> Job:
        """Shuts a guest down; by force after `deadline_s`, or at once."""
        self._owned(name, "stop")

        def work(progress: Progress) -> dict[str, Any]:
            with self.core.alone(name, "being stopped"):
                self._owned(name, "stop")
                clean = self._shut_down(name, 0.0 if force else deadline_s)
            return self.show(name) | {"clean": clean}

        return self.core.jobs.start("stop", name, work)

    def _shut_down(self, name: str, deadline_s: float) -> bool:
        self.journal.advance(name, State.OWNER.value, State.OWNER.value, wanted="stopped")
        if spec_kind(self.journal.guest(name)) == "container":
            return containers.stop(self.site, name, deadline_s)
        clean = True
        qemu = residence.adopt(self.site, name)
        if qemu is not None:
            if deadline_s > 0:
                clean = qemu.shutdown(deadline_s)
            else:
                clean = False
                qemu.quit()
        self._stop_export(name)
        with contextlib.suppress(HaulierError):
            delete_tap(tap_name(name))
        return clean

    def remove(self, name: str, force: bool = False) -> dict[str, Any]:
        """Removes a stopped guest and its disk (with `force` a running one), or what is left of one that is away.

        Its epochs stay known, for a site that still waits for an answer about it; with `force` they go as well.
        """
        row = self.journal.guest(check_name(name, "guest"))
        with self.core.alone(name, "being removed"):
            if row.state == State.AWAY or row.state in HIDDEN:
                self._forget_leftovers(row, force)
                return {"name": name, "removed": "what was left of it; the guest itself is not here"}
            self._owned(name, "remove")
            if self._alive(name) and not force:
                raise Conflict(f"guest {name!r} runs: stop it first, or use --force")
            self.journal.advance(name, State.OWNER.value, State.OWNER.value, wanted="removing")
            self._erase(name)
        return {"name": name, "removed": "the guest and its disk"}

    def _forget_leftovers(self, row: GuestRow, force: bool) -> None:
        retained.forget(self.site, row.name)
        clients.records(self.site).close(row.name)
        self.addresses.leases.drop(row.name)
        with contextlib.suppress(UnknownThing):
            self.store.drop_manifest(residence.retained_name(row.name))
        if force:
            self.journal.forget_guest(row.name, row.state)
            return
        nothing: dict[str, Any] = {"spec": {}, "owner": "", "manifest": "", "wanted": ""}
        self.journal.advance(row.name, row.state, State.ABSENT.value, epoch=0, pending=0, **nothing)

    def _erase(self, name: str) -> None:
        """Everything of an owned guest, in an order that may be cut short anywhere and be repeated."""
        row = self.journal.guest(name)
        if row.wanted == "creating" and (row.spec.get("container") or {}).get("lxc"):
            # Not made here: it ran before it was to be taken over, and is LXC's as long as that has not been done.
            lxc.let_go(residence.container_paths(self.site, name))
        else:
            residence.clear(self.site, name)
        clients.records(self.site).close(name)
        self.addresses.leases.drop(name)
        retained.forget(self.site, name)
        for manifest in (residence.manifest_name(name), residence.retained_name(name)):
            with contextlib.suppress(UnknownThing):
                self.store.drop_manifest(manifest)
        self.journal.advance(
            name, State.OWNER.value, State.ABSENT.value, epoch=0, owner="", spec={}, manifest="", wanted=""
        )

    # -- kept going ----------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """At the agent's start: finishes what was half made or half removed, mends exports, says what is there."""
        for row in self.journal.guests():
            if row.state in MAY_RUN and row.wanted in ("creating", "removing"):
                log.warning("guest %s was being %s when the agent ended: clearing it away", row.name, row.wanted)
                try:
                    self._erase(row.name)
                except HaulierError as error:
                    log.error("guest %s cannot be cleared away: %s", row.name, error)
        for lease in self.store.leases():
            if lease.startswith(RUN_LEASE):
                self.store.drop_lease(lease)
        self.supervise()
        for row in self.journal.guests():
            if row.state not in HIDDEN:
                log.info("guest %s: %s, %s", row.name, row.state, "runs" if self._alive(row.name) else "does not run")

    def supervise(self) -> None:
        """Restarts disk exports that died under a running guest, and lets the guest run on; bounds its console."""
        for row in self.journal.guests():
            if row.state not in MAY_RUN | {State.GRANTED} or self.core.is_busy(row.name) or not self._alive(row.name):
                continue
            try:
                self._mend_export(row)
                shorten(residence.guest_paths(self.site, row.name).serial_log)
            except (HaulierError, OSError) as error:
                log.error("disk export and console of guest %s: %s", row.name, error)

    def _mend_export(self, row: GuestRow) -> None:
        if spec_kind(row) == "container":
            return
        paths = residence.guest_paths(self.site, row.name)
        export: DiskExport | None = None
        with contextlib.suppress(UnknownThing):
            export = DiskExport.attach(paths.nbd_ctl)
        if export is None:
            if not row.manifest:
                return  # its arrival is still to be settled: which disk it is stands there
            log.warning("the disk export of guest %s died: starting it again", row.name)
            self._cut_off.add(row.name)
            mode = ""
            with contextlib.suppress(UnknownThing, Corrupt):
                mode = ExportState.load(paths.nbd_ctl).mode
            with contextlib.suppress(Conflict):  # somebody was faster
                DiskExport.start(self.site.store, row.manifest, paths.nbd_sock, paths.nbd_ctl, paths.nbd_log, mode=mode)
            export = DiskExport.attach(paths.nbd_ctl)
        if row.name in self._cut_off:
            self._run_on(row.name, export)

    def _run_on(self, name: str, export: DiskExport) -> None:
        """Lets a guest go on that stopped, or may still stop, because nobody served its disk for a while."""
        row = self.journal.guest(name)  # an export takes its time to start
        if row.state not in MAY_RUN:
            return
        with self.core.asking:
            qemu = residence.adopt(self.site, name)
            if qemu is None:
                return
            try:
                # In this order: a read that QEMU gave up before it was connected again has stopped the guest by now.
                connected = export.stats()["connections"]
                status = qemu.status()
                if status == "io-error":
                    qemu.recover_io(RUN_ON_S)
                elif status == "running" and connected:
                    self._cut_off.discard(name)
            finally:
                qemu.close()

    def _stop_export(self, name: str) -> None:
        with contextlib.suppress(HaulierError, OSError):
            DiskExport.attach(residence.guest_paths(self.site, name).nbd_ctl).stop()

    def _alive(self, name: str) -> bool:
        if residence.adopt_container(self.site, name) is not None:
            return True
        qemu = residence.adopt(self.site, name)
        if qemu is None:
            return False
        qemu.close()
        return True

    def _owned(self, name: str, doing: str) -> GuestRow:
        """The record of a guest with which this site may do as its operator likes."""
        row = self._known(name)
        if row.state == State.OWNER and row.wanted not in ("creating", "removing"):
            return row
        if row.state == State.AWAY:
            raise Conflict(f"guest {name!r} is at site {row.owner!r}: {doing} it there")
        if row.state in UNDER_WAY:
            raise Conflict(
                f"guest {name!r} is being handed over (handoff {row.handoff}, {row.state}): "
                f"wait for the end, or cancel with 'haulier cancel {row.handoff}'"
            )
        raise Conflict(f"guest {name!r} is {row.wanted}: wait until that has ended")


def spec_kind(row: GuestRow) -> str:
    """ "vm" or "container"."""
    return "container" if row.spec.get("container") else "vm"


def default_gateway(address: str) -> str:
    """The first address of a guest's network; "" without an address."""
    if not address:
        return ""
    try:
        interface = ipaddress.ip_interface(address)
        first = next(iter(interface.network.hosts()))
    except (ValueError, StopIteration):
        raise UsageError(f"bad guest address {address[:60]!r}: write for example 10.77.0.10/24") from None
    return "" if first == interface.ip else str(first)
