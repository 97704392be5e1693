"""A batch of tokens as columns from which a peer with the same mirror rebuilds the exact bytes, and back.

Of each page the first kind that fits is sent:

    zero      a zero record of the stream: nothing but its address
    same      equal to the mirror at that address
    block     equal to a 4 KiB disk block that the target holds: its id
    base      equal to a page elsewhere in the base (only for a snapshot of another boot; off unless asked for)
    xor       under half of its 512 words differ from the mirror: a mask, and the words that differ, XORed
    series    numbers that run on smoothly (haulier.memory.series): their second differences, bytes apart
    literal   the page

All pages of a batch are encoded against the mirror as it was before the batch; then the batch is applied, and of
several records for one page the last one counts. At the source a hash never decides alone: finders compare bytes.
The columns are described byte by byte in docs/formats/page-batches.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from haulier.errors import Corrupt
from haulier.memory import series, varint
from haulier.memory.format import RECORD, ZERO_RECORD
from haulier.memory.mirror import Mirror
from haulier.memory.sparse import WORDS, runs
from haulier.memory.stream import Mark, Pages, Raw, Token, Zeros, rebuild_all
from haulier.units import PAGE

SAME: Final = 0
LITERAL: Final = 1
XOR: Final = 2
BLOCK: Final = 3
BASE: Final = 4
SERIES: Final = 5
KINDS: Final = ("same", "literal", "xor", "block", "base", "series")
"""Names of the kinds of page records, by the number in the kinds column."""
COLUMNS: Final = ("ops", "raw", "addresses", "kinds", "blocks", "bases", "masks", "words", "series", "literal")

_HEADER: Final = struct.Struct("<10I")
_OP_RAW: Final = 0
_OP_PAGES: Final = 1
_OP_ZEROS: Final = 2
_OP_BITS: Final = 3
_OP_FIRST: Final = 4
_XOR_BELOW: Final = WORDS // 2
_MASK: Final = WORDS // 8

Column = bytes | memoryview


class BlockFinder(Protocol):
    """The source's way from a page to a disk block that the target holds."""

    def find(self, pages: NDArray[np.uint8]) -> NDArray[np.int64]:
        """For pages, u8 (n, 4096) contiguous: ids (n) of blocks with just these bytes (compared), -1 for none."""


