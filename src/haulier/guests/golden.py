"""Golden snapshots: an image booted to idle once, kept as memory and disk of the same stopped moment.

`golden/<id>/` holds, immutable once it is there:

    memory       QEMU's mapped-ram file: guests are restored from it, and both mirrors of a handoff start as it
    blocks.idx   index of the disk's 4 KiB blocks (`BlockIndex`), over chunks in the order of `block_fingerprints`
    meta.json    `GoldenMeta`

and the store holds the manifest `golden/<id>`. The id is a hash over what a guest born from it must have in common with
it (`golden_id`), so two sites that hold the same id hold the same bytes. It is taken without a NIC: a clone's own is
plugged in after it was restored.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil
from blake3 import blake3

from haulier.chunks.blocks import BlockIndex
from haulier.chunks.fingerprint import ZERO
from haulier.disks.export import DiskExport
from haulier.disks.rounds import DiskRounds
from haulier.durable import sync
from haulier.errors import UNDECODABLE, Cancelled, Corrupt, GuestError, HaulierError, UnknownThing
from haulier.guests.accel import Accelerator, probe
from haulier.guests.agent import wait_for_agent
from haulier.guests.model import DEFAULT_CPU, DEFAULT_MACHINE, GuestSpec, check_name, new_spec
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu, create_overlay
from haulier.memory.base import MemoryBase

if TYPE_CHECKING:
    from haulier.chunks.manifest import Manifest
    from haulier.chunks.store import ChunkStore

MANIFEST_PREFIX: Final = "golden/"
IMAGE_PREFIX: Final = "image/"
BOOT_S: Final = 300.0
SETTLE_S: Final = 90.0
_IDLE_SHARE: Final = 0.15
"""An idle guest takes 2 to 5 % of a core under TCG."""
_IDLE_WINDOWS: Final = 3
_WARM_UP: Final = """
for program in perl python3 date head ip sync systemctl sshd; do
    command -v $program >/dev/null && $program --version
done >/dev/null 2>&1 </dev/null
:"""
"""Brings what a clone needs for its identity into the guest's page cache, so that no clone has to read it."""
_UNFINISHED: Final = ".making-"
DAMAGED: Final = ".damaged-"
"""What was set aside is called so, and then by its id."""
_FORMAT: Final = 1

Progress = Callable[[float, str], None]
"""Called with a share of the work (0 to 1) and what is being done."""


class GoldenMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What `meta.json` says. Digests in hex; `disk_size` and `memory_size` in bytes; `created` since the epoch."""

    format: int
    id: str
    image: str
    image_manifest: str
    manifest: str
    memory: str
    memory_size: int
    memory_mib: int
    vcpus: int
    disk_size: int
    machine: str
    cpu: str
    free_page_hint: bool
    accel: str
    qemu: str
    created: float


@dataclass(frozen=True)
class Golden:
    """One golden snapshot on this site's disk."""

    path: Path
    meta: GoldenMeta

    @property
    def id(self) -> str:
        return self.meta.id

    @property
    def manifest_name(self) -> str:
        """Name of its disk in the store."""
        return MANIFEST_PREFIX + self.meta.id

    @property
    def memory(self) -> Path:
        return self.path / "memory"

    @property
    def index(self) -> Path:
        return self.path / "blocks.idx"

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Raises `UnknownThing` if there is none, `Corrupt` if it is damaged or was renamed."""
        try:
            meta = msgspec.json.decode((path / "meta.json").read_bytes(), type=GoldenMeta)
        except FileNotFoundError:
            raise UnknownThing(f"no golden snapshot in {path}: make one with `haulier image warm`") from None
        except (OSError, *UNDECODABLE) as err:
            raise Corrupt(f"golden snapshot {path} is damaged: {err}; remove it and warm the image again") from err
        if meta.format != _FORMAT or meta.id != path.name or meta.id != golden_id(meta):
            raise Corrupt(f"golden snapshot {path} is not what its id says: remove it and warm the image again")
        golden = cls(path, meta)
        for file in (golden.memory, golden.index):
            if not file.is_file():
                raise Corrupt(f"golden snapshot {path} has no {file.name}: remove it and warm the image again")
        return golden

    def spec(
        self,
        name: str,
        *,
        address: str = "",
        gateway: str = "",
        address6: str = "",
        gateway6: str = "",
        mac: str = "",
    ) -> GuestSpec:
        """A fresh guest that can be born from this snapshot."""
        return new_spec(
            name,
            self.meta.image,
            golden=self.id,
            memory_mib=self.meta.memory_mib,
            vcpus=self.meta.vcpus,
            disk_size=self.meta.disk_size,
            machine=self.meta.machine,
            cpu=self.meta.cpu,
            free_page_hint=self.meta.free_page_hint,
            address=address,
            gateway=gateway,
            address6=address6,
            gateway6=gateway6,
            mac=mac,
        )


def golden_id(meta: GoldenMeta) -> str:
    """BLAKE3 over contents and machine; where and when it was made do not count. 64 hexadecimal digits."""
    counted = {
        name: getattr(meta, name)
        for name in ("format", "manifest", "memory", "memory_mib", "vcpus", "disk_size", "machine", "cpu", "accel")
    }
    counted["free_page_hint"] = meta.free_page_hint
    return blake3(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def block_fingerprints(manifest: Manifest) -> list[bytes]:
    """The chunks whose blocks a golden index covers: each non-zero one once, in order of first appearance.

    Both ends of a handoff fill their `BlockSpace` with this list first, so that block ids mean the same.
    """
    return [fp for fp in dict.fromkeys(manifest.chunks()) if fp != ZERO]


def list_goldens(root: Path) -> list[Golden]:
    """All snapshots under `root` (the site's `golden` directory), newest first; damaged ones are left out."""
    found: list[Golden] = []
    for path in root.iterdir() if root.is_dir() else ():
        if path.name.startswith("."):
            continue
        try:
            found.append(Golden.load(path))
        except HaulierError:
            continue
    return sorted(found, key=lambda golden: golden.meta.created, reverse=True)


def find_golden(
    root: Path,
    image: str,
    memory_mib: int,
    vcpus: int = 1,
    *,
    accel: str | None = None,
    image_manifest: str | None = None,
) -> Golden | None:
    """The newest snapshot of `image` with this memory and these vcpus, for `accel` and of this very image if given."""
    for golden in list_goldens(root):
        meta = golden.meta
        if (meta.image, meta.memory_mib, meta.vcpus) != (image, memory_mib, vcpus):
            continue
        if (accel and meta.accel != accel) or (image_manifest and meta.image_manifest != image_manifest):
            continue
        return golden
    return None


def make_golden(
    store: ChunkStore,
    image_name: str,
    memory_mib: int,
    workdir: Path,
    *,
    root: Path,
    vcpus: int = 1,
    machine: str = DEFAULT_MACHINE,
    cpu: str = DEFAULT_CPU,
    free_page_hint: bool = False,
    accel: Accelerator | None = None,
    ram_dir: Path | None = None,
    netns: str | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Golden:
    """Boot `image/<image_name>` to idle, stop it, keep it under `root` (the site's `golden` directory).

    `workdir` takes the run directory of the QEMU meanwhile (its path must be short: sockets). Nothing is left behind
    when it fails or `cancelled` says so (`Cancelled`); the snapshot appears whole or not at all.

    Raises `UnknownThing` without such an image, `GuestError` if the guest's agent does not answer within five minutes,
    `NoRoom` if the memory does not fit.
    """
    check_name(image_name, "image")
    maker = _Maker(store, image_name, workdir, root, progress or _silent, cancelled or _never)
    image = store.load_manifest(IMAGE_PREFIX + image_name)
    spec = new_spec(
        f"golden-{secrets.token_hex(4)}",
        image_name,
        memory_mib=memory_mib,
        disk_size=image.size,
        vcpus=vcpus,
        machine=machine,
        cpu=cpu,
        free_page_hint=free_page_hint,
    )
    return maker.make(spec, image, accel or probe(), ram_dir, netns)


def clear_unfinished(store: ChunkStore, workdir: Path, root: Path, ram_dir: Path | None = None) -> None:
    """Remove what was set aside, and what `make_golden` left when its process was killed. None may be made now."""
    for run in workdir.glob(f"{_UNFINISHED}*") if workdir.is_dir() else ():
        paths = _paths(run, ram_dir)
        try:
            Qemu.adopt(paths).kill()
        except UnknownThing:
            Qemu.clear(paths)
        _stop_export(paths)
        shutil.rmtree(run, ignore_errors=True)
        store.drop_lease(_lease(run))
    for over in (*root.glob(f"{_UNFINISHED}*"), *root.glob(f"{DAMAGED}*")) if root.is_dir() else ():
        shutil.rmtree(over, ignore_errors=True)


def _paths(run: Path, ram_dir: Path | None) -> GuestPaths:
    return GuestPaths(run) if ram_dir is None else GuestPaths(run, ram_dir)


def _lease(run: Path) -> str:
    return f"golden{run.name}"


def _stop_export(paths: GuestPaths) -> None:
    try:
        DiskExport.attach(paths.nbd_ctl).stop()
    except HaulierError:
        pass


def _silent(share: float, what: str) -> None:
    pass


def _never() -> bool:
    return False


class _Maker:
    """The steps of `make_golden`, with what they share."""

    def __init__(
        self,
        store: ChunkStore,
        image: str,
        workdir: Path,
        root: Path,
        progress: Progress,
        cancelled: Callable[[], bool],
    ) -> None:
        tag = _UNFINISHED + secrets.token_hex(4)
        self.store = store
        self.image = image
        self.run = workdir / tag
        self.half = root / tag
        self.root = root
        self._progress = progress
        self._cancelled = cancelled

    def make(
        self, spec: GuestSpec, image: Manifest, accel: Accelerator, ram_dir: Path | None, netns: str | None
    ) -> Golden:
        paths = _paths(self.run, ram_dir)
        paths.prepare()
        self.half.mkdir(parents=True)
        self.store.add_lease(_lease(self.run))
        qemu: Qemu | None = None
        try:
            DiskExport.start(self.store.path, IMAGE_PREFIX + self.image, paths.nbd_sock, paths.nbd_ctl, paths.nbd_log)
            create_overlay(paths.overlay, spec.disk_size)
            self._say(0.02, "booting")
            qemu = Qemu.start(spec, paths, accel=accel, netns=netns)
            self._to_idle(qemu)
            qemu.stop()
            manifest = self._keep_disk(qemu, paths, image)
            self._keep_memory(qemu)
            qemu.quit()
            qemu = None
            return self._keep(spec, image, manifest, accel)
        finally:
            if qemu is not None:
                qemu.kill()
            _stop_export(paths)
            shutil.rmtree(self.run, ignore_errors=True)
            shutil.rmtree(self.half, ignore_errors=True)
            self.store.drop_lease(_lease(self.run))

    def _say(self, share: float, what: str) -> None:
        if self._cancelled():
            raise Cancelled(f"warming image {self.image} was cancelled; nothing of it is kept")
        self._progress(share, what)

    def _to_idle(self, qemu: Qemu) -> None:
        def alive() -> bool:
            self._say(0.05, "booting")
            return qemu.alive()

        with wait_for_agent(qemu.paths.qga_sock, name=self.image, timeout=BOOT_S, alive=alive) as agent:
            self._say(0.4, "waiting for the guest's services")
            try:
                # Says how it ended, too; a failed unit is the image's business.
                agent.run(["/bin/systemctl", "is-system-running", "--wait"], timeout=SETTLE_S)
            except GuestError:
                pass
        self._settle(qemu)
        with qemu.guest_agent() as agent:
            self._say(0.6, "trimming the disk")
            try:
                agent.fstrim()
            except GuestError:
                pass
            agent.run(["/bin/sh", "-c", _WARM_UP])
            agent.run(["/bin/sync"])

    def _settle(self, qemu: Qemu) -> None:
        """Wait until the guest is idle, as seen from outside: by what its QEMU takes of the host's CPU."""
        process = psutil.Process(qemu.pid)
        deadline = time.monotonic() + SETTLE_S
        calm = 0
        while calm < _IDLE_WINDOWS and time.monotonic() < deadline:
            self._say(0.5, "waiting until the guest is idle")
            share = process.cpu_percent(interval=1.0) / 100
            calm = calm + 1 if share < _IDLE_SHARE else 0

    def _keep_disk(self, qemu: Qemu, paths: GuestPaths, image: Manifest) -> Manifest:
        self._say(0.7, "keeping the disk")
        rounds = DiskRounds(qemu.qmp, "disk0", paths.rounds_sock)
        changes: dict[int, bytes] = {}
        try:
            with rounds.begin() as dirty:
                for index, data in dirty.items():
                    changes[index] = self.store.put(data, lease=_lease(self.run))
        finally:
            rounds.abort()
        self.store.commit()
        return image.replace(changes)

    def _keep_memory(self, qemu: Qemu) -> None:
        self._say(0.75, "keeping the memory")
        qemu.set_capabilities(events=True, mapped_ram=True)
        # No bound: the default of 128 MiB/s would be the slowest part.
        qemu.set_parameters(max_bandwidth=1 << 40)
        mark = qemu.qmp.mark()
        qemu.migrate_uri(f"file:{self.half / 'memory'}")
        qemu.wait_migration({"completed"}, timeout=600, since=mark)

    def _keep(self, spec: GuestSpec, image: Manifest, manifest: Manifest, accel: Accelerator) -> Golden:
        self._say(0.8, "taking digests")
        memory = self.half / "memory"
        base = MemoryBase.from_mapped_ram(memory)
        meta = self._meta(spec, image, manifest, accel, base.digest)
        base.close()
        self._say(0.9, "indexing blocks")
        BlockIndex.build(self.store, block_fingerprints(manifest)).save(self.half / "blocks.idx")
        (self.half / "meta.json").write_bytes(msgspec.json.format(msgspec.json.encode(meta)))
        self._say(0.97, "finishing")
        final = self.root / meta.id
        # The manifest first: one without a snapshot is harmless, a snapshot without its disk is not.
        self.store.save_manifest(MANIFEST_PREFIX + meta.id, manifest, _manifest_meta(meta))
        if not final.exists():
            for file in self.half.iterdir():
                file.chmod(0o400)
                sync(file)
            sync(self.half)
            self.half.rename(final)
            sync(self.root)
        self._progress(1.0, "done")
        return Golden.load(final)

    def _meta(
        self, spec: GuestSpec, image: Manifest, manifest: Manifest, accel: Accelerator, memory: bytes
    ) -> GoldenMeta:
        from haulier.guests.accel import qemu_version

        meta = GoldenMeta(
            format=_FORMAT,
            id="",
            image=self.image,
            image_manifest=image.digest.hex(),
            manifest=manifest.digest.hex(),
            memory=memory.hex(),
            memory_size=(self.half / "memory").stat().st_size,
            memory_mib=spec.memory_mib,
            vcpus=spec.vcpus,
            disk_size=spec.disk_size,
            machine=spec.machine,
            cpu=spec.cpu,
            free_page_hint=spec.free_page_hint,
            accel=accel.kind,
            qemu=".".join(map(str, qemu_version())),
            created=time.time(),
        )
        return msgspec.structs.replace(meta, id=golden_id(meta))


def _manifest_meta(meta: GoldenMeta) -> dict[str, Any]:
    return {"image": meta.image, "memory_mib": meta.memory_mib, "vcpus": meta.vcpus, "created": meta.created}
