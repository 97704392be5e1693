"""The messages of a disk transfer, as bytes. No store, thread or clock. Formats: docs/formats/disk-transfer.md.

Both ends give whole messages to an ordered channel that loses nothing. Everything a decoder takes in is bounded, and
nonsense raises Corrupt.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from haulier.compress import zstd
from haulier.compress.stream import StreamCompressor, StreamDecompressor
from haulier.errors import Corrupt, Unsupported
from haulier.units import CHUNK, FINGERPRINT

VERSION: Final = 1

OFFER, ASK, CHUNKS, DELTA, COMMIT = 1, 2, 3, 4, 5
LACKING, ANSWER, COMMITTED, MISSING, FAILED, HERE = 129, 130, 131, 132, 133, 134

LITERAL, RECIPE, PATCH = 0, 1, 2
"""How a chunk travels: its bytes, a recipe of blocks, a patch on the chunk that was at that place."""

MAX_MESSAGE: Final = 1 << 20
"""No message is longer; a chunk batch aims at half of it."""
BATCH_BYTES: Final = 512 << 10
BATCH_CHUNKS: Final = 128
MAX_ENTRY: Final = CHUNK + 1024
"""Longest recipe or patch: it would not be used if it were not shorter than the chunk."""
MAX_ASK: Final = 4096
MAX_MISSING: Final = 4096
MAX_HERE: Final = 4096
DELTA_PART: Final = 512 << 10
PREFIX: Final = 8
"""Bytes of the fingerprint that go with each chunk: enough to see which chunk came out wrong. What counts is the whole
fingerprint in the manifest."""
MAX_BITS: Final = 1 << 24
"""Chunks of the largest disk (1 TiB)."""

_OFFER: Final = struct.Struct("<BBQI32s")
_ASK: Final = struct.Struct("<BII")
_CHUNKS: Final = struct.Struct("<BHII")
_ENTRY: Final = struct.Struct("<BII8s")
_COMMIT: Final = struct.Struct("<BIBI32s")
_COMMITTED: Final = struct.Struct("<BI32s")


@dataclass(frozen=True)
class Offer:
    """S: the base manifest's size (bytes) and digest, and how many chunks the shared block space has."""

    size: int
    space: int
    digest: bytes

    def encode(self) -> bytes:
        return _OFFER.pack(OFFER, VERSION, self.size, self.space, self.digest)

    @classmethod
    def decode(cls, message: bytes) -> Offer:
        _exactly(message, _OFFER.size, "offer")
        _kind, version, size, space, digest = _OFFER.unpack(message)
        if version != VERSION:
            raise Unsupported(f"the other site speaks disk transfer {version}, this one {VERSION}; update the older")
        return cls(size, space, digest)


@dataclass(frozen=True)
class Lacking:
    """R: which of the base manifest's chunks and which of the block space's chunks the target has not got.

    Flags in the order of first occurrence in the manifest (ZERO left out), and in the order of the space.
    """

    base: list[bool]
    space: list[bool]

    def encode(self) -> bytes:
        return bytes([LACKING]) + _pack_flags(self.base) + _pack_flags(self.space)

    @classmethod
    def decode(cls, message: bytes) -> Lacking:
        base, at = _unpack_flags(message, 1)
        space, at = _unpack_flags(message, at)
        _exactly(message, at, "answer to the offer")
        return cls(base, space)


@dataclass(frozen=True)
class Ask:
    """S: which of these does the target lack?"""

    number: int
    fingerprints: list[bytes]

    def encode(self) -> bytes:
        return _ASK.pack(ASK, self.number, len(self.fingerprints)) + b"".join(self.fingerprints)

    @classmethod
    def decode(cls, message: bytes) -> Ask:
        _at_least(message, _ASK.size, "question")
        _kind, number, count = _ASK.unpack_from(message)
        if not 0 < count <= MAX_ASK:
            raise Corrupt(f"a question about {count} chunks; at most {MAX_ASK} are taken")
        _exactly(message, _ASK.size + count * FINGERPRINT, "question")
        return cls(number, split(message[_ASK.size :]))


@dataclass(frozen=True)
class Answer:
    """R: one flag for each fingerprint of question `number`: lacking."""

    number: int
    lacking: list[bool]

    def encode(self) -> bytes:
        return struct.pack("<BI", ANSWER, self.number) + _pack_flags(self.lacking)

    @classmethod
    def decode(cls, message: bytes) -> Answer:
        _at_least(message, 5, "answer")
        lacking, at = _unpack_flags(message, 5)
        _exactly(message, at, "answer")
        return cls(int.from_bytes(message[1:5], "little"), lacking)


