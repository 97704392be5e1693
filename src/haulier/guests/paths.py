"""Where the files of one running guest lie."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from haulier.errors import UsageError

MAX_SOCKET_PATH: Final = 100
"""AF_UNIX addresses hold 107 bytes; a margin is left for suffixes that tools append."""


@dataclass(frozen=True)
class GuestPaths:
    """The run directory of a guest, `root`, and its memory file, which lies in the tmpfs `ram_dir`.

    The memory file's name contains a digest of `root`: two sites on one host may share a tmpfs and hold the same
    guest while it is handed over.
    """

    root: Path
    ram_dir: Path = Path("/dev/shm/haulier")

    @property
    def qmp_sock(self) -> Path:
        """QMP for the agent."""
        return self.root / "qmp.sock"

    @property
    def handoff_sock(self) -> Path:
        """QMP for the worker of a handoff."""
        return self.root / "handoff.sock"

    @property
    def rescue_sock(self) -> Path:
        """QMP for what goes on with a post-copy that was cut, and ..."""
        return self.root / "resc.sock"

    @property
    def rescue_ctl(self) -> Path:
        """... where it can be asked to (`haulier.guests.rescue`)."""
        return self.root / "resc.ctl"

    @property
    def qga_sock(self) -> Path:
        """The guest agent's channel."""
        return self.root / "qga.sock"

    @property
    def nbd_sock(self) -> Path:
        """The disk export that this guest's overlay lies on."""
        return self.root / "nbd.sock"

    @property
    def nbd_ctl(self) -> Path:
        """Control socket of that disk export."""
        return self.root / "nbd.ctl"

    @property
    def nbd_log(self) -> Path:
        return self.root / "nbd.log"

    @property
    def rounds_sock(self) -> Path:
        """QEMU's own NBD server, while dirty rounds are read."""
        return self.root / "rounds.sock"

    @property
    def mig_sock(self) -> Path:
        """Where a target QEMU listens for its incoming stream."""
        return self.root / "mig.sock"

    @property
    def out_sock(self) -> Path:
        """Where a worker takes the stream of a source QEMU that may need two connections."""
        return self.root / "out.sock"

    @property
    def serial_log(self) -> Path:
        return self.root / "serial.log"

    @property
    def qemu_log(self) -> Path:
        return self.root / "qemu.log"

    @property
    def pid_file(self) -> Path:
        return self.root / "pid"

    @property
    def record(self) -> Path:
        """What `Qemu.adopt` needs to find the process again (JSON)."""
        return self.root / "qemu.json"

    @property
    def overlay(self) -> Path:
        return self.root / "overlay.qcow2"

    @property
    def spec_file(self) -> Path:
        return self.root / "spec.json"

    @property
    def ram(self) -> Path:
        digest = hashlib.blake2b(str(self.root.absolute()).encode(), digest_size=4).hexdigest()
        return self.ram_dir / f"{self.root.name}-{digest}.ram"

    def prepare(self) -> None:
        """Make the directories. Raises `UsageError` when a socket path would not fit into an address."""
        longest = max((str(p) for p in (self.handoff_sock, self.rounds_sock)), key=len)
        if len(longest.encode()) >= MAX_SOCKET_PATH:
            raise UsageError(f"socket path {longest} has more than {MAX_SOCKET_PATH - 1} bytes: choose a shorter root")
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ram_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def clear_sockets(self) -> None:
        """Remove what a QEMU that is gone left behind; the disk export's sockets are not its own and stay."""
        mine = (self.qmp_sock, self.handoff_sock, self.qga_sock, self.mig_sock, self.rounds_sock, self.pid_file)
        for path in (*mine, self.rescue_sock, self.rescue_ctl, self.out_sock):
            path.unlink(missing_ok=True)
