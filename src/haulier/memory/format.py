"""Numbers of QEMU's migration stream (version 3), as written by QEMU 8.2 to 10.x; all integers are big-endian.

stream      "QEVM" be32 3, configuration, then sections until the end
configuration  07 be32 length, machine name; then optional subsections 05 len idstr be32 version, contents
START       01 be32 id, len name, be32 instance, be32 version; records; EOS; footer
PART, END   02 or 03, be32 id; records; EOS; footer
footer      7e be32 id
FULL        04 ... one device, of unknown length
COMMAND     08 be16 command, be16 length, data
record      be64 address | flags; len idstr unless CONTINUE; then by flag: PAGE 4096 bytes, ZERO one byte (0)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final

from haulier.errors import Corrupt, Unsupported

MAGIC: Final = 0x5145564D
VERSION: Final = 3

EOF: Final = 0x00
START: Final = 0x01
PART: Final = 0x02
END: Final = 0x03
FULL: Final = 0x04
SUBSECTION: Final = 0x05
VMDESC: Final = 0x06
CONFIGURATION: Final = 0x07
COMMAND: Final = 0x08
FOOTER: Final = 0x7E

ZERO: Final = 0x02
MEM_SIZE: Final = 0x04
PAGE_DATA: Final = 0x08
EOS: Final = 0x10
CONTINUE: Final = 0x20
XBZRLE: Final = 0x40
HOOK: Final = 0x80
COMPRESSED: Final = 0x100
MULTIFD_FLUSH: Final = 0x200
FLAGS: Final = 0xFFF

RECORD: Final = 8 + 4096
"""Length of a page record that continues its block."""
ZERO_RECORD: Final = 8 + 1

OPEN_RETURN_PATH: Final = 1
PING: Final = 2
POSTCOPY_ADVISE: Final = 3
POSTCOPY_LISTEN: Final = 4
POSTCOPY_RUN: Final = 5
POSTCOPY_DISCARD: Final = 6
PACKAGED: Final = 7
POSTCOPY_RESUME: Final = 9
RECV_BITMAP: Final = 10
SWITCHOVER_START: Final = 11

RAM_VERSION: Final = 4
MAX_BLOCKS: Final = 4096
MAX_MEMORY: Final = 1 << 44
MAX_MACHINE_NAME: Final = 256
MAX_CAPABILITIES: Final = 64
MAX_PACKAGE: Final = 1 << 30
"""QEMU's own bound for the package of device state."""

Read = Callable[[int, int], bytes]
"""read(n, at) gives exactly the n bytes at offset `at`, or raises."""


def name_of(data: bytes, what: str) -> str:
    """An idstr or machine name as text; Corrupt unless it is printable ASCII."""
    if not data or not data.isascii() or not (text := data.decode()).isprintable():
        raise Corrupt(f"QEMU's stream names a {what} {data[:40]!r}, which is no name; is this a migration stream?")
    return text


def configuration(read: Read) -> tuple[str, int]:
    """The machine's name, and the length of the configuration section's first part, type byte included."""
    (length,) = struct.unpack(">I", read(4, 1))
    if not 0 < length <= MAX_MACHINE_NAME:
        raise Corrupt(f"QEMU's stream has a machine name of {length} bytes; is this a migration stream?")
    return name_of(read(length, 5), "machine"), 5 + length


def subsection(read: Read) -> tuple[str, list[str], int]:
    """Name, capabilities and length of the configuration's subsection at 0; Unsupported if it is not a known one."""
    (size,) = read(1, 1)
    name = name_of(read(size, 2), "subsection")
    at = 2 + size + 4
    capabilities: list[str] = []
    if name.endswith("target-page-bits"):
        (bits,) = struct.unpack(">I", read(4, at))
        if bits != 12:
            raise Unsupported(f"the guest's pages are 1 << {bits} bytes; only pages of 4096 bytes can be handed over")
        at += 4
    elif name.endswith("capabilities"):
        (count,) = struct.unpack(">I", read(4, at))
        if count > MAX_CAPABILITIES:
            raise Corrupt(f"QEMU's stream lists {count} migration capabilities; is this a migration stream?")
        at += 4
        for _ in range(count):
            (size,) = read(1, at)
            capabilities.append(name_of(read(size, at + 1), "capability"))
            at += 1 + size
    elif name.endswith("uuid"):
        read(16, at)
        at += 16
    else:
        raise Unsupported(f"QEMU's stream has an unknown configuration {name!r}; use a QEMU of 8.2 to 10.x")
    return name, capabilities, at


def check_block(name: str, length: int, count: int, total: int) -> None:
    """Refuse a RAM block that cannot be: `count` and `total` (bytes) include it."""
    if length <= 0 or length % 4096:
        raise Corrupt(f"RAM block {name!r} has a length of {length} bytes, not a multiple of 4096")
    if count > MAX_BLOCKS or total > MAX_MEMORY:
        raise Corrupt(f"RAM block {name!r} makes {count} blocks and {total} bytes of memory, which is too much")


_COMMAND_LENGTHS: Final = {
    OPEN_RETURN_PATH: (0,),
    PING: (4,),
    POSTCOPY_ADVISE: (0, 16),
    POSTCOPY_LISTEN: (0,),
    POSTCOPY_RUN: (0,),
    PACKAGED: (4,),
    POSTCOPY_RESUME: (0,),
    SWITCHOVER_START: (0,),
}


def check_command(command: int, data: bytes, blocks: Mapping[str, int], where: str) -> None:
    """Corrupt if a command that we know has another form than QEMU gives it, or is about RAM that there is not."""
    if command == POSTCOPY_DISCARD:
        _check_discard(data, blocks, where)
    elif command == RECV_BITMAP:
        if len(data) < 2 or len(data) != 1 + data[0] or name_of(data[1:], "RAM block") not in blocks:
            raise Corrupt(f"a command asks what arrived of a RAM block that is not in the table, {where}")
    elif command in _COMMAND_LENGTHS and len(data) not in _COMMAND_LENGTHS[command]:
        raise Corrupt(f"command {command} of {len(data)} bytes, which cannot be, {where}")


def _check_discard(data: bytes, blocks: Mapping[str, int], where: str) -> None:
    """version 0, len idstr, 0; then pairs of be64 start, be64 length: what of the block the target has to drop."""
    size = data[1] if len(data) > 1 else 0
    if len(data) < 3 + size or data[0] or data[2 + size] or (len(data) - 3 - size) % 16:
        raise Corrupt(f"a command to drop pages has a form that no QEMU gives it, {where}")
    name = name_of(data[2 : 2 + size], "RAM block")
    for start, length in struct.iter_unpack(">QQ", data[3 + size :]):
        if start % 4096 or length % 4096 or start + length > blocks.get(name, 0):
            raise Corrupt(
                f"a command drops {length} bytes at {start:#x} of RAM block {name!r}, which has no such, {where}"
            )