@dataclass(frozen=True)
class Commit:
    """S: with the delta that was just sent in parts (`delta_length` bytes) the manifest must have this digest."""

    number: int
    final: bool
    delta_length: int
    digest: bytes

    def encode(self) -> bytes:
        return _COMMIT.pack(COMMIT, self.number, self.final, self.delta_length, self.digest)

    @classmethod
    def decode(cls, message: bytes) -> Commit:
        _exactly(message, _COMMIT.size, "commit")
        _kind, number, final, length, digest = _COMMIT.unpack(message)
        if final > 1:
            raise Corrupt(f"a commit with flag {final}; 0 and 1 are known")
        return cls(number, bool(final), length, digest)


@dataclass(frozen=True)
class Committed:
    """R: chunks and manifest of commit `number` are durable here."""

    number: int
    digest: bytes

    def encode(self) -> bytes:
        return _COMMITTED.pack(COMMITTED, self.number, self.digest)

    @classmethod
    def decode(cls, message: bytes) -> Committed:
        _exactly(message, _COMMITTED.size, "acknowledgement")
        _kind, number, digest = _COMMITTED.unpack(message)
        return cls(number, digest)


@dataclass(frozen=True)
class Missing:
    """R: commit `number` is not made; these chunks (some of them) are not here: send them whole and commit again."""

    number: int
    fingerprints: list[bytes]

    def encode(self) -> bytes:
        return struct.pack("<BI", MISSING, self.number) + b"".join(self.fingerprints)

    @classmethod
    def decode(cls, message: bytes) -> Missing:
        count, rest = divmod(len(message) - 5, FINGERPRINT)
        if rest or not 0 < count <= MAX_MISSING:
            raise Corrupt(f"a list of missing chunks of {len(message)} bytes")
        return cls(int.from_bytes(message[1:5], "little"), split(message[5:]))


@dataclass(frozen=True)
class Here:
    """R: chunks of the base that it lacked have come from elsewhere: their positions among those asked about."""

    positions: list[int]

    def encode(self) -> bytes:
        return struct.pack(f"<B{len(self.positions)}I", HERE, *self.positions)

    @classmethod
    def decode(cls, message: bytes) -> Here:
        count, rest = divmod(len(message) - 1, 4)
        if rest or not 0 < count <= MAX_HERE:
            raise Corrupt(f"a list of {len(message)} bytes of chunks that came from elsewhere")
        return cls(list(struct.unpack_from(f"<{count}I", message, 1)))


@dataclass(frozen=True)
class Failed:
    """R: the transfer is over; `code` is the exit code of an error's class, `text` says what and what next."""

    code: int
    text: str

    def encode(self) -> bytes:
        return struct.pack("<BB", FAILED, self.code) + self.text.encode()[:2000]

    @classmethod
    def decode(cls, message: bytes) -> Failed:
        _at_least(message, 2, "failure")
        return cls(message[1], message[2:2002].decode("utf-8", "replace"))


def encode_delta_parts(delta: bytes) -> list[bytes]:
    """The messages that carry a manifest delta."""
    return [bytes([DELTA]) + delta[at : at + DELTA_PART] for at in range(0, len(delta), DELTA_PART)]


# -- chunks


@dataclass(frozen=True)
class Entry:
    """One chunk of a batch: `kind`, the first bytes of its fingerprint, and what to make it from.

    `index` is the place of the chunk that a PATCH is made on, in the committed manifest; 0 otherwise.
    """

    kind: int
    index: int
    prefix: bytes
    data: bytes


