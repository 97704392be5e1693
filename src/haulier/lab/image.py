"""Guest images for the lab, built from this machine's own package mirror.

An image is one sparse raw file that boots by itself: boot record and loader before the first MiB, then one ext4 file
system that holds all else. Nothing is mounted to make it: mmdebstrap unpacks the packages into a directory, mke2fs
fills the file system from there, and GRUB's two parts are written where the BIOS and its own first stage look for
them (sector 0, and sector 1 onwards). That works without loop devices, in a container too.

The guest is meant for TCG and for being handed over: kernel for virtual machines, freed memory zeroed, no timers, no
log on disk, discard on the root file system, an initramfs with the virtio drivers only.

    python -m haulier.lab.image OUT [--suite SUITE] [--size-mib N]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from haulier.errors import GuestError, HaulierError, NoRoom, Unsupported
from haulier.lab import apt
from haulier.units import MIB

ROOT_OFFSET: Final = MIB
"""Where the root file system starts in the image, in bytes (`e2fsck IMAGE?offset=1048576`)."""
DEFAULT_SIZE: Final = 4096 * MIB
MIN_SIZE: Final = 1024 * MIB
COMMAND_LINE: Final = (
    "root=/dev/vda1 rootflags=discard,noatime rw fsck.mode=skip console=ttyS0 net.ifnames=0 init_on_free=1 quiet"
)
CACHE: Final = Path("/var/cache/haulier/images")

_KERNELS: Final = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
_PACKAGES: Final = (
    "systemd-sysv",
    "udev",
    "kmod",
    "initramfs-tools",
    "zstd",
    "e2fsprogs",
    "qemu-guest-agent",
    "python3",
    "openssh-server",
    "iproute2",
)
_MASKED: Final = (
    # Timers: an idle guest must change neither memory nor disk.
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-tmpfiles-clean.timer",
    # Each clone of a snapshot would share the seed; identity is injected instead.
    "systemd-random-seed.service",
    # Nothing here that the lab needs; each costs a second of boot under TCG, or memory.
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "getty-static.service",
    "modprobe@dm_mod.service",
    "modprobe@loop.service",
    "systemd-logind.service",
    "systemd-networkd-wait-online.service",
    "systemd-pstore.service",
    "systemd-update-utmp.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-hwdb-update.service",
    "systemd-binfmt.service",
    "systemd-update-done.service",
    "systemd-timesyncd.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@configfs.service",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-kernel-config.mount",
    "sys-fs-fuse-connections.mount",
    "systemd-remount-fs.service",
    "systemd-udev-load-credentials.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "kmod-static-nodes.service",
    "tmp.mount",
    "ssh.socket",
)
_NO_GENERATORS: Final = (
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-run-generator",
    "systemd-ssh-generator",
    "systemd-system-update-generator",
    "systemd-sysv-generator",
    "systemd-tpm2-generator",
    "systemd-veritysetup-generator",
)
_FILES: Final[Mapping[str, str]] = {
    "etc/fstab": "/dev/vda1 / ext4 discard,noatime,errors=remount-ro 0 0\n",
    "etc/initramfs-tools/conf.d/haulier": (
        "MODULES=list\nBUSYBOX=n\nKEYMAP=n\nCOMPRESS=zstd\nFSTYPE=ext4\nRESUME=none\n"
    ),
    "usr/share/initramfs-tools/modules.d/haulier": "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n",
    "etc/modules-load.d/haulier.conf": "virtio_console\nvirtio_balloon\nvirtio_rng\nvirtio_net\n",
    "etc/systemd/journald.conf.d/haulier.conf": (
        "[Journal]\nStorage=volatile\nRuntimeMaxUse=2M\nForwardToSyslog=no\nForwardToConsole=no\nAudit=no\n"
    ),
    "etc/systemd/system.conf.d/haulier.conf": "[Manager]\nStatusUnitFormat=name\nRuntimeWatchdogSec=0\n",
    # Only what the guest uses is looked at again at boot (9 s under TCG else); its drivers are listed above.
    "etc/systemd/system/systemd-udev-trigger.service.d/haulier.conf": (
        "[Service]\nExecStart=\nExecStart=udevadm trigger --type=devices --action=add"
        " --subsystem-match=block --subsystem-match=virtio-ports --subsystem-match=net\n"
    ),
    "etc/ssh/sshd_config.d/haulier.conf": "HostKey /etc/ssh/ssh_host_ed25519_key\nUseDNS no\nPrintMotd no\n",
    # The host key belongs to one guest, so it is made when the identity is injected, and sshd waits for it.
    "etc/systemd/system/ssh.service.d/haulier.conf": ("[Unit]\nConditionPathExists=/etc/ssh/ssh_host_ed25519_key\n"),
    "etc/sysctl.d/haulier.conf": "kernel.printk = 4 4 1 7\nvm.stat_interval = 30\n",
}


@dataclass(frozen=True)
class Application:
    """What an image has on top of the lab's base: packages and (path in the guest -> contents) files."""

    name: str
    packages: tuple[str, ...]
    files: Mapping[str, bytes]
    commands: tuple[str, ...] = ()
    """Shell commands run in the guest's root when all else is there, one after the other."""


