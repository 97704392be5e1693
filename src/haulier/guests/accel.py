"""Which QEMU there is, what it can give, and whether KVM really boots a guest here.

The presence of /dev/kvm says little: inside containers and nested hosts it may be there and refuse, hang, or give a
CPU without half of its features. So a boot sector of a few bytes is run on the CPU that guests get by default, and
leaves through QEMU's debug-exit device.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from haulier.errors import GuestError, Unsupported
from haulier.guests.model import DEFAULT_CPU

MIN_VERSION: Final = (8, 2, 0)
"""7.2 loses dirty pages under TCG; `avail-switchover-bandwidth` came with 8.2."""
BINARY: Final = "qemu-system-x86_64"
PROBE_S: Final = 5.0

_EXIT_VALUE = 0x21
_EXIT_CODE = _EXIT_VALUE << 1 | 1
# mov al, 0x21 ; out 0xf4, al ; hlt ; jmp to the hlt
_BOOT_CODE = bytes([0xB0, _EXIT_VALUE, 0xE6, 0xF4, 0xF4, 0xEB, 0xFD])
_BOOT_SECTOR = _BOOT_CODE.ljust(510, b"\0") + b"\x55\xaa"


@dataclass(frozen=True)
class Accelerator:
    """What runs the guest's instructions: `kind` is "kvm" or "tcg", `reason` says why in a sentence."""

    kind: str
    reason: str

    @property
    def option(self) -> str:
        """Value of QEMU's -accel."""
        return "kvm" if self.kind == "kvm" else "tcg,thread=multi"


@dataclass(frozen=True)
class QemuInfo:
    """What a site's QEMU can give. `cpus` maps a CPU model to the features it lacks there (empty: it can be given)."""

    version: tuple[int, int, int]
    machines: frozenset[str]
    cpus: dict[str, tuple[str, ...]]
    accel: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, for a message to another site."""
        return {
            "version": list(self.version),
            "machines": sorted(self.machines),
            "cpus": {name: list(lacks) for name, lacks in self.cpus.items()},
            "accel": self.accel,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QemuInfo:
        """The other way round."""
        major, minor, micro = (int(x) for x in data["version"])
        return cls(
            version=(major, minor, micro),
            machines=frozenset(map(str, data["machines"])),
            cpus={str(k): tuple(map(str, v)) for k, v in data["cpus"].items()},
            accel=str(data["accel"]),
        )


def postcopy_missing() -> str:
    """Why this host cannot be the target of post-copy; "" if it can, as far as can be seen without trying."""
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return ""
    if not Path("/proc/sys/vm/unprivileged_userfaultfd").exists():
        return "its kernel has no userfaultfd"
    return "" if os.geteuid() == 0 else "it needs root, or /dev/userfaultfd"


def qemu_binary() -> str:
    """Path of the QEMU to use: $HAULIER_QEMU, else `qemu-system-x86_64` on the path. Raises `Unsupported`."""
    wanted = os.environ.get("HAULIER_QEMU", BINARY)
    found = shutil.which(wanted)
    if found is None:
        raise Unsupported(f"no {wanted} on this host: install QEMU >= 8.2 (Debian: qemu-system-x86)")
    return found


def parse_version(text: str) -> tuple[int, int, int]:
    """Version out of what `qemu-system-x86_64 --version` prints. Raises `Unsupported` for something else."""
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise Unsupported(f"QEMU does not say its version: {text[:80]!r}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def check_version(version: tuple[int, int, int]) -> None:
    """Raises `Unsupported` for a QEMU that cannot be used."""
    if version < MIN_VERSION:
        raise Unsupported(
            f"QEMU {'.'.join(map(str, version))} is too old, haulier needs 8.2 or later: "
            "7.2 loses dirty pages under TCG (Debian 12: install qemu-system-x86 from backports)"
        )


def qemu_version(binary: str | None = None) -> tuple[int, int, int]:
    """(major, minor, micro) of this host's QEMU. Raises `Unsupported` when there is none or it is older than 8.2."""
    version = _version(binary or qemu_binary())
    check_version(version)
    return version


@lru_cache(maxsize=8)
def _version(binary: str) -> tuple[int, int, int]:
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as err:
        raise Unsupported(f"{binary} --version did not work: {err}") from err
    return parse_version(done.stdout)


@lru_cache(maxsize=8)
def probe(binary: str | None = None) -> Accelerator:
    """KVM if a guest boots under it within five seconds, else TCG. Asked once per process."""
    kvm = Path("/dev/kvm")
    if not kvm.exists():
        return Accelerator("tcg", "there is no /dev/kvm")
    if not os.access(kvm, os.R_OK | os.W_OK):
        return Accelerator("tcg", "/dev/kvm may not be opened by this user")
    with tempfile.NamedTemporaryFile(prefix="haulier-boot-") as disk:
        disk.write(_BOOT_SECTOR)
        disk.flush()
        return _verdict(*_boot(binary or qemu_binary(), disk.name, "kvm"))


def _boot(binary: str, disk: str, accel: str) -> tuple[int | None, str]:
    command = [
        binary,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-accel",
        accel,
        "-machine",
        "pc",
        "-cpu",
        f"{DEFAULT_CPU},enforce",
        "-m",
        "16",
    ]
    command += [
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-drive",
        f"file={disk},format=raw,if=ide,snapshot=on",
    ]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=PROBE_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stderr


def _verdict(code: int | None, said: str) -> Accelerator:
    if code == _EXIT_CODE:
        return Accelerator("kvm", "a boot sector ran under KVM")
    if code is None:
        return Accelerator("tcg", f"a boot sector did not finish under KVM within {PROBE_S:g} s")
    lines = said.strip().splitlines() or [f"exit code {code}"]
    return Accelerator("tcg", f"KVM cannot run {DEFAULT_CPU}: {lines[0].removeprefix('qemu-system-x86_64: ')[:120]}")


@lru_cache(maxsize=8)
def qemu_info(accel: str | None = None, binary: str | None = None) -> QemuInfo:
    """Ask QEMU what it can give under `accel` ("kvm" or "tcg"; default: what `probe` says). Asked once per process."""
    path = binary or qemu_binary()
    version = qemu_version(path)
    kind = accel or probe(path).kind
    machines, cpus = _ask(path, kind, ["query-machines", "query-cpu-definitions"])
    return QemuInfo(
        version=version,
        machines=frozenset(_names(machines)),
        cpus={c["name"]: tuple(c.get("unavailable-features", ())) for c in cpus},
        accel=kind,
    )


def _names(machines: Iterable[dict[str, Any]]) -> Iterable[str]:
    for machine in machines:
        yield machine["name"]
        if alias := machine.get("alias"):
            yield alias


def _ask(binary: str, accel: str, commands: list[str]) -> list[Any]:
    """Replies of a QEMU without a machine to `commands`, over its standard input and output."""
    lines = [json.dumps({"execute": c, "id": c}) for c in ["qmp_capabilities", *commands, "quit"]]
    command = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none"]
    command += ["-accel", accel, "-S", "-qmp", "stdio"]
    try:
        done = subprocess.run(
            command, input="\n".join(lines) + "\n", check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as err:
        raise GuestError(f"{binary} could not be asked what it offers: {err}") from err
    replies: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if "id" in message and "return" in message:
            replies[message["id"]] = message["return"]
    missing = [c for c in commands if c not in replies]
    if missing:
        raise GuestError(f"{binary} did not answer {', '.join(missing)}: {done.stderr.strip()[-300:]}")
    return [replies[c] for c in commands]
