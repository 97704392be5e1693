"""The source's end of the memory stream, without any I/O: raw stream in, wire batches out.

A wire batch is

    u8 kind, u32 sequence number, u32 raw length, u32 plain length, 16 bytes xxh3-128 of the raw bytes, contents

little-endian. Kinds: OPAQUE (the raw bytes, compressed), TABLE (the RAM blocks; stands for no bytes of the stream),
PAGES (columns, compressed), AHEAD (the same; for the mirrors only, never for QEMU), UNREAD (as OPAQUE, but there may be
pages in it). FRESH added to a kind: the contents begin a new zstd frame; PACKED: they go on with the stream of xz, and
zstd's frame knows nothing of them. The target checks sequence number, lengths and checksum before it gives out any
byte. An unknown stream is carried as UNREAD batches, with a warning.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from haulier.compress import StreamCompressor, xz
from haulier.compress.stream import DEFAULT_WINDOW_LOG, window
from haulier.errors import Corrupt, HaulierError, UsageError
from haulier.memory.base import MemoryBase
from haulier.memory.elsewhere import BasePages
from haulier.memory.mirror import Mirror
from haulier.memory.mirrorfile import encode_table
from haulier.memory.pages import BlockFinder, PageEncoder
from haulier.memory.stream import TOKEN, Buffer, Pages, Raw, StreamParser, Token, Zeros, rebuild_all
from haulier.units import PAGE

OPAQUE: Final = 1
TABLE: Final = 2
PAGES: Final = 3
AHEAD: Final = 4
UNREAD: Final = 5
FRESH: Final = 0x80
PACKED: Final = 0x40

BATCH: Final = 512 << 10
"""Raw bytes in a batch at most, unless a single token is larger (it never is)."""
AHEAD_PAGES: Final = 64
"""Pages in a batch that is sent ahead of the stream."""
LEAST_PACKED: Final = 16 << 10
"""Bytes below which a batch goes through zstd, which knows what went before, whatever the level is."""
LEAST_TRIED: Final = 64 << 10
"""Bytes of a batch with which other levels may be tried."""
HEAD: Final = struct.Struct("<BIII16s")


@dataclass(frozen=True, slots=True)
class WireBatch:
    """`data` goes to the peer; it stands for `raw_bytes` bytes of QEMU's stream (0 for a table)."""

    data: bytes
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class Broken:
    """What a stream of post-copy that goes on does not say again: RAM blocks (idstr to bytes), section ids of RAM."""

    blocks: dict[str, int]
    ids: tuple[int, ...]


@dataclass(slots=True)
class Counters:
    """What went through. By kind of page ("zero", "same", "block", "base", "xor", "series", "literal"), "raw" for the
    rest of the stream: records in `pages`, bytes of the stream in `raw`, and in `wire` an estimate of compressed
    bytes: each batch's bytes shared out by what the columns held ("meta" for addresses and kinds).
    """

    pages: dict[str, int] = field(default_factory=dict)
    raw: dict[str, int] = field(default_factory=dict)
    wire: dict[str, float] = field(default_factory=dict)
    raw_bytes: int = 0
    wire_bytes: int = 0
    batches: int = 0
    plain_bytes: int = 0
    """What went into zstd, and ..."""
    compress_s: float = 0.0
    """... the CPU time that it took, by the clock that was given."""
    ahead: int = 0
    """Of `pages`, how many went ahead of the stream; their bytes are not in `raw`."""

    def as_dict(self) -> dict[str, object]:
        """For reports, as JSON."""
        return {
            "pages": dict(self.pages),
            "raw": dict(self.raw),
            "wire": {kind: round(size) for kind, size in self.wire.items()},
            "raw_bytes": self.raw_bytes,
            "wire_bytes": self.wire_bytes,
            "batches": self.batches,
            "ahead": self.ahead,
        }


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for kind, count in more.items():
        if count:
            total[kind] = total.get(kind, 0) + count


def early_mirror(path: Path | None, base: MemoryBase | None) -> Mirror | None:
    """The mirror that a stream most probably asks for, before it has named the guest's memory."""
    return None if base is None else Mirror.create(path, base.blocks, base)


