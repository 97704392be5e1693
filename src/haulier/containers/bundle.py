"""The OCI runtime's config.json of a container, the same at both sites but for paths. Pure."""

from __future__ import annotations

from typing import Any, Final

from haulier.containers.model import CAPABILITIES, ContainerSpec
from haulier.units import MIB

LOG: Final = "/var/log/container.log"
_SHELL: Final = f'mkdir -p /var/log; exec "$@" >>{LOG} 2>&1 </dev/null'
MASKED: Final = ("/proc/kcore", "/proc/keys", "/proc/timer_list")
NETWORK_KEY: Final = "extRootNetNS"
"""What runc calls the container's network namespace when it has CRIU restore it."""
_NO: Final = ["nosuid", "noexec", "nodev"]


def config(
    spec: ContainerSpec, *, hostname: str, memory_mib: int, vcpus: int, netns: str, cgroup: str, criu: str, shell: bool
) -> dict[str, Any]:
    """`netns` is the path of its network namespace, `criu` that of CRIU's options; `shell`: the image has /bin/sh.

    With a shell what the container says goes to a file in it: descriptors of the host could not be restored elsewhere.
    """
    args = ["/bin/sh", "-c", _SHELL, "sh", *spec.command] if shell else list(spec.command)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": spec.uid, "gid": spec.gid},
            "args": args,
            "env": list(spec.env),
            "cwd": spec.cwd,
            "capabilities": {name: list(CAPABILITIES) for name in ("bounding", "effective", "permitted")},
            "noNewPrivileges": False,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": hostname,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
            _mount("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            _mount("/dev/shm", "tmpfs", "shm", [*_NO, "mode=1777", "size=65536k"]),
            _mount("/dev/mqueue", "mqueue", "mqueue", _NO),
            _mount("/sys", "sysfs", "sysfs", [*_NO, "ro"]),
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
                {"type": "network", "path": netns},
            ],
            "cgroupsPath": cgroup,
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],
                "memory": {"limit": memory_mib * MIB},
                "cpu": {"quota": vcpus * 100_000, "period": 100_000},
                "pids": {"limit": 4096},
            },
            "maskedPaths": list(MASKED),
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
        "annotations": {"org.criu.config": criu},
    }


def _mount(destination: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": options}


def criu_options(*, restoring: bool, established: bool = True) -> str:
    """CRIU's options, one a line.

    Nothing is locked by CRIU: the container's cable is pulled before a final dump, and plugged in again after the
    restored processes run. They are restored stopped, for only the token may set them going.
    """
    words = ["network-lock skip", "file-locks", "force-irmap", "irmap-scan-path /var", "irmap-scan-path /etc"]
    words.append("tcp-established" if established else "tcp-close")
    if restoring:
        words.append("leave-stopped")
    return "\n".join(words) + "\n"