class BlockReader(Protocol):
    """The target's way from a block id to its bytes."""

    def read(self, ids: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """The blocks, u8 (n, 4096); raises a HaulierError for an id that does not exist."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch as columns. By kind: `pages` counts records, `raw` their bytes in the stream, `columns` their columns."""

    parts: list[Column]
    """The payload in pieces; some are views of the encoder's own memory."""
    size: int
    pages: dict[str, int]
    raw: dict[str, int]
    columns: dict[str, int]


class PageEncoder:
    """Tokens to columns; keeps `mirror` as the peer's decoder will have it."""

    def __init__(self, mirror: Mirror, finder: BlockFinder | None = None, elsewhere: BlockFinder | None = None) -> None:
        """`elsewhere` finds pages by their index in the base (BasePages); None leaves that kind out."""
        self.mirror = mirror
        self.finder = finder
        self.elsewhere = elsewhere
        self.counted: NDArray[np.uint8] | None = None
        """How often each page was sent (255: that or more), where somebody wants to know."""
        self._pages = np.empty((256, PAGE), np.uint8)
        self._old = np.empty((256, PAGE), np.uint8)

    def encode(self, tokens: Sequence[Token]) -> Encoded:
        """The batch, valid until the next call. Applies it to the mirror: the peer must get it."""
        ops: list[int] = []
        raws: list[bytes] = []
        addresses: list[NDArray[np.uint64]] = []
        first: list[int] = []
        counts: list[int] = []
        paged_flags = bytearray()
        pages = self._room(sum(len(token.pages) for token in tokens if isinstance(token, Pages)))
        at = 0
        for token in tokens:
            if isinstance(token, Raw):
                ops += (_OP_RAW, len(token.data))
                raws.append(token.data)
            elif not isinstance(token, Mark):
                paged = isinstance(token, Pages)
                count = len(token.addresses)
                ops += ((_OP_PAGES if paged else _OP_ZEROS) | (_OP_FIRST if token.first else 0), count)
                addresses.append(token.addresses)
                first.append(self.mirror.first[token.block])
                counts.append(count)
                paged_flags += (b"\1" if paged else b"\0") * count
                if isinstance(token, Pages):
                    pages[at : at + count] = token.pages
                    at += count
        gidx = np.repeat(np.array(first, np.int64), np.array(counts, np.int64))
        if addresses:
            gidx += np.concatenate(addresses).view(np.int64) // PAGE
        paged_rows = np.frombuffer(paged_flags, np.bool_)
        kinds, blocks, bases, masks, words = self._kinds(gidx[paged_rows], pages)
        _apply(self.mirror, gidx, paged_rows, kinds, pages)
        if self.counted is not None:
            self.counted[gidx] = np.minimum(self.counted[gidx], 254) + 1
        raw = b"".join(raws)
        columns: list[Column] = [
            varint.encode_few(ops),
            raw,
            varint.encode_indexes(gidx),
            kinds.tobytes(),
            varint.encode_deltas(blocks),
            varint.encode_deltas(bases),
            masks.reshape(-1).data,
            words.view(np.uint8).data,
            series.pack(pages[(kinds == SERIES).nonzero()[0]]).data,
        ]
        return _encoded(columns, _rows(pages, (kinds == LITERAL).nonzero()[0]), tokens, len(gidx), kinds)

    def _room(self, count: int) -> NDArray[np.uint8]:
        if count > len(self._pages):
            self._pages, self._old = np.empty((count, PAGE), np.uint8), np.empty((count, PAGE), np.uint8)
        return self._pages[:count]

    def _kinds(
        self, gidx: NDArray[np.int64], pages: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint64]]:
        """Kinds (n), then block ids, base pages, xor masks (n, 64) and xor words, each in record order."""
        kinds = np.full(len(gidx), LITERAL, np.uint8)
        # Only pages that the mirror has are compared; `known` are their rows, `old` what it has, by rank in `known`.
        known = self.mirror.present[gidx].nonzero()[0]
        old = self.mirror.get(gidx[known], self._old[: len(known)])
        mine = pages if len(known) == len(pages) else pages[known]
        unequal = mine.view(np.uint64) != old.view(np.uint64)
        differing = _count_words(unequal)
        kinds[known[differing == 0]] = SAME
        blocks = self._find(self.finder, kinds, BLOCK, pages)
        bases = self._find(self.elsewhere, kinds, BASE, pages)
        ranks = ((differing < _XOR_BELOW) & (kinds[known] == LITERAL)).nonzero()[0]
        kinds[known[ranks]] = XOR
        unequal = unequal[ranks]
        # Where they are among all words of `mine`: each by as much further as its row's rank there is higher.
        at = np.flatnonzero(unequal) + np.repeat((ranks - np.arange(len(ranks))) * WORDS, differing[ranks])
        words = mine.view(np.uint64).reshape(-1)[at] ^ old.view(np.uint64).reshape(-1)[at]
        kinds[series.smooth(pages, (kinds == LITERAL).nonzero()[0])] = SERIES
        return kinds, blocks, bases, np.packbits(unequal, axis=1, bitorder="little"), words

    @staticmethod
    def _find(
        finder: BlockFinder | None, kinds: NDArray[np.uint8], kind: int, pages: NDArray[np.uint8]
    ) -> NDArray[np.int64]:
        if finder is None:
            return np.zeros(0, np.int64)
        rows = (kinds == LITERAL).nonzero()[0]
        if not len(rows):
            return np.zeros(0, np.int64)
        found = finder.find(pages[rows])
        hit = found >= 0
        kinds[rows[hit]] = kind
        return found[hit]