def build_debian(
    out: Path,
    suite: str | None = None,
    size: int = DEFAULT_SIZE,
    progress: Callable[[str], None] | None = None,
    application: Application | None = None,
) -> None:
    """Build a bootable image of `size` bytes at `out`, which appears whole or not at all.

    `suite` is a code name (this machine's own by default). `progress` is told what is being done, one line each.
    Needs root, mmdebstrap, mke2fs and grub-mkimage. Raises Unsupported when one is missing, UnknownThing when the
    machine's apt knows no such suite, GuestError (with the last lines of what the step said) when a step fails.
    """
    say = progress or (lambda _line: None)
    _preflight(size)
    distribution, host_suite = apt.host_release()
    suite = suite or host_suite
    sources = apt.sources_for(suite, host_suite, apt.machine_sources())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".haulier-image-", dir=out.parent) as scratch_name:
        scratch = Path(scratch_name)
        (scratch / "haulier.sources").write_text("\n".join(source.deb822() for source in sources))
        overlay, root, image = scratch / "overlay", scratch / "root", scratch / "image.raw"
        _write_overlay(overlay)
        for name, data in application.files.items() if application else ():
            _put(overlay / name, data, 0o644)
        say(f"unpacking {suite} from {', '.join(uri for source in sources for uri in source.uris)}")
        _run(_mmdebstrap(distribution, suite, scratch, overlay, root, application), say)
        say("writing the file system")
        _write_disk(image, root, size, scratch)
        image.replace(out)
    say(f"built {out}")


def recipe(
    suite: str | None = None, size: int = DEFAULT_SIZE, application: Application | None = None
) -> dict[str, object]:
    """All that decides what is in an image, but for the mirror's versions; JSON-able, stable between runs."""
    distribution, host_suite = apt.host_release()
    more: dict[str, object] = {}
    if application:
        files = {name: data.decode() for name, data in application.files.items()}
        more["application"] = {"packages": list(application.packages), "files": files}
        if application.commands:
            more["commands"] = list(application.commands)
    return more | {
        "suite": suite or host_suite,
        "size": size,
        "kernel": _KERNELS.get(distribution, _KERNELS["debian"]),
        "packages": list(_PACKAGES),
        "masked": [*_MASKED, *_NO_GENERATORS],
        "files": {**_FILES, **{name: text.decode() for name, (text, _mode) in _resources().items()}},
        "finish": _resource("lab/rootfs/finish.sh").decode(),
        "command_line": COMMAND_LINE,
    }


