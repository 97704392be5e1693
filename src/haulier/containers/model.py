"""What a container is, apart from where it runs: its layers, and the process that it starts. Checked when made."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from haulier.errors import UsageError
from haulier.units import CHUNK

MAX_LAYERS: Final = 32
MAX_WORDS: Final = 1024
MAX_TEXT: Final = 128 << 10
DEFAULT_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_DISK: Final = 2 << 30
"""Bytes that a container may write on top of its image, unless said otherwise."""
LXC_KEYS: Final = (
    r"lxc\.(arch|uts\.name|init\.(cmd|cwd|uid|gid)|environment|tty\.max|pty\.max|signal\.\w+|cap\.(drop|keep)"
    r"|cgroup2?\.(memory|cpu|cpuset|pids|blkio)\.[\w.]+|no_new_privs|autodev(\.tmpfs\.size)?|sysctl\.[\w.]+"
    r"|prlimit\.\w+|mount\.auto)"
)
"""What of an LXC configuration goes with a container: nothing that names a file, program or network of a host."""
LXC_LINE: Final = re.compile(LXC_KEYS + r" = .*")
CAPABILITIES: Final = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""What container engines commonly leave to a container's root."""


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an image wants to be run; empty = not said."""

    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = ""
    user: str = ""
    """"UID:GID" in numbers."""

    def over(self, other: ImageConfig) -> ImageConfig:
        """What this one says, and where it is silent, what `other` says."""
        return ImageConfig(
            command=self.command or other.command,
            env=self.env or other.env,
            cwd=self.cwd or other.cwd,
            user=self.user or other.user,
        )

    @classmethod
    def from_oci(cls, config: dict[str, Any]) -> ImageConfig:
        """From the `config` of an OCI image; UsageError where that is not made of texts."""
        try:
            words = [*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())]
            return cls(
                command=tuple(msgspec.convert(words, list[str])),
                env=tuple(msgspec.convert(config.get("Env") or [], list[str])),
                cwd=msgspec.convert(config.get("WorkingDir") or "", str),
                user=msgspec.convert(config.get("User") or "", str),
            )
        except (msgspec.ValidationError, TypeError) as error:
            raise UsageError(f"the image's config makes no sense: {error}") from None


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a guest's description that only containers have.

    `layers` are the numbers of chunks of each layer, lowest first; they lie at the front of the guest's disk, what the
    container writes lies behind them.
    """

    layers: tuple[int, ...]
    command: tuple[str, ...]
    env: tuple[str, ...] = (DEFAULT_PATH,)
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    lxc: tuple[str, ...] = ()
    """Of one that LXC runs: the lines of its configuration that go with it. None for all others."""

    def __post_init__(self) -> None:
        if not 0 < len(self.layers) <= MAX_LAYERS or any(not 0 < count < 1 << 24 for count in self.layers):
            raise UsageError(f"a container of {len(self.layers)} layers: 1 to {MAX_LAYERS} can be mounted, none empty")
        words = [*self.command, *self.env, self.cwd]
        if not self.command or len(words) > MAX_WORDS or sum(map(len, words)) > MAX_TEXT:
            raise UsageError("a container needs a command, of bounded length: give one with --command")
        if any("\0" in word for word in words) or any("=" not in word for word in self.env):
            raise UsageError("a container's words hold a zero byte, or its environment something that is no NAME=VALUE")
        if not self.cwd.startswith("/"):
            raise UsageError(f"working directory {self.cwd[:80]!r}: give an absolute path")
        for line in self.lxc:
            if len(line) > 4096 or "\n" in line or not LXC_LINE.fullmatch(line):
                raise UsageError(f"an LXC container's configuration has {line[:80]!r}, which does not go with it")
        if len(self.lxc) > MAX_WORDS:
            raise UsageError("an LXC container's configuration is too long")
        if not 0 <= self.uid < 1 << 31 or not 0 <= self.gid < 1 << 31:
            raise UsageError(f"user {self.uid}:{self.gid} is out of bounds")

    @property
    def lower_chunks(self) -> int:
        """Chunks of all layers: where what the container writes begins."""
        return sum(self.layers)

    def disk_size(self, own: int) -> int:
        """Size of the guest's disk in bytes, with `own` bytes for what it writes."""
        return self.lower_chunks * CHUNK + -(-own // CHUNK) * CHUNK


def parse_user(user: str) -> tuple[int, int]:
    """ "UID:GID" or "UID" to numbers. UsageError for names, which only the image could explain."""
    if not user or user in ("root", "root:root"):
        return 0, 0
    uid, _, gid = user.partition(":")
    if not uid.isdigit() or (gid and not gid.isdigit()):
        raise UsageError(f"user {user[:60]!r}: give it as numbers, UID:GID")
    return int(uid), int(gid or 0)