def _count_words(unequal: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many are True in each row (512 flags)."""
    # As 64 words of 8 flags: summed as words, each byte counts to 64 at most and cannot carry.
    lanes = np.add.reduce(unequal.view(np.uint64), axis=1)
    counts: NDArray[np.int64] = lanes.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
    return counts


def _apply(
    mirror: Mirror,
    gidx: NDArray[np.int64],
    paged_rows: NDArray[np.bool_],
    kinds: NDArray[np.uint8],
    pages: NDArray[np.uint8],
) -> None:
    """Bring the mirror to where it is after the batch. `pages` holds a row for each page record."""
    last = mirror.last(gidx)
    mirror.zero(gidx[last & ~paged_rows])
    changed = (last[paged_rows] & (kinds != SAME)).nonzero()[0]
    mirror.set(gidx[paged_rows][changed], pages, changed)


def _rows(pages: NDArray[np.uint8], rows: NDArray[np.int64]) -> list[memoryview]:
    """These rows, ascending, as views of `pages` without a copy."""
    data = pages.reshape(-1).data
    starts = rows * PAGE
    return [data[(at := int(starts[first])) : at + count * PAGE] for first, count in runs(rows)]


def _encoded(
    columns: list[Column],
    literals: list[memoryview],
    tokens: Sequence[Token],
    records: int,
    kinds: NDArray[np.uint8],
) -> Encoded:
    """The columns and, as the last one, the literal pages."""
    sizes = [*(len(column) for column in columns), sum(len(part) for part in literals)]
    counts = np.bincount(kinds, minlength=len(KINDS)).tolist()
    by_kind = dict(zip(KINDS, counts, strict=True))
    zeros = records - len(kinds)
    pages = {**by_kind, "zero": zeros}
    raw_bytes = {name: count * RECORD for name, count in by_kind.items()}
    raw_bytes["zero"] = zeros * ZERO_RECORD
    raw_bytes["raw"] = sum(token.size for token in tokens) - sum(raw_bytes.values())
    by_column = dict(zip(COLUMNS, sizes, strict=True))
    held = {
        "literal": by_column["literal"],
        "series": by_column["series"],
        "xor": by_column["masks"] + by_column["words"],
        "block": by_column["blocks"],
        "base": by_column["bases"],
        "raw": by_column["raw"],
        "meta": by_column["ops"] + by_column["addresses"] + by_column["kinds"],
    }
    return Encoded([_HEADER.pack(*sizes), *columns, *literals], _HEADER.size + sum(sizes), pages, raw_bytes, held)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A batch rebuilt, not yet applied to the mirror."""

    raw: bytes
    rest: bytes
    """The same without the records of the block that is loaded `beside` the stream."""
    gidx: NDArray[np.int64] = field(repr=False)
    """Of all records, in their order."""
    paged: NDArray[np.bool_] = field(repr=False)
    """Of all records: a page, not a zero."""
    kinds: NDArray[np.uint8] = field(repr=False)
    """Of the page records."""
    pages: NDArray[np.uint8] = field(repr=False)
    """Of the page records, u8 (n, 4096)."""

    @property
    def changed(self) -> NDArray[np.bool_]:
        """Of the page records: not what the mirror has."""
        changed: NDArray[np.bool_] = self.kinds != SAME
        return changed


class PageDecoder:
    """Columns to bytes. `decode` changes nothing; `apply` brings the mirror along, once the bytes were verified."""

    def __init__(self, mirror: Mirror, reader: BlockReader | None = None, bases: BlockReader | None = None) -> None:
        """`bases` reads pages of the base by their index (BasePages)."""
        self.mirror = mirror
        self.reader = reader
        self.bases = bases
        self.beside: str | None = None
        """The block whose records QEMU is not given."""
        self.touched: NDArray[np.bool_] | None = None
        """Set for each page of a batch once it is in the mirror, where somebody wants to know."""

    def decode(self, payload: bytes, raw_length: int) -> Decoded:
        """Rebuild the batch; Corrupt unless the columns fit one another and make exactly `raw_length` bytes."""
        columns = _split(payload)
        ops = varint.decode(columns["ops"])
        if len(ops) % 2:
            raise Corrupt("a batch's operations end in the middle of one")
        codes, counts = ops[0::2], ops[1::2].astype(np.int64)
        paged, zeroed, raw = (codes & np.uint64(_OP_BITS) == np.uint64(op) for op in (_OP_PAGES, _OP_ZEROS, _OP_RAW))
        if ((codes > np.uint64(_OP_ZEROS | _OP_FIRST)) | (codes == np.uint64(_OP_BITS))).any() or (
            codes[raw] != np.uint64(_OP_RAW)
        ).any():
            raise Corrupt("a batch holds an unknown operation")
        if len(counts) and (int(counts.max()) > raw_length or int(counts.min()) < 1):
            raise Corrupt("a batch holds an operation longer than itself, or empty")
        # The smallest thing between two cuts of a real stream takes more than 8 bytes, so this bounds our time.
        if len(counts) > raw_length // 8 + 16:
            raise Corrupt(f"a batch of {raw_length} bytes holds {len(counts)} operations")
        page_count, zero_count = int(counts[paged].sum()), int(counts[zeroed].sum())
        if page_count * RECORD + zero_count * ZERO_RECORD + int(counts[raw].sum()) > raw_length:
            raise Corrupt(f"a batch holds more than the {raw_length} bytes announced")
        if int(counts[raw].sum()) != len(columns["raw"]) or page_count != len(columns["kinds"]):
            raise Corrupt("a batch's columns do not fit its operations")
        gidx = varint.decode_indexes(columns["addresses"], page_count + zero_count, self.mirror.pages)
        records = ~raw
        paged_rows = np.repeat(paged[records], counts[records])
        kinds = np.frombuffer(columns["kinds"], np.uint8)
        pages = self._pages(gidx[paged_rows], kinds, columns)
        tokens = self._tokens(codes.tolist(), counts.tolist(), columns["raw"], gidx, pages)
        rest = rebuilt = rebuild_all(tokens)
        if len(rebuilt) != raw_length:
            raise Corrupt(f"a batch makes {len(rebuilt)} bytes, not the {raw_length} announced")
        if self.beside is not None:
            # All of its records go: a record that names no block means the one that was named last, and QEMU must
            # have heard of that.
            rest = rebuild_all([token for token in tokens if isinstance(token, Raw) or token.block != self.beside])
        return Decoded(rebuilt, rest, gidx, paged_rows, kinds, pages)

    def apply(self, batch: Decoded) -> None:
        """Bring the mirror to where it is after the batch; each batch once, in order."""
        _apply(self.mirror, batch.gidx, batch.paged, batch.kinds, batch.pages)
        if self.touched is not None:
            self.touched[batch.gidx] = True

    def _pages(
        self, gidx: NDArray[np.int64], kinds: NDArray[np.uint8], columns: dict[str, memoryview]
    ) -> NDArray[np.uint8]:
        """The pages of all page records, in record order."""
        by_kind = [np.flatnonzero(kinds == kind) for kind in range(len(KINDS))]
        if sum(len(rows) for rows in by_kind) != len(kinds):
            raise Corrupt("a batch holds a page of an unknown kind")
        blocks, bases = varint.decode_deltas(columns["blocks"]), varint.decode_deltas(columns["bases"])
        if (
            len(columns["literal"]) != len(by_kind[LITERAL]) * PAGE
            or len(columns["series"]) != len(by_kind[SERIES]) * PAGE
            or len(columns["masks"]) != len(by_kind[XOR]) * _MASK
            or len(blocks) != len(by_kind[BLOCK])
            or len(bases) != len(by_kind[BASE])
        ):
            raise Corrupt("a batch's columns do not fit its kinds of pages")
        pages = np.empty((len(kinds), PAGE), np.uint8)
        pages[by_kind[LITERAL]] = np.frombuffer(columns["literal"], np.uint8).reshape(-1, PAGE)
        if len(by_kind[SERIES]):
            pages[by_kind[SERIES]] = series.unpack(np.frombuffer(columns["series"], np.uint8))
        known = np.flatnonzero((kinds == SAME) | (kinds == XOR))
        if len(known) == len(kinds):
            self.mirror.get(gidx, pages)
        elif len(known):
            pages[known] = self.mirror.get(gidx[known])
        if len(by_kind[XOR]):
            _xor(pages, by_kind[XOR], columns["masks"], columns["words"])
        if len(blocks):
            pages[by_kind[BLOCK]] = _read(self.reader, blocks, "disk block")
        if len(bases):
            pages[by_kind[BASE]] = _read(self.bases, bases, "page of the base")
        return pages

    def _tokens(
        self,
        codes: list[int],
        counts: list[int],
        raw: memoryview,
        gidx: NDArray[np.int64],
        pages: NDArray[np.uint8],
    ) -> list[Raw | Pages | Zeros]:
        tokens: list[Raw | Pages | Zeros] = []
        raw_at = record_at = page_at = 0
        for code, count in zip(codes, counts, strict=True):
            if code == _OP_RAW:
                tokens.append(Raw(bytes(raw[raw_at : raw_at + count])))
                raw_at += count
                continue
            index = gidx[record_at : record_at + count]
            record_at += count
            block, addresses = self._addresses(index)
            if code & _OP_BITS == _OP_PAGES:
                tokens.append(Pages(block, bool(code & _OP_FIRST), addresses, pages[page_at : page_at + count]))
                page_at += count
            else:
                tokens.append(Zeros(block, bool(code & _OP_FIRST), addresses))
        return tokens

    def _addresses(self, index: NDArray[np.int64]) -> tuple[str, NDArray[np.uint64]]:
        low, high = int(index.min()), int(index.max())
        block = int(np.searchsorted(self.mirror.starts, low, side="right")) - 1
        name = self.mirror.names[block]
        first = self.mirror.first[name]
        if high >= first + self.mirror.blocks[name] // PAGE:
            raise Corrupt(f"a run of pages goes beyond the end of RAM block {name!r}")
        return name, ((index - first) * PAGE).astype(np.uint64)


def _xor(pages: NDArray[np.uint8], rows: NDArray[np.int64], masks: memoryview, words: memoryview) -> None:
    """XOR the words that the masks name into these rows of `pages`."""
    bits = np.unpackbits(np.frombuffer(masks, np.uint8).reshape(-1, _MASK), axis=1, bitorder="little")
    at = np.flatnonzero(bits)
    if len(words) != len(at) * 8:
        raise Corrupt("a batch's differences do not fit their masks")
    at += (rows * WORDS)[at // WORDS] - at // WORDS * WORDS
    pages.view(np.uint64).reshape(-1)[at] ^= np.frombuffer(words, np.uint64)


def _split(payload: bytes) -> dict[str, memoryview]:
    view = memoryview(payload)
    if len(view) < _HEADER.size:
        raise Corrupt("a batch is shorter than its header")
    sizes = _HEADER.unpack_from(view)
    if _HEADER.size + sum(sizes) != len(view):
        raise Corrupt("a batch's columns are not as long as its header says")
    columns, at = {}, _HEADER.size
    for name, size in zip(COLUMNS, sizes, strict=True):
        columns[name] = view[at : at + size]
        at += size
    return columns


def _read(reader: BlockReader | None, ids: NDArray[np.int64], what: str) -> NDArray[np.uint8]:
    if reader is None:
        raise Corrupt(f"a batch refers to a {what}, but this site was given none")
    if int(ids.min()) < 0 or int(ids.max()) > 0xFFFFFFFF:
        raise Corrupt(f"a batch refers to {what} {int(ids.min())} to {int(ids.max())}, which cannot be")
    found = reader.read(ids.astype(np.uint32))
    if found.shape != (len(ids), PAGE):
        raise Corrupt(f"{len(ids)} x {what} read as an array of {found.shape}")
    return found
