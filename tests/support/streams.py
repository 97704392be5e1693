"""A small migration stream made by hand, as QEMU's of one RAM block would be."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from haulier.memory import format as qemu
from haulier.units import PAGE

MACHINE = b"pc-q35-8.2"


def begin(pages: int, block: bytes = b"ram0") -> bytes:
    """Header, configuration and the section that announces `pages` pages of RAM."""
    total = pages * PAGE
    return b"".join(
        (
            struct.pack(">II", qemu.MAGIC, qemu.VERSION),
            struct.pack(">BI", qemu.CONFIGURATION, len(MACHINE)) + MACHINE,
            struct.pack(">BIB", qemu.START, 2, 3) + b"ram" + struct.pack(">II", 0, qemu.RAM_VERSION),
            struct.pack(">Q", total | qemu.MEM_SIZE),
            bytes([len(block)]) + block + struct.pack(">Q", total),
            struct.pack(">QBI", qemu.EOS, qemu.FOOTER, 2),
        )
    )


def part(pages: Iterable[tuple[int, bytes]], block: bytes = b"ram0", kind: int = qemu.PART) -> bytes:
    """One section with pages (number, contents); contents b"" is a zero page."""
    out = [struct.pack(">BI", kind, 2)]
    flag = 0
    for number, contents in pages:
        what = qemu.PAGE_DATA if contents else qemu.ZERO
        out.append(struct.pack(">Q", number * PAGE | what | flag))
        if not flag:
            out.append(bytes([len(block)]) + block)
        out.append(contents or b"\0")
        flag = qemu.CONTINUE
    out.append(struct.pack(">QBI", qemu.EOS, qemu.FOOTER, 2))
    return b"".join(out)


def end(pages: Iterable[tuple[int, bytes]] = (), state: bytes = b"device state") -> bytes:
    """The last pages and some device's state."""
    return part(pages, kind=qemu.END) + bytes([qemu.FULL]) + state + bytes([qemu.EOF])
