"""The target's end of the memory stream, without any I/O: wire batches in (haulier.memory.proxy), QEMU's stream out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from haulier.compress import StreamDecompressor, xz
from haulier.compress.stream import MAX_WINDOW_LOG
from haulier.errors import Corrupt, HaulierError, Unsupported
from haulier.memory.base import MemoryBase
from haulier.memory.elsewhere import BasePages
from haulier.memory.loading import GuestRam
from haulier.memory.mirror import Mirror
from haulier.memory.mirrorfile import decode_table
from haulier.memory.pages import BlockReader, Decoded, PageDecoder
from haulier.memory.proxy import AHEAD, FRESH, HEAD, OPAQUE, PACKED, PAGES, TABLE, UNREAD, early_mirror, mirror_of
from haulier.memory.stream import Buffer

MAX_RAW: Final = 1 << 20
"""Raw bytes that a target accepts in a batch."""
_OVERHEAD: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """What a wire batch became, verified: `data` is for QEMU, and stands for `raw_bytes` bytes of its stream."""

    data: bytes
    raw_bytes: int
    gidx: NDArray[np.int64] = field(repr=False)
    """Pages in it, by their index in the mirror."""
    _load: Callable[[], None] | None = field(default=None, repr=False)

    def load(self) -> None:
        """Before QEMU gets the data, in the order of the pieces: what goes into its memory directly."""
        if self._load is not None:
            self._load()


class TargetProxy:
    """Wire batches back to the stream for the target's QEMU. Give it just the base and blocks the source's proxy has.

    After any error the session is over: nothing of the bad batch was given out or put in the mirror.
    """

    def __init__(
        self,
        mirror_path: Path,
        base: MemoryBase | None = None,
        reader: BlockReader | None = None,
        *,
        max_window_log: int = MAX_WINDOW_LOG,
        max_memory: int = 1 << 40,
        dictionary: bytes = b"",
        packs: bool = True,
    ) -> None:
        """`max_memory`: bytes of guest memory, all RAM blocks together, that the peer may announce. `dictionary`: as
        the peer's `PictureSource` has it, for its first frame. `packs`: as of Mirror.create."""
        self.raw_bytes = 0
        self.wire_bytes = 0
        self.mirror: Mirror | None = None
        self.ram: GuestRam | None = None
        """QEMU's memory, if pages are to go there directly; may be set until the first batch comes."""
        self._mirror_path = mirror_path
        self._packs = packs
        self._base = base
        self.reader = reader
        """May be set until the first batch comes."""
        self._max_memory = max_memory
        self._max_window_log = max_window_log
        self._decompressor = StreamDecompressor(max_window_log, dictionary)
        self._unpacker: xz.Unpacker | None = None
        self._early: Mirror | None = None
        self._decoder: PageDecoder | None = None
        self._sequence = 0
        self._digest = blake3()
        self._failed = False

    def prepare(self) -> None:
        """Make the mirror that the peer's stream most probably asks for, if there is a base: it takes a moment."""
        self._early = early_mirror(self._mirror_path, self._base)

    def feed(self, wire_batch: Buffer) -> list[bytes]:
        """`take` and `load` in one; the bytes for QEMU."""
        piece = self.take(wire_batch)
        if piece is None:
            return []
        piece.load()
        return [piece.data] if piece.data else []

    def take(self, wire_batch: Buffer) -> Piece | None:
        """What is in a wire batch; None if there is nothing for the guest in it.

        Corrupt if the batch is out of order, malformed, or rebuilds to other bytes; Unsupported for an unread one when
        pages were loaded directly before.
        """
        if self._failed:
            raise Corrupt("this memory stream failed before; end the session and start again")
        try:
            return self._take(bytes(wire_batch))
        except HaulierError:
            self._failed = True
            raise

    @property
    def batches(self) -> int:
        """How many have come so far."""
        return self._sequence

    def digest(self) -> bytes:
        """BLAKE3 of all bytes given out."""
        return self._digest.digest()

    def watch(self) -> NDArray[np.bool_]:
        """From now on pages that change are set in this, one a page of the mirror. The table must have come."""
        if self._decoder is None or self.mirror is None:
            raise Corrupt("pages are to be watched, but no table of RAM blocks came before")
        if self._decoder.touched is None:
            self._decoder.touched = np.zeros(self.mirror.pages, np.bool_)
        return self._decoder.touched

    def keep(self) -> None:
        """Make the mirror's file a picture of its own, for the way back. NoRoom if there is no room for it."""
        if self.mirror is not None:
            self.mirror.complete()

    def close(self) -> None:
        """Let go of the mirror's file, which stays."""
        for held in (self.mirror, self._early, self.ram):
            if held is not None:
                held.close()

    def _take(self, data: bytes) -> Piece | None:
        if len(data) < HEAD.size:
            raise Corrupt(f"a batch of {len(data)} bytes is shorter than its header")
        kind, sequence, raw_length, plain_length, checksum = HEAD.unpack_from(data)
        if sequence != self._sequence:
            raise Corrupt(f"batch {sequence} came where {self._sequence} was due")
        if raw_length > MAX_RAW or plain_length > 2 * raw_length + _OVERHEAD:
            raise Corrupt(f"batch {sequence} announces {raw_length} bytes in {plain_length}, which is too much")
        self._sequence = (sequence + 1) & 0xFFFFFFFF
        self.wire_bytes += len(data)
        contents = memoryview(data)[HEAD.size :]
        packed = bool(kind & PACKED)
        if kind & FRESH:
            self._decompressor = StreamDecompressor(self._max_window_log)
        kind &= ~(FRESH | PACKED)
        if kind == TABLE:
            self._begin(bytes(contents), raw_length, plain_length)
            return None
        if kind not in (OPAQUE, PAGES, AHEAD, UNREAD):
            raise Corrupt(f"batch {sequence} is of an unknown kind {kind}")
        plain = (self._unpack if packed else self._decompressor.decompress)(contents, plain_length)
        if len(plain) != plain_length:
            raise Corrupt(f"batch {sequence} holds {len(plain)} bytes, not the {plain_length} announced")
        if kind in (OPAQUE, UNREAD):
            if plain_length != raw_length or xxhash.xxh3_128_digest(plain) != checksum:
                raise Corrupt(f"batch {sequence} does not match its checksum")
            if kind == UNREAD and self._decoder is not None and self._decoder.beside is not None:
                raise Unsupported("QEMU's stream went on with what haulier cannot read: send memory through QEMU alone")
            return self._given(plain)
        if self._decoder is None:
            raise Corrupt(f"batch {sequence} holds pages, but no table of RAM blocks came before")
        batch = self._decoder.decode(plain, raw_length)
        if xxhash.xxh3_128_digest(batch.raw) != checksum:
            raise Corrupt(f"batch {sequence} rebuilds to other bytes; do both sites hold the same base?")
        self._decoder.apply(batch)
        if kind == AHEAD:
            return Piece(b"", 0, batch.gidx[:0], self._beside(batch, ahead=True)) if self._decoder.beside else None
        self._hash(batch.raw)
        return Piece(batch.rest, raw_length, batch.gidx, self._beside(batch, ahead=False))

    def _unpack(self, contents: Buffer, most: int) -> bytes:
        if self._unpacker is None:
            self._unpacker = xz.Unpacker()
        return self._unpacker.unpack(contents, most)

    def _given(self, raw: bytes) -> Piece | None:
        self._hash(raw)
        return Piece(raw, len(raw), np.zeros(0, np.int64)) if raw else None

    def _hash(self, raw: bytes) -> None:
        self._digest.update(raw)
        self.raw_bytes += len(raw)

    def _beside(self, batch: Decoded, *, ahead: bool) -> Callable[[], None] | None:
        """What is to be done with QEMU's memory for this batch."""
        assert self._decoder is not None and self.mirror is not None
        if self._decoder.beside is None or self.ram is None:
            return None
        act = self.ram.overtake if ahead else self.ram.load
        return functools.partial(act, batch, self.mirror.first[self._decoder.beside])

    def _begin(self, table: bytes, raw_length: int, plain_length: int) -> None:
        if self._decoder is not None or raw_length or plain_length != len(table):
            raise Corrupt("a table of RAM blocks came twice or with other lengths than announced")
        blocks = decode_table(table)
        total = sum(blocks.values())
        if not blocks or total > self._max_memory:
            raise Corrupt(
                f"the peer announces {len(blocks)} RAM blocks of {total} bytes, beyond what this guest may have"
            )
        self.mirror = mirror_of(blocks, self._early, self._mirror_path, self._base, packs=self._packs)
        self._decoder = PageDecoder(self.mirror, self.reader, BasePages(self._base) if self._base is not None else None)
        if self.ram is not None and blocks.get(self.ram.block) == self.ram.bytes:
            self._decoder.beside = self.ram.block
