"""A guest of 32 MiB with a program of 120 bytes that dirties memory, and just enough QMP to capture its migration."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_for

QEMU = shutil.which("qemu-system-x86_64")

# Assembled from (32-bit, started by multiboot):
#   fill 4..6 MiB with noise (a linear congruential generator), 6..8 MiB with the same words in each page; then, for
#   ever, count in two words of each page of 8..9 MiB, and every 65536 rounds write zeros over one more page of noise.
_CODE = bytes.fromhex(
    "fcbf00004000b87856341269c00d661900055ff36e3cab81ff0000600072ec89"
    "f889f825ff0f00000d00004141ab81ff0000800072eb31db43bf00008000891f"
    "899f0002000081c70010000081ff0000900072eaf7c3ffff000075dc89dfc1ef"
    "0481e700f01f0081c70000400031c0b900040000f3abebc0"
)
_LOAD = 0x100000


def kernel(path: Path) -> Path:
    """The program as a multiboot kernel."""
    flags = 0x10000
    end = _LOAD + 32 + len(_CODE)
    head = struct.pack("<8I", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF, _LOAD, _LOAD, end, end, _LOAD + 32)
    path.write_bytes(head + _CODE)
    return path


class TinyGuest:
    """A running QEMU. `ram` is its memory as a file."""

    def __init__(self, folder: Path, machine: str, *extra: str, incoming: bool = False, mib: int = 32) -> None:
        assert QEMU is not None
        folder.mkdir(exist_ok=True)
        self.ram = folder / "ram"
        self._socket = folder / "qmp"
        memory = f"memory-backend-file,id=ram0,size={mib}M,mem-path={self.ram},share=on"
        words = [
            QEMU,
            "-machine",
            f"{machine},memory-backend=ram0",
            "-accel",
            "tcg",
            "-m",
            f"{mib}M",
            "-object",
            memory,
        ]
        words += ["-nodefaults", "-display", "none", "-S", "-qmp", f"unix:{self._socket},server=on,wait=off", *extra]
        words += ["-incoming", "defer"] if incoming else ["-kernel", str(kernel(folder / "kernel"))]
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        wait_for(lambda: self._socket.exists() or self.process.poll() is not None, what="QEMU's socket")
        assert self.process.poll() is None, (folder / "log").read_text()
        self._qmp = socket.socket(socket.AF_UNIX)
        self._qmp.settimeout(60)
        self._qmp.connect(str(self._socket))
        self._lines = self._qmp.makefile("rb")
        self._lines.readline()
        self.execute("qmp_capabilities", enable=["oob"])

    def execute(self, command: str, **arguments: Any) -> Any:
        """One QMP command; arguments with - for _."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._qmp.sendall(json.dumps({"execute": command, "arguments": words}).encode())
        return self._answer()

    def execute_oob(self, command: str, **arguments: Any) -> Any:
        """As `execute`, past a QEMU that waits for something else."""
        self._qmp.sendall(json.dumps({"exec-oob": command, "arguments": arguments}).encode())
        return self._answer()

    def pass_fd(self, name: str, end: socket.socket) -> None:
        """Gives QEMU a descriptor of that name."""
        words = json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode()
        socket.send_fds(self._qmp, [words], [end.fileno()])
        self._answer()

    def _answer(self) -> Any:
        while True:
            answer = json.loads(self._lines.readline())
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, answer["error"]

    def capability(self, name: str, state: bool = True) -> None:
        self.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": state}])

    def migration(self) -> str:
        return str(self.execute("query-migrate").get("status"))

    def wait_migrated(self) -> None:
        assert wait_for(lambda: self.migration() in ("completed", "failed"), 90, "the migration") and (
            self.migration() == "completed"
        ), self.execute("query-migrate")

    def counted(self) -> int:
        """How often the program has gone round, as its memory says."""
        with self.ram.open("rb") as file:
            file.seek(0x800000)
            return int.from_bytes(file.read(4), "little")

    def close(self) -> None:
        self._lines.close()
        self._qmp.close()
        self.process.kill()
        self.process.wait()
        self._log.close()


@contextlib.contextmanager
def tiny_guest(folder: Path, machine: str, *extra: str, incoming: bool = False) -> Iterator[TinyGuest]:
    """A TinyGuest that is stopped and gone at the end."""
    guest = TinyGuest(folder, machine, *extra, incoming=incoming)
    try:
        yield guest
    finally:
        guest.close()
