"""Network namespaces by name, through iproute2.

iproute2 rather than a netlink library: several processes use labs at once, each call is a process of its own that
leaves no socket, thread or namespace switch behind in the caller, and a batch tells which line failed.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from haulier.errors import HaulierError, UnknownThing, Unsupported

RUN_NETNS: Final = Path("/run/netns")
_CLONE_NEWNET: Final = 0x40000000
T = TypeVar("T")


class Counters(msgspec.Struct, frozen=True):
    """Statistics of an interface since it was made."""

    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int


def run(argv: Sequence[str], given: str | None = None, timeout: float = 30) -> str:
    """Runs a tool; its output. `HaulierError` with what it said."""
    try:
        done = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise Unsupported(f"{argv[0]} is not installed: install Debian's iproute2") from None
    except subprocess.TimeoutExpired:
        raise HaulierError(f"{' '.join(argv)} did not end within {timeout:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise HaulierError(f"{' '.join(argv)} failed ({done.returncode}): {said}")
    return done.stdout


def exists(name: str) -> bool:
    """Is there a namespace of that name?"""
    return (RUN_NETNS / name).exists()


def add(name: str, *, ipv6: bool = False) -> None:
    """Makes a namespace with its loopback up, forwarding on, reverse-path filter off and no IPv6 unless asked for."""
    run(["ip", "netns", "add", name])
    values = {
        "net/ipv4/ip_forward": "1",
        "net/ipv4/conf/all/rp_filter": "0",
        "net/ipv4/conf/default/rp_filter": "0",
    }
    for which in ("all", "default"):
        # Router and neighbour discovery would show up in the byte counters of an idle link.
        values[f"net/ipv6/conf/{which}/disable_ipv6"] = "0" if ipv6 else "1"
        if ipv6:
            # Who forwards asks no router; and an address is of use at once, not after it was asked for in vain.
            values[f"net/ipv6/conf/{which}/forwarding"] = "1"
            values[f"net/ipv6/conf/{which}/accept_dad"] = "0"
    sysctl(name, values)
    ip(name, ["link set lo up"])


def delete(name: str) -> None:
    """Removes a namespace's name if it is there; the kernel frees the rest when nothing uses it."""
    if exists(name):
        try:
            run(["ip", "netns", "delete", name])
        except HaulierError:
            if exists(name):
                raise


def processes(name: str) -> list[int]:
    """Ids of the processes that live in a namespace."""
    if not exists(name):
        return []
    try:
        said = run(["ip", "netns", "pids", name])
    except HaulierError:
        # A file whose mount is gone: what an interrupted delete leaves behind.
        return []
    return [int(word) for word in said.split()]


def ip(name: str, lines: Sequence[str]) -> None:
    """Runs lines of `ip` in a namespace, in order, up to the first that fails."""
    if lines:
        run(inside(name, ["ip", "-batch", "-"]), "\n".join(lines) + "\n")


def inside(name: str, argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` in a namespace.

    Not `ip netns exec` nor `ip -n`: they make a mount namespace too, which fails where / is no mount point (a chroot).
    """
    return ["nsenter", f"--net=/run/netns/{name}", "--", *argv]


def sysctl(name: str, values: Mapping[str, str]) -> None:
    """Sets values under /proc/sys (keys with slashes) as a namespace sees it; keys the kernel has not got are left."""
    script = "".join(f"[ ! -e /proc/sys/{key} ] || echo {value} > /proc/sys/{key}\n" for key, value in values.items())
    run(inside(name, ["sh", "-e"]), script)


def counters(name: str, interface: str) -> Counters:
    """The statistics of an interface; `UnknownThing` when it is not there."""
    try:
        shown = json.loads(run(inside(name, ["ip", "-j", "-s", "link", "show", "dev", interface])))
        stats = next(entry["stats64"] for entry in shown if entry)
    except (HaulierError, StopIteration, KeyError, ValueError) as error:
        raise UnknownThing(f"namespace {name} has no interface {interface} to count bytes of: {error}") from None
    rx, tx = stats["rx"], stats["tx"]
    return Counters(rx["bytes"], rx["packets"], tx["bytes"], tx["packets"])


def enter(path: str | int) -> None:
    """Moves the calling *thread* into a namespace (a path or an open file)."""
    handle = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(handle, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter network namespace {path}: {os.strerror(number)}")
    finally:
        if not isinstance(path, int):
            os.close(handle)


def call(name: str, function: Callable[[], T]) -> T:
    """Calls `function` inside a namespace: sockets that it makes belong there for ever.

    It runs on a thread of its own, which is thrown away, so that the caller's namespace never changes.
    """
    if not exists(name):
        raise UnknownThing(f"there is no network namespace {name}")
    result: list[T] = []
    failure: list[BaseException] = []

    def inside() -> None:
        try:
            enter(str(RUN_NETNS / name))
            result.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=inside, name=f"in-{name}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
