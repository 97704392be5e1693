"""The control group that stops all processes of a container between two instructions: a file, no program's start.

Both kinds of control groups, as the kernel's documentation has them (cgroup-v1/freezer-subsystem, cgroup-v2): the file
is written, and read until all processes stand still.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from haulier.errors import GuestError

FREEZE_S: Final = 10.0
_POLL_S: Final = 0.0005


@dataclass(frozen=True)
class Freezer:
    """The directory of a container's control group; `unified`: of version 2."""

    folder: Path
    unified: bool

    def freeze(self) -> None:
        """Repeated, it changes nothing. GuestError when a process cannot be stopped."""
        self._write(True)
        deadline = time.monotonic() + FREEZE_S
        while not self.frozen():
            if time.monotonic() > deadline:
                self._write(False)
                raise GuestError(f"the processes in {self.folder} do not stop: one of them waits for the host's disk?")
            time.sleep(_POLL_S)
            if not self.unified:
                # A fork meanwhile leaves it half way; asked again it goes on.
                self._write(True)

    def thaw(self) -> None:
        """Lets them run on."""
        self._write(False)

    def frozen(self) -> bool:
        """All of them stand still."""
        try:
            if self.unified:
                return "frozen 1" in (self.folder / "cgroup.events").read_text().splitlines()
            return (self.folder / "freezer.state").read_text().strip() == "FROZEN"
        except OSError:
            return False

    def asked(self) -> bool:
        """They stand still, or are about to."""
        try:
            if self.unified:
                return (self.folder / "cgroup.freeze").read_text().strip() == "1"
            return (self.folder / "freezer.state").read_text().strip() != "THAWED"
        except OSError:
            return False

    def _write(self, freeze: bool) -> None:
        try:
            if self.unified:
                (self.folder / "cgroup.freeze").write_text("1" if freeze else "0")
            else:
                (self.folder / "freezer.state").write_text("FROZEN" if freeze else "THAWED")
        except OSError as error:
            raise GuestError(f"the control group {self.folder} cannot be written: {error}") from error


def freezer_of(pid: int) -> Freezer:
    """The freezer of the control group that a process is in. GuestError where there is none."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError as error:
        raise GuestError(f"process {pid} is gone: {error}") from error
    unified = ""
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if "freezer" in controllers.split(","):
            return Freezer(_mounted(mounts, "cgroup", "freezer") / path.lstrip("/"), False)
        if not controllers:
            unified = path
    if unified:
        return Freezer(_mounted(mounts, "cgroup2", "") / unified.lstrip("/"), True)
    raise GuestError("this host has no control groups that can freeze processes")


def _mounted(mounts: list[str], kind: str, option: str) -> Path:
    """Where a hierarchy is mounted whole."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if more[0] == kind and fields[3] == "/" and (not option or option in more[2].split(",")):
            return Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))
    raise GuestError(f"this host has no {kind} hierarchy mounted{f' with {option}' if option else ''}")
