"""What stands against handing a container over, found before anything is sent, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path
from typing import Final

from haulier.containers.criu import find_criu
from haulier.containers.memory import kernel_digest
from haulier.containers.runc import runc_version
from haulier.containers.sockets import SO_DOMAIN, SO_PROTOCOL, borrowed
from haulier.errors import Unsupported

_MPTCP: Final = 262
_KNOWN_DOMAINS: Final = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET}

ADVICE: Final = (
    (r"io_uring|send_fds", "it uses io_uring, which CRIU cannot dump: turn it off in the program's settings"),
    (
        r"proto 262|Unsupported proto",
        "it has a socket of a protocol that CRIU cannot dump (MPTCP?): for Go programs set GODEBUG=multipathtcp=0",
    ),
    (
        r"inotify|irmap|Can't dump that handle",
        "it watches files with inotify that CRIU cannot find by path again: "
        "let it poll instead, or watch files below /var or /etc",
    ),
    (
        r"rlimit",
        "it runs a process of another user, whose limits only a host with CAP_SYS_RESOURCE can read: run it as "
        "root in the container, or give the agent that capability",
    ),
    (r"mqueue", "it uses POSIX message queues, which CRIU cannot dump"),
    (r"lock", "it holds a file lock that CRIU cannot dump (OFD locks and leases of other processes)"),
    (
        r"nested|pid ?ns|user ?ns|mnt_ns|namespace",
        "it makes namespaces of its own (systemd, browsers): such containers cannot be dumped",
    ),
    (r"tty|pts", "it holds a terminal of the host: start it without one"),
    (r"dev|char", "it has a device open that CRIU does not know (a GPU?)"),
    (r"seccomp", "its seccomp filter cannot be dumped on this kernel"),
)


def explain(said: str) -> str:
    """CRIU's words with what they mean and what to do, where that is known."""
    for pattern, advice in ADVICE:
        if re.search(pattern, said, re.IGNORECASE):
            return f"{advice} (CRIU: {said[-300:]})"
    return f"CRIU says: {said[-400:]}"


def scan(pids: list[int]) -> list[str]:
    """What open files of these processes already tell: each a reason why they cannot be dumped, and what to do."""
    found: dict[str, int] = {}
    for pid in pids:
        folder = Path(f"/proc/{pid}/fd")
        with contextlib.suppress(OSError):
            for entry in folder.iterdir():
                with contextlib.suppress(OSError):
                    target = str(entry.readlink())
                    problem = _problem(pid, int(entry.name), target)
                    if problem:
                        found.setdefault(problem, pid)
    return [f"{problem} (process {pid})" for problem, pid in found.items()]


def _problem(pid: int, number: int, target: str) -> str:
    if target == "anon_inode:[io_uring]":
        return ADVICE[0][1]
    if target.startswith("anon_inode:") and re.search(r"bpf|kvm|userfaultfd|perf_event|fanotify", target):
        return f"it has {target.removeprefix('anon_inode:')} open, which CRIU cannot dump: turn that off in it"
    if target.startswith("/dev/") and re.match(r"/dev/(nvidia|dri|kfd|kvm|vfio|fuse)", target):
        return f"it uses the device {target}, whose state no other host has: run it without"
    if target.startswith("socket:"):
        return _socket_problem(pid, number)
    return ""


def _socket_problem(pid: int, number: int) -> str:
    try:
        with borrowed(pid, number) as sock:
            domain, protocol = (
                sock.getsockopt(socket.SOL_SOCKET, SO_DOMAIN),
                sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL),
            )
    except OSError:
        return ""
    if protocol == _MPTCP:
        return "it has an MPTCP socket, which CRIU cannot dump: for Go programs set GODEBUG=multipathtcp=0"
    if domain not in _KNOWN_DOMAINS:
        return f"it has a socket of address family {domain}, which CRIU cannot dump"
    return ""


# -- two hosts -----------------------------------------------------------------------------------------------------


def host_facts() -> dict[str, str]:
    """What processes that were dumped here rely on. Unsupported where containers cannot be run at all."""
    return {
        "kernel": os.uname().release,
        "criu": find_criu().version,
        "runc": runc_version(),
        "cpu": " ".join(sorted(cpu_flags())),
        "vdso": kernel_digest(),
    }


def cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.partition(":")[2].split())
    return set()


def differences(theirs: dict[str, str]) -> list[str]:
    """Why this host cannot go on with processes that were dumped on a host with these facts."""
    try:
        ours = host_facts()
    except Unsupported as error:
        return [str(error)]
    found = []
    missing = sorted(set(theirs.get("cpu", "").split()) - set(ours["cpu"].split()) - _HARMLESS)
    if missing:
        found.append(
            f"its processor lacks {', '.join(missing[:8])}{' and more' if len(missing) > 8 else ''}, which the "
            "container's programs may use (choose a host with the same or a newer processor)"
        )
    if _numbers(theirs.get("kernel", "")) > _numbers(ours["kernel"]):
        found.append(
            f"its kernel {ours['kernel']} is older than {theirs['kernel'][:60]}, with which the container runs "
            "(choose a host with the same or a newer kernel)"
        )
    if _numbers(theirs.get("criu", ""))[:1] != _numbers(ours["criu"])[:1]:
        found.append(f"it has CRIU {ours['criu']}, the other site {theirs.get('criu', 'none')[:40]} (install the same)")
    return found


def same_kernel_pages(theirs: dict[str, str]) -> bool:
    """Whether a host with these facts puts the same code into every process as this one does."""
    return theirs.get("vdso") == kernel_digest()


_HARMLESS: Final = frozenset({"ibrs", "ibpb", "stibp", "ssbd", "ibrs_enhanced", "arch_perfmon", "pdcm", "aperfmperf"})
"""Flags that say something of the host to its kernel, and nothing to programs."""


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