class ChunkWriter:
    """Gathers entries into chunk messages; one zstd stream runs through all of them, so messages must go in order."""

    def __init__(self, level: int, window_log: int) -> None:
        self._zstd = StreamCompressor(level, window_log)
        self._entries: list[Entry] = []
        self._bytes = 0

    def add(self, entry: Entry) -> bool:
        """Take an entry; True when `take` should be called now."""
        self._entries.append(entry)
        self._bytes += len(entry.data)
        return self._bytes >= BATCH_BYTES or len(self._entries) >= BATCH_CHUNKS

    def take(self) -> tuple[bytes, dict[int, int]] | None:
        """The message of what was gathered, and its compressed bytes by kind; None when nothing was."""
        if not self._entries:
            return None
        # Recipes and patches first: like stands beside like, and their share of the bytes can be told.
        entries = sorted(self._entries, key=lambda entry: -entry.kind)
        self._entries, self._bytes = [], 0
        table = b"".join(_ENTRY.pack(e.kind, e.index, len(e.data), e.prefix) for e in entries)
        parts, wire = [self._zstd.compress(table)], {LITERAL: 0, RECIPE: 0, PATCH: 0}
        for kind in (PATCH, RECIPE, LITERAL):
            plain = b"".join(e.data for e in entries if e.kind == kind)
            if plain:
                parts.append(self._zstd.compress(plain))
                wire[kind] = len(parts[-1])
        head = _CHUNKS.pack(CHUNKS, len(entries), len(parts[0]), sum(len(e.data) for e in entries))
        return head + b"".join(parts), wire


class ChunkReader:
    """The other end of a ChunkWriter."""

    def __init__(self, max_window_log: int) -> None:
        self._zstd = StreamDecompressor(max_window_log)

    def entries(self, message: bytes) -> list[Entry]:
        """The entries of a chunk message. After Corrupt the stream cannot go on."""
        _at_least(message, _CHUNKS.size, "chunk batch")
        _kind, count, table_length, plain_length = _CHUNKS.unpack_from(message)
        if not 0 < count <= BATCH_CHUNKS or plain_length > BATCH_BYTES + MAX_ENTRY:
            raise Corrupt(f"a chunk batch of {count} chunks in {plain_length} bytes is more than was agreed")
        if _CHUNKS.size + table_length > len(message):
            raise Corrupt("a chunk batch ends within its table")
        view = memoryview(message)[_CHUNKS.size :]
        table = self._zstd.decompress(view[:table_length], count * _ENTRY.size)
        if len(table) != count * _ENTRY.size:
            raise Corrupt("a chunk batch has a table of the wrong length")
        plain = self._zstd.decompress(view[table_length:], plain_length)
        found: list[Entry] = []
        at = 0
        for kind, index, length, prefix in _ENTRY.iter_unpack(table):
            if kind > PATCH or length > MAX_ENTRY or (kind == LITERAL and length != CHUNK):
                raise Corrupt(f"a chunk of kind {kind} in {length} bytes")
            found.append(Entry(kind, index, prefix, plain[at : at + length]))
            at += length
        if at != plain_length or len(plain) != plain_length:
            raise Corrupt(f"a chunk batch holds {len(plain)} bytes; its table speaks of {at}")
        return found


# -- small things


def split(raw: bytes) -> list[bytes]:
    """Fingerprints out of their concatenation."""
    return [raw[at : at + FINGERPRINT] for at in range(0, len(raw), FINGERPRINT)]


def _pack_flags(flags: Sequence[bool]) -> bytes:
    bits = bytearray((len(flags) + 7) // 8)
    for n, flag in enumerate(flags):
        if flag:
            bits[n >> 3] |= 1 << (n & 7)
    packed = zstd.compress(bytes(bits), 3)
    return struct.pack("<II", len(flags), len(packed)) + packed


def _unpack_flags(message: bytes, at: int) -> tuple[list[bool], int]:
    if at + 8 > len(message):
        raise Corrupt("a list of flags ends within its head")
    count, length = struct.unpack_from("<II", message, at)
    at += 8
    if count > MAX_BITS or at + length > len(message):
        raise Corrupt(f"a list of {count} flags in {length} bytes is too long")
    size = (count + 7) // 8
    engine = zstd.ZstdDecompressor()
    try:
        bits = engine.decompress(message[at : at + length], size + 1)
    except zstd.ZstdError as error:
        raise Corrupt(f"a list of flags does not decompress ({error})") from None
    if len(bits) != size or not engine.eof or engine.unused_data:
        raise Corrupt(f"a list of {count} flags has {len(bits)} bytes")
    return [bool(bits[n >> 3] >> (n & 7) & 1) for n in range(count)], at + length


def _at_least(message: bytes, size: int, what: str) -> None:
    if len(message) < size:
        raise Corrupt(f"{what} of {len(message)} bytes is cut short")


def _exactly(message: bytes, size: int, what: str) -> None:
    if len(message) != size:
        raise Corrupt(f"{what} has {len(message)} bytes instead of {size}")
