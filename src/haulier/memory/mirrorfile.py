"""The header of the file that holds a mirror: which blocks of memory follow it, in which order.

    8 bytes  "HAULMIRR"
    be32     version (1)
    be32     length of the table
    table    for each block: u8 length of idstr, idstr, be64 length in bytes
    8 bytes  xxh3-64 of all before it

Pages follow at the next multiple of 64 KiB, block after block. While a mirror is in use the magic is "HAULPART": the
file then holds only what differs from the picture that it began with, and is no picture of its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from haulier.errors import Corrupt
from haulier.memory import format as q
from haulier.units import CHUNK, PAGE

MAGIC: Final = b"HAULMIRR"
PART: Final = b"HAULPART"
VERSION: Final = 1
_MAX_TABLE: Final = q.MAX_BLOCKS * 264


@dataclass(frozen=True, slots=True)
class MirrorHeader:
    """`blocks`: idstr -> length in bytes, in file order; `data_offset`: where the first page lies."""

    blocks: dict[str, int]
    data_offset: int

    @property
    def size(self) -> int:
        """Length of the whole file in bytes."""
        return self.data_offset + sum(self.blocks.values())


def encode_table(blocks: dict[str, int]) -> bytes:
    """The table of blocks, as in the header and in a table batch."""
    return b"".join(bytes([len(name)]) + name.encode() + struct.pack(">Q", length) for name, length in blocks.items())


def decode_table(data: bytes) -> dict[str, int]:
    """The table back; Corrupt if it is none."""
    blocks: dict[str, int] = {}
    at = total = 0
    while at < len(data):
        end = at + 1 + data[at] + 8
        if end > len(data):
            raise Corrupt("a table of RAM blocks is cut short")
        name = q.name_of(data[at + 1 : end - 8], "RAM block")
        (length,) = struct.unpack_from(">Q", data, end - 8)
        total += length
        q.check_block(name, length, len(blocks) + 1, total)
        if name in blocks:
            raise Corrupt(f"a table of RAM blocks names {name!r} twice")
        blocks[name] = length
        at = end
    return blocks


def encode_header(blocks: dict[str, int], magic: bytes = MAGIC) -> tuple[bytes, MirrorHeader]:
    """The header's bytes, and what they say."""
    table = encode_table(blocks)
    head = magic + struct.pack(">II", VERSION, len(table)) + table
    head += xxhash.xxh3_64_digest(head)
    return head, MirrorHeader(dict(blocks), -(-len(head) // CHUNK) * CHUNK)


def read_header(path: Path, magic: bytes = MAGIC) -> MirrorHeader:
    """The header of the file at `path`; Corrupt if it is not a mirror of that kind, or is cut short."""
    with path.open("rb") as file:
        head = file.read(16)
        if len(head) < 16 or not head.startswith(magic):
            raise Corrupt(f"{path} is not a mirror of guest memory; remove it")
        version, length = struct.unpack(">II", head[8:])
        if version != VERSION or length > _MAX_TABLE:
            raise Corrupt(f"{path} is a mirror in an unknown version {version}; remove it")
        table = file.read(length)
        if file.read(8) != xxhash.xxh3_64_digest(head + table):
            raise Corrupt(f"the header of {path} does not match its checksum; remove it")
        header = MirrorHeader(decode_table(table), -(-(24 + length) // CHUNK) * CHUNK)
        size = file.seek(0, 2)
        # Behind the pages of one that is in use there may be packed ones.
        if (size < header.size if magic == PART else size != header.size) or header.size % PAGE:
            raise Corrupt(f"{path} is not as long as its header says; remove it")
        return header