def cached_image(
    suite: str | None = None,
    size: int = DEFAULT_SIZE,
    progress: Callable[[str], None] | None = None,
    application: Application | None = None,
) -> Path:
    """The image of `recipe` with these, built at the first call and reused after; safe against concurrent callers.

    It lies in /var/cache/haulier/images ($HAULIER_CACHE/images where set). Treat it as read-only.
    """
    cache = Path(os.environ["HAULIER_CACHE"]) / "images" if os.environ.get("HAULIER_CACHE") else CACHE
    ingredients = recipe(suite, size, application)
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()[:12]
    kind = f"-{application.name}" if application else ""
    path = cache / f"{apt.host_release()[0]}-{ingredients['suite']}{kind}-{digest}.raw"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / ".lock"):
        if not path.exists():
            build_debian(path, suite, size, progress, application)
            _forget_old(cache, path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m haulier.lab.image", description="Build a guest image of the lab.")
    parser.add_argument(
        "out", type=Path, nargs="?", help="where to put it (default: into the cache, and print its path)"
    )
    parser.add_argument("--suite", help="code name (default: this machine's)")
    parser.add_argument("--size-mib", type=int, default=DEFAULT_SIZE // MIB)
    args = parser.parse_args(arguments)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {line}", file=sys.stderr, flush=True)

    try:
        if args.out is None:
            print(cached_image(args.suite, args.size_mib * MIB, say))
        else:
            build_debian(args.out, args.suite, args.size_mib * MIB, say)
    except HaulierError as error:
        print(f"image: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _preflight(size: int) -> None:
    if size % MIB or size < MIN_SIZE:
        raise NoRoom(f"an image of {size} bytes: give a multiple of 1 MiB, at least {MIN_SIZE // MIB} MiB")
    if os.geteuid() != 0:
        raise Unsupported("building an image needs root; run it as root")
    for tool, package in (("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("grub-mkimage", "grub-common")):
        if shutil.which(tool) is None:
            raise Unsupported(f"building an image needs {tool}; run scripts/setup, or install the package {package}")
    if not _grub_parts().is_dir():
        raise Unsupported("building an image needs GRUB's BIOS parts; run scripts/setup, or install grub-pc-bin")


def _mmdebstrap(
    distribution: str, suite: str, scratch: Path, overlay: Path, root: Path, application: Application | None
) -> list[str]:
    more = application or Application("", (), {})
    include = [*_PACKAGES, _KERNELS.get(distribution, _KERNELS["debian"]), *more.packages]
    finish = scratch / "finish.sh"
    finish.write_bytes(_resource("lab/rootfs/finish.sh"))
    excluded = ("doc", "man", "info", "locale", "lintian", "bug", "zoneinfo/right", "zoneinfo/posix")
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--format=directory",
        f"--include={','.join(include)}",
        *(f"--aptopt={line}" for line in apt.acquire_options()),
        "--aptopt=Apt::Install-Recommends false",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in excluded),
        # Before the packages that read these files are installed, so that the initramfs is made once, as wanted.
        f"--essential-hook=cp -a '{overlay}/.' \"$1\"",
        *(f'--customize-hook=chroot "$1" /bin/sh -c {shlex.quote(command)}' for command in more.commands),
        f"--customize-hook=sh '{finish}' \"$1\"",
        suite,
        str(root),
        str(scratch / "haulier.sources"),
    ]


def _write_overlay(overlay: Path) -> None:
    overlay.mkdir(mode=0o755)
    overlay.chmod(0o755)
    for name, text in _FILES.items():
        _put(overlay / name, text.encode(), 0o644)
    for name, (data, mode) in _resources().items():
        _put(overlay / name, data, mode)
    for directory, names in (("system", _MASKED), ("system-generators", _NO_GENERATORS)):
        path = overlay / "etc/systemd" / directory
        path.mkdir(parents=True, exist_ok=True)
        for name in names:
            (path / name).symlink_to("/dev/null")


def _put(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _resources() -> dict[str, tuple[bytes, int]]:
    """Path in the guest -> content and mode, of the files that haulier ships for it."""
    return {
        "etc/haulier/clone.d/ssh": (_resource("lab/rootfs/start-ssh.sh"), 0o755),
        "usr/lib/haulier/workload.py": (_resource("lab/workload.py"), 0o644),
        "usr/lib/systemd/system/haulier-workload.service": (_resource("lab/rootfs/haulier-workload.service"), 0o644),
    }


def _resource(name: str) -> bytes:
    return resources.files("haulier").joinpath(name).read_bytes()


def _grub_parts() -> Path:
    return Path("/usr/lib/grub/i386-pc")


def _write_disk(image: Path, root: Path, size: int, scratch: Path) -> None:
    with image.open("wb") as file:
        file.truncate(size)
    blocks = (size - ROOT_OFFSET) // 4096
    # Tables are written now: lazy initialisation would write to an idle guest's disk for minutes.
    extended = f"offset={ROOT_OFFSET},lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    mkfs = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-L", "root", "-J", "size=32"]
    _run([*mkfs, "-E", extended, "-d", str(root), str(image), str(blocks)])
    _write_loader(image, size, scratch)
    # Zeros that mke2fs wrote become holes again.
    _run(["fallocate", "--dig-holes", str(image)])


def _write_loader(image: Path, size: int, scratch: Path) -> None:
    """The master boot record with one partition, and GRUB's core right behind it.

    boot.img loads sector 1 and jumps there; the core's first sector has the count of the others and expects them from
    sector 2 on. Those are the values that both have before any installer touches them.
    """
    config, core = scratch / "grub.cfg", scratch / "core.img"
    config.write_text(f"set root=(hd0,msdos1)\nlinux /boot/vmlinuz {COMMAND_LINE}\ninitrd /boot/initrd.img\nboot\n")
    modules = ["biosdisk", "part_msdos", "ext2", "linux"]
    _run(["grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "/boot/grub", "-c", str(config), *modules])
    first_stage, second = (_grub_parts() / "boot.img").read_bytes(), core.read_bytes()
    if len(first_stage) != 512 or len(second) > ROOT_OFFSET - 512:
        raise Unsupported("GRUB's parts have unexpected sizes; is grub-pc-bin of this distribution installed?")
    with image.open("r+b") as file:
        file.write(first_stage[:440] + partition_table(size))
        file.write(second)
        file.flush()
        os.fsync(file.fileno())


def partition_table(size: int) -> bytes:
    """The last 72 bytes of a boot record: signature of the disk, one active Linux partition from ROOT_OFFSET on."""
    sectors = (size - ROOT_OFFSET) // 512
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", ROOT_OFFSET // 512, sectors)
    return b"haul\0\0" + entry + bytes(48) + b"\x55\xaa"


def _run(command: Sequence[str], say: Callable[[str], None] | None = None) -> None:
    """Run `command`; its lines of progress go to `say`, its last lines into the error."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    environment["PATH"] = f"{environment.get('PATH', '')}:/usr/sbin:/sbin"
    tail: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail = [*tail[-14:], line.rstrip()]
            if say and line.startswith("I: "):
                say(line[3:].rstrip())
    if process.returncode != 0:
        last = "\n  ".join(tail)
        raise GuestError(f"{command[0]} failed with {process.returncode}; it said at the end:\n  {last}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_old(cache: Path, newest: Path) -> None:
    """Drop images of other recipes that nobody has opened for a day."""
    for path in cache.glob("*.raw"):
        stat = path.stat()
        if path != newest and max(stat.st_atime, stat.st_mtime) < time.time() - 86400:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
