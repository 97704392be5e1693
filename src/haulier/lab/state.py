"""The state file of a lab: what was made, so that any process can use it and `down` can remove it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from haulier.errors import UNDECODABLE, Corrupt, UnknownThing
from haulier.lab.shaper import Shape

RUN: Final = Path("/run/haulier/lab")
VERSION: Final = 1


class SiteState(msgspec.Struct, kw_only=True):
    """A site. `address`: its own; `links`: link name -> address there; `guest_gateway`: "address/length" or ""."""

    namespace: str
    address: str
    guest_gateway: str
    links: dict[str, str]


class LinkState(msgspec.Struct, kw_only=True):
    """A link. `pid`, `started`: its relay (0: none, or not started yet)."""

    a: str
    b: str
    interface: str
    subnet: str
    mtu: int
    a_to_b: Shape
    b_to_a: Shape
    socket: str = ""
    pid: int = 0
    started: int = 0


class LabState(msgspec.Struct, kw_only=True):
    """All of a lab. `complete`: False while it is brought up. `instance`: this bringing-up's own mark."""

    version: int
    lab: str
    instance: str
    backend: str
    complete: bool
    topology: str
    sites: dict[str, SiteState]
    links: dict[str, LinkState]


def path(lab: str) -> Path:
    """The state file of a lab."""
    return RUN / f"{lab}.json"


def directory(lab: str) -> Path:
    """Sockets and logs of a lab's relays."""
    return RUN / lab


def names() -> list[str]:
    """Labs that are up, or were left half way."""
    return sorted(file.stem for file in RUN.glob("*.json"))


def load(lab: str) -> LabState:
    """`UnknownThing` when the lab is not up."""
    try:
        raw = path(lab).read_bytes()
    except FileNotFoundError:
        there = ", ".join(names()) or "none"
        raise UnknownThing(
            f"lab {lab} is not up (up: {there}): bring it up with `haulier lab up TOPOLOGY.toml`"
        ) from None
    try:
        found = msgspec.json.decode(raw, type=LabState)
    except UNDECODABLE as error:
        raise Corrupt(f"{path(lab)} cannot be read: {error}") from None
    if found.version != VERSION:
        raise Corrupt(
            f"{path(lab)} is of version {found.version}, this haulier writes {VERSION}: use the one that wrote it"
        )
    return found


def save(state: LabState) -> None:
    """Replaces the state file atomically."""
    target = path(state.lab)
    temporary = target.with_suffix(f".{os.getpid()}.new")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    temporary.replace(target)


def namespaces_of(lab: str) -> list[str]:
    """The namespaces that a state file names, even one of another version; none without a file.

    `Corrupt` when it cannot be told: guessing by name could hit what is not the lab's.
    """
    try:
        return [site.namespace for site in load(lab).sites.values()]
    except UnknownThing:
        return []
    except Corrupt as error:
        try:
            sites = msgspec.json.decode(path(lab).read_bytes())["sites"]
            return [str(site["namespace"]) for site in sites.values()]
        except (*UNDECODABLE, KeyError, TypeError, AttributeError):
            raise Corrupt(
                f"{path(lab)} does not say which namespaces lab {lab} made ({error}): remove its own of "
                f"`ip netns list` by `ip netns delete`, then that file"
            ) from None


def remove(lab: str) -> None:
    """Removes the files of a lab but its lock."""
    shutil.rmtree(directory(lab), ignore_errors=True)
    for left in RUN.glob(f"{lab}.*.new"):
        left.unlink(missing_ok=True)
    path(lab).unlink(missing_ok=True)


def remove_lock(lab: str) -> None:
    """Removes the file of the lock: call it while holding that lock, as the last thing."""
    _lock_file(lab).unlink(missing_ok=True)


@contextmanager
def lock(lab: str) -> Iterator[None]:
    """One process at a time in a lab; given back by the kernel whatever happens to the holder."""
    RUN.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(_lock_file(lab), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The one before us may have removed the file: then somebody else may already hold a new one.
            if _is_current(handle, _lock_file(lab)):
                yield
                return
        finally:
            os.close(handle)


@contextmanager
def lock_names() -> Iterator[None]:
    """One process at a time that makes namespaces."""
    RUN.mkdir(parents=True, exist_ok=True)
    handle = os.open(RUN, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lock_file(lab: str) -> Path:
    return RUN / f".{lab}.lock"


def _is_current(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False
