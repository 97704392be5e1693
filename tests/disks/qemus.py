"""A QEMU without a guest, with the node graph of a guest's disk, for tests of its block layer."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from haulier.guests.qmp import Qmp
from tests.support.waiting import wait_for


class Disk:
    """Node disk0 of a stopped QEMU."""

    def __init__(self, qmp: Qmp, overlay: Path, size: int) -> None:
        self.qmp = qmp
        self.overlay = overlay
        self.size = size

    def io(self, command: str) -> None:
        """One qemu-io command on disk0, for instance "write -P 5 0 64k"."""
        said = self.qmp.execute("human-monitor-command", {"command-line": f'qemu-io disk0 "{command}"'})
        assert "rror" not in said, said

    def bitmaps(self) -> list[str]:
        nodes = self.qmp.execute("query-named-block-nodes", {"flat": True})
        return [b["name"] for n in nodes if n["node-name"] == "disk0" for b in n.get("dirty-bitmaps", [])]

    def exports(self) -> list[str]:
        return [e["id"] for e in self.qmp.execute("query-block-exports")]


@contextmanager
def qemu_with_disk(where: Path, base: dict[str, object], size: int) -> Iterator[Disk]:
    """A stopped QEMU with disk0 = an empty overlay on the node `base` (a blockdev without name)."""
    overlay, sock = where / "overlay.qcow2", where / "qmp"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", overlay, str(size)], check=True)
    disk0 = {
        "driver": "qcow2", "node-name": "disk0", "backing": "base0", "discard": "unmap", "detect-zeroes": "unmap",
        "file": {"driver": "file", "filename": str(overlay), "discard": "unmap"},
    }  # fmt: skip
    command = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "16"]
    command += ["-qmp", f"unix:{sock},server=on,wait=off"]
    for node in ({**base, "node-name": "base0", "read-only": True}, disk0):
        command += ["-blockdev", json.dumps(node)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        # The socket is there a moment before anybody listens on it.
        wait_for(lambda: _listens(sock) or process.poll() is not None)
        assert process.poll() is None
        qmp = Qmp(sock)
        try:
            yield Disk(qmp, overlay, size)
        finally:
            qmp.close()
    finally:
        process.kill()
        process.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
