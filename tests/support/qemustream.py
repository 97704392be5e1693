"""Writes QEMU migration streams for tests, record by record and independently of the parser under test."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
EOS = struct.pack(">Q", 0x10)


def page_of(value: int) -> bytes:
    """A page that a small number stands for: 0 is the zero page, others are all different."""
    if not value:
        return bytes(PAGE)
    return b"".join(struct.pack("<II", value, word * value & 0xFFFFFFFF) for word in range(PAGE // 8))


def changed(page: bytes, *words: int) -> bytes:
    """The page with these 8-byte words inverted."""
    out = bytearray(page)
    for word in words:
        for at in range(word * 8, word * 8 + 8):
            out[at] ^= 0xFF
    return bytes(out)


@dataclass
class Writer:
    """The stream so far is `data`; `memory` is what a target would hold, by (block, page)."""

    blocks: dict[str, int] = field(default_factory=lambda: {"ram0": 64 * PAGE, "rom": 4 * PAGE})
    section: int = 3
    machine: str = "pc-q35-10.0"
    capabilities: tuple[str, ...] = ()
    footers: bool = True

    def __post_init__(self) -> None:
        self.parts: list[bytes] = []
        self.memory: dict[tuple[str, int], bytes] = {}
        self._block: str | None = None

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)

    def raw(self, data: bytes) -> Writer:
        self.parts.append(data)
        return self

    def magic(self) -> Writer:
        return self.raw(struct.pack(">II", 0x5145564D, 3))

    def configuration(self) -> Writer:
        name = self.machine.encode()
        self.raw(b"\x07" + struct.pack(">I", len(name)) + name)
        if self.capabilities:
            named = b"configuration/capabilities"
            listed = b"".join(bytes([len(one)]) + one.encode() for one in self.capabilities)
            self.raw(b"\x05" + bytes([len(named)]) + named + struct.pack(">II", 1, len(self.capabilities)) + listed)
        return self

    def command(self, number: int, data: bytes = b"") -> Writer:
        return self.raw(b"\x08" + struct.pack(">HH", number, len(data)) + data)

    def start(self, name: str = "ram", version: int = 4) -> Writer:
        encoded = name.encode()
        head = b"\x01" + struct.pack(">IB", self.section, len(encoded)) + encoded
        return self.raw(head + struct.pack(">II", 0, version))

    def sizes(self) -> Writer:
        self.raw(struct.pack(">Q", sum(self.blocks.values()) | 0x04))
        for name, length in self.blocks.items():
            self.raw(bytes([len(name)]) + name.encode() + struct.pack(">Q", length))
        return self

    def part(self, end: bool = False) -> Writer:
        return self.raw((b"\x03" if end else b"\x02") + struct.pack(">I", self.section))

    def eos(self) -> Writer:
        self.raw(EOS)
        return self.raw(b"\x7e" + struct.pack(">I", self.section)) if self.footers else self

    def page(self, block: str, page: int, data: bytes, *, named: bool | None = None) -> Writer:
        """A record of this page; a zero page as a zero record. Named as QEMU does, when the block changes."""
        self.memory[block, page] = data
        zero = not any(data)
        named = block != self._block if named is None else named
        self._block = block
        self.raw(struct.pack(">Q", page * PAGE | (0x02 if zero else 0x08) | (0 if named else 0x20)))
        if named:
            self.raw(bytes([len(block)]) + block.encode())
        return self.raw(b"\0" if zero else data)

    def begin(self) -> Writer:
        """Everything before the first page."""
        return self.magic().configuration().start().sizes().eos()

    def device(self, data: bytes = b"device state " * 40) -> Writer:
        return self.raw(b"\x04" + struct.pack(">IB", 9, 5) + b"timer" + data)


def small() -> Writer:
    """A complete small migration: two rounds, the last pages, device state."""
    writer = Writer().begin().part()
    for page in range(6):
        writer.page("ram0", page, page_of(page % 3))
    writer.page("rom", 1, page_of(7)).page("ram0", 40, page_of(0)).eos()
    writer.part().page("ram0", 1, changed(page_of(1), 5)).page("ram0", 2, page_of(0)).eos()
    writer.command(11).part(end=True).page("ram0", 1, page_of(9)).eos()
    return writer.device()


def mapped_ram(
    path: Path,
    blocks: dict[str, dict[int, bytes]],
    sizes: dict[str, int],
    stale: dict[str, dict[int, bytes]] | None = None,
) -> None:
    """A mapped-ram file as QEMU writes it; `stale` pages have data in the file but no bit in the bitmap."""
    out = Writer(blocks=sizes, capabilities=("mapped-ram",)).magic().configuration().start().data
    out += struct.pack(">Q", sum(sizes.values()) | 0x04)
    with path.open("wb") as file:
        file.write(out)
        for name, length in sizes.items():
            here = file.tell()
            bitmap = here + 1 + len(name) + 8 + 28
            pages = -(-(bitmap + length // PAGE // 8 + 1) // (1 << 20)) * (1 << 20)
            file.write(bytes([len(name)]) + name.encode() + struct.pack(">QIQQQ", length, 1, PAGE, bitmap, pages))
            bits = bytearray(-(-(length // PAGE) // 64) * 8)
            for page in blocks.get(name, {}):
                bits[page // 8] |= 1 << page % 8
            file.write(bits)
            for page, data in {**(stale or {}).get(name, {}), **blocks.get(name, {})}.items():
                file.seek(pages + page * PAGE)
                file.write(data)
            file.seek(pages + length)
        file.write(EOS + b"device state")