def mirror_of(
    blocks: dict[str, int], early: Mirror | None, path: Path | None, base: MemoryBase | None, *, packs: bool = True
) -> Mirror:
    """The mirror of these blocks: the one that was made early if it is of the same ones in the same order."""
    if early is not None and list(early.blocks.items()) == list(blocks.items()):
        return early
    return Mirror.create(path, blocks, base, packs=packs)


class SourceProxy:
    """QEMU's outgoing stream to wire batches.

    feed() gives the batches that became full; call flush() when QEMU pauses for a few milliseconds, so that nothing
    lingers, and finish() at its end. The mirror's file is created when the stream names the guest's memory.
    """

    def __init__(
        self,
        mirror_path: Path | None,
        base: MemoryBase | None = None,
        finder: BlockFinder | None = None,
        level: int = 3,
        window_log: int = DEFAULT_WINDOW_LOG,
        *,
        elsewhere: bool = False,
        batch_bytes: int = BATCH,
        long: bool | None = None,
        clock: Callable[[], float] = lambda: 0.0,
        broken: Broken | None = None,
        recent: bool = False,
    ) -> None:
        """`elsewhere`: also look for pages anywhere in the base; pays only if the base is of another boot.

        `long`: let zstd look back over the whole window; by default as `compress.stream.window` has it.
        `broken`: the stream is one of post-copy that goes on; both mirrors begin anew. `recent`: keep what the last two
        batches held.
        Memory: the mirror's file, 1 << window_log bytes, and a few megabytes.
        """
        if not PAGE <= batch_bytes <= BATCH:
            raise UsageError(f"a batch of {batch_bytes} bytes is outside {PAGE} to {BATCH}")
        self.parser = StreamParser(
            min(batch_bytes, TOKEN),
            blocks=broken.blocks if broken is not None else None,
            ids=broken.ids if broken is not None else (),
        )
        self.counters = Counters()
        self.warnings: list[str] = []
        self.mirror: Mirror | None = None
        self.opaque = False
        self._mirror_path = mirror_path
        self._base = base
        self.finder = finder
        self._elsewhere = elsewhere
        self._batch_bytes = batch_bytes
        self._clock = clock
        self._window_log, self._long = window_log, long
        self.recent: deque[bytes] = deque(maxlen=2 if recent else 0)
        """What the last two batches of some size held, for trials of other levels with it."""
        self.level = level
        """Of zstd, or from `xz.FIRST_LEVEL` on of xz."""
        self._zstd_level = level
        self._packed = False
        self._packer: xz.Packer | None = None
        """From the first batch on that xz packs."""
        self._compressor = self._new_compressor()
        self._fresh = False
        self._early: Mirror | None = None
        self._encoder: PageEncoder | None = None
        self._named: dict[str, int] = {}
        self._sequence = 0
        self._count = False
        self._digest = blake3()
        self._tokens: list[Token] = []
        self._token_bytes = 0
        self._input: deque[memoryview] = deque()

    def _new_compressor(self) -> StreamCompressor:
        level = 1 if xz.is_xz(self._zstd_level) else self._zstd_level
        return StreamCompressor(level, *window(level, self._window_log, self._long))

    def set_level(self, level: int) -> None:
        """From the next batch on. Another one of zstd's begins a new frame, which knows nothing of what went before."""
        self.level = level
        if not xz.is_xz(level) and level != self._zstd_level:
            self._zstd_level = level
            self._compressor = self._new_compressor()
            self._fresh = self.counters.batches > 0

    def _compress(self, *parts: Buffer) -> bytes:
        began = self._clock()
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(map(len, views))
        self._packed = xz.is_xz(self.level) and size >= LEAST_PACKED
        data = self._pack(*parts) if self._packed else self._compressor.compress(*parts)
        self.counters.compress_s += self._clock() - began
        self.counters.plain_bytes += size
        if self.recent.maxlen and size >= LEAST_TRIED:
            self.recent.append(b"".join(views))
        return data

    def _pack(self, *parts: Buffer) -> bytes:
        if self._packer is None:
            self._packer = xz.Packer(self.level)
        elif self._packer.level != self.level:
            self._packer.set_level(self.level)
        return self._packer.pack(*parts)

    def prepare(self) -> Mirror | None:
        """The mirror that the stream most probably asks for, made before there is a stream; None without a base."""
        self._early = early_mirror(self._mirror_path, self._base)
        return self._early

    def count(self) -> None:
        """From now on it is counted how often each page is sent (`often`): a byte a page."""
        self._count = True
        if self._encoder is not None and self.mirror is not None and self._encoder.counted is None:
            self._encoder.counted = np.zeros(self.mirror.pages, np.uint8)

    def often(self, block: str, least: int = 3) -> NDArray[np.int64]:
        """Pages of that block that were sent so often, by their numbers in the block, the most often sent first."""
        counted = self._encoder.counted if self._encoder is not None else None
        if counted is None or self.mirror is None or block not in self.mirror.first:
            return np.zeros(0, np.int64)
        first = self.mirror.first[block]
        mine = counted[first : first + self.mirror.blocks[block] // PAGE]
        found = np.flatnonzero(mine >= least)
        order: NDArray[np.int64] = found[np.argsort(-mine[found].astype(np.int64), kind="stable")]
        return order

    @property
    def device_state(self) -> bool:
        """Device state has begun: the guest is stopped."""
        return self.parser.device_state

    @property
    def first_pass_share(self) -> float:
        """How much of the guest's memory the stream has come to, 0 to 1: in its first pass each page comes once."""
        if self.mirror is None:
            return 0.0
        return min(1.0, (sum(self.counters.pages.values()) - self.counters.ahead) / self.mirror.pages)

    @property
    def unsent(self) -> int:
        """Bytes fed that are in no batch yet."""
        return self._token_bytes + (0 if self.opaque else len(self.parser.pending))

    def feed(self, raw: Buffer) -> list[WireBatch]:
        """Batches that are full with these bytes of QEMU's stream. Never raises for what the stream holds."""
        data = bytes(raw)
        if not data:
            return []
        self._digest.update(data)
        self._input.append(memoryview(data))
        self.counters.raw_bytes += len(data)
        out: list[WireBatch] = []
        known = not self.opaque
        tokens = self._parse(data)
        if known and self.opaque:
            out += self.flush()
        for token in tokens:
            size = token.size
            if self._token_bytes + size > self._batch_bytes:
                out += self.flush()
            self._tokens.append(token)
            self._token_bytes += size
        if self._token_bytes >= self._batch_bytes:
            out += self.flush()
        return out

    def flush(self) -> list[WireBatch]:
        """All complete records so far as batches. Up to 4.1 KB of an incomplete one stay until the rest comes."""
        if not self._token_bytes:
            self._tokens.clear()
            return []
        out: list[WireBatch] = []
        tokens, size = self._tokens, self._token_bytes
        self._tokens, self._token_bytes = [], 0
        paged = any(isinstance(token, Pages | Zeros) for token in tokens)
        if self._encoder is None and self.parser.ready and (paged or not self.opaque):
            out.append(self._begin())
        checksum = self._checksum(size)
        if self._encoder is None or not paged:
            plain = b"".join(token.data for token in tokens if isinstance(token, Raw))
            data = self._compress(plain)
            out.append(self._batch(UNREAD if self.opaque else OPAQUE, size, len(plain), checksum, data))
            _add(self.counters.raw, {"raw": len(plain)})
            self._count_wire(len(out[-1].data), {"raw": len(plain)})
            return out
        batch = self._encoder.encode(tokens)
        out.append(self._batch(PAGES, size, batch.size, checksum, self._compress(*batch.parts)))
        _add(self.counters.pages, batch.pages)
        _add(self.counters.raw, batch.raw)
        self._count_wire(len(out[-1].data), batch.columns)
        return out

    def name(self, blocks: dict[str, int]) -> list[WireBatch]:
        """Begins without a stream: pages of these RAM blocks (idstr to bytes) will all come by `ahead`."""
        if self._encoder is not None or self.counters.raw_bytes:
            raise UsageError("the stream has named the guest's memory already")
        self._named = dict(blocks)
        return [self._begin()]

    def ahead(self, block: str, numbers: NDArray[np.int64], pages: NDArray[np.uint8]) -> list[WireBatch]:
        """Batches that bring these pages, by their numbers in the block, into both mirrors and not into the stream.

        Nothing before the stream has named the guest's memory, or once it is opaque. Call flush() before: the mirrors
        change in the order of the batches. UsageError if there are unflushed records.
        """
        if self._token_bytes:
            raise UsageError("flush the source proxy before you send pages ahead")
        known = self._named or (self.parser.blocks if self.parser.ready else {})
        if self.opaque or block not in known:
            return []
        out = [] if self._encoder is not None else [self._begin()]
        assert self._encoder is not None
        for at in range(0, len(numbers), AHEAD_PAGES):
            addresses = numbers[at : at + AHEAD_PAGES].astype(np.uint64) * np.uint64(PAGE)
            token = Pages(block, True, addresses, pages[at : at + AHEAD_PAGES])
            raw = rebuild_all([token])
            batch = self._encoder.encode([token])
            data = self._compress(*batch.parts)
            out.append(self._batch(AHEAD, len(raw), batch.size, xxhash.xxh3_128_digest(raw), data))
            self.counters.ahead += len(addresses)
            _add(self.counters.pages, batch.pages)
            self._count_wire(len(out[-1].data), batch.columns)
        return out

    def finish(self) -> bytes:
        """BLAKE3 of the whole raw stream, after the last flush(). Corrupt if the stream ended within a record."""
        if self._token_bytes:
            raise UsageError("flush the source proxy before you finish it")
        if self.unsent:
            raise Corrupt(f"QEMU's stream ended {self.unsent} bytes into a record; the guest runs on at the source")
        return self._digest.digest()

    def keep(self) -> None:
        """Make the mirror's file a picture of its own, for the way back. NoRoom if there is no room for it."""
        if self.mirror is not None:
            self.mirror.complete()

    def close(self) -> None:
        """Let go of the mirror's file, which stays."""
        for mirror in (self.mirror, self._early):
            if mirror is not None:
                mirror.close()

    def _parse(self, data: bytes) -> list[Token]:
        if self.opaque:
            return self._raw_tokens(data)
        try:
            return self.parser.feed(data)
        except HaulierError as error:
            # The parser has kept every byte that it gave no token for, this feed's included.
            self.opaque = True
            self.warnings.append(f"memory goes compressed only: {error}")
            return self._raw_tokens(self.parser.pending)

    def _raw_tokens(self, data: bytes) -> list[Token]:
        return [Raw(data[at : at + self._batch_bytes]) for at in range(0, len(data), self._batch_bytes)]

    def _begin(self) -> WireBatch:
        blocks = self._named or self.parser.blocks
        self.mirror = mirror_of(blocks, self._early, self._mirror_path, self._base)
        elsewhere = BasePages(self._base) if self._elsewhere and self._base is not None else None
        self._encoder = PageEncoder(self.mirror, self.finder, elsewhere)
        if self._count:
            self.count()
        table = encode_table(blocks)
        batch = self._batch(TABLE, 0, len(table), bytes(16), table)
        self._count_wire(len(batch.data), {"meta": len(table)})
        return batch

    def _batch(self, kind: int, raw: int, plain: int, checksum: bytes, data: bytes) -> WireBatch:
        how = 0
        if kind != TABLE and self._packed:
            how = PACKED
        elif kind != TABLE and self._fresh:
            how, self._fresh = FRESH, False
        head = HEAD.pack(kind | how, self._sequence, raw, plain, checksum)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self.counters.batches += 1
        return WireBatch(head + data, 0 if kind == AHEAD else raw)

    def _checksum(self, size: int) -> bytes:
        """xxh3-128 of the next `size` bytes of the stream as QEMU gave it, not as the parser understood it."""
        hasher = xxhash.xxh3_128()
        while size:
            piece = self._input.popleft()
            if len(piece) > size:
                self._input.appendleft(piece[size:])
                piece = piece[:size]
            hasher.update(piece)
            size -= len(piece)
        return hasher.digest()

    def _count_wire(self, wire: int, columns: dict[str, int]) -> None:
        self.counters.wire_bytes += wire
        total = sum(columns.values())
        for kind, size in columns.items():
            if size:
                self.counters.wire[kind] = self.counters.wire.get(kind, 0.0) + wire * size / total
