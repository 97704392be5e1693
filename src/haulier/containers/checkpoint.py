"""The files of a final dump on their way: all but the pages, which go as numbers in the picture. No I/O but files.

Messages, each an encoded map: FILES carries some files, compressed in one stream for the whole handoff, so that what
the trial dump before had in common costs next to nothing; END says what makes the dump whole. The bytes are described
in docs/formats/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from haulier.compress import StreamCompressor, StreamDecompressor
from haulier.containers.files import read_inside
from haulier.containers.images import NAME, PAGES_NAME
from haulier.containers.restoring import DESCRIPTORS, HELD, INVENTORY
from haulier.containers.usual import usual_dump
from haulier.errors import UNDECODABLE, Corrupt
from haulier.memory import varint
from haulier.units import PAGE

MAX_FILE: Final = 256 << 20
MAX_FILES: Final = 100_000
_PART: Final = 4 << 20
_LEVEL: Final = 9
_WINDOW_LOG: Final = 23
SEGMENT: Final = 16
SMALL: Final = 256 << 10
"""So little is compressed as well as can be: that takes a few milliseconds."""
BEST_LEVEL: Final = 19
MAX_BORROWED: Final = 4096
MAX_KEPT: Final = 256 << 10
"""Of larger dumps nothing is kept for the next one."""
ARCHIVE: Final = ".tar.gz.img"
UNPACKED: Final = ".tar.img"
"""Small file systems in memory, which CRIU writes as the former, go as the latter."""
MAX_UNPACKED: Final = 2 << 20


class PagesFile(msgspec.Struct, frozen=True, array_like=True):
    """A file of pages: `count` of them, their numbers in the picture (differences, compressed)."""

    name: str
    count: int
    numbers: bytes


class Part(msgspec.Struct, frozen=True, tag="files", array_like=True):
    """Files one after the other, compressed: `listing` bytes that say which begin here, then `plain` of contents."""

    listing: int
    plain: int
    data: bytes
    trial: bool = False
    """Of a trial dump: only there so that what comes later is small."""


class Borrowed(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a file of the dump that lies in one of the container's own files, and is zeros in what was sent."""

    name: str
    at: int
    path: bytes
    """In the container, without the first slash."""
    offset: int
    length: int
    digest: bytes
    """xxh3-128."""


class Layout(msgspec.Struct, frozen=True, tag="layout", array_like=True):
    """The files of pages as the trial dump had them; those of the final dump will be nearly the same."""

    stream: int
    pages: list[PagesFile]
    early: bool = False
    """Before the first round: what comes may be put together as it comes. Another one follows after the round."""


class End(msgspec.Struct, frozen=True, tag="end", array_like=True):
    """All files were sent. `stream` is how many raw bytes of the picture have to be there before pages are taken.

    A restore may begin; nothing may run before the digests of the files of pages were found right.
    """

    stream: int
    pages: list[PagesFile]
    files: int
    borrowed: list[Borrowed]
    digest: bytes
    """xxh3-128 over names and contents of the files of this dump, in order."""


class Digests(msgspec.Struct, frozen=True, tag="digests", array_like=True):
    """The last message: for each file of pages, in the order of `End`, what `digest_of_pages` makes of it."""

    pages: list[bytes]


Message = Part | Layout | End | Digests
Numbered = list[tuple[str, NDArray[np.int64]]]
"""Names of files of pages, and the numbers in the picture of the pages of each."""
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Message)
_LISTING: Final = msgspec.msgpack.Decoder(list[tuple[str, int]])


def digest_of(data: bytes | memoryview) -> bytes:
    """xxh3-128."""
    return xxhash.xxh3_128_digest(data)


def digest_of_pages(pages: NDArray[np.uint8]) -> bytes:
    """xxh3-128 of the xxh3-128 of each 16 pages, u8 (n, 4096): what changed in a file can be digested alone."""
    data = pages.reshape(-1).data
    parts = (digest_of(data[at : at + SEGMENT * PAGE]) for at in range(0, len(data), SEGMENT * PAGE))
    return digest_of(b"".join(parts))


class CheckpointSender:
    """The source's side."""

    def __init__(self, expected: int = 0, known: bytes = b"") -> None:
        """`expected` bytes a dump has beside its pages, more or less; 0: not known. `known`: what both sites kept."""
        small = 0 < expected < SMALL
        level, window_log = (BEST_LEVEL, 20) if small else (_LEVEL, _WINDOW_LOG)
        self._compressor = StreamCompressor(level, window_log, False, usual_dump() + known)
        self._kept = _Kept()
        self.wire_bytes = 0

    @property
    def kept(self) -> bytes:
        """What serves the next handoff as `known`; the receiver has the same."""
        return self._kept.data

    def files(self, folder: Path, borrowed: Sequence[Borrowed] = (), *, trial: bool = False) -> Iterator[bytes]:
        """Messages with all files of a dump but those of pages; CRIU's statistics and logs stay here.

        What is `borrowed` goes as zeros; `end` tells where it is to be found.
        """
        hasher = xxhash.xxh3_128()
        self._count = 0
        names: list[tuple[str, int]] = []
        plain = bytearray()
        for path in wanted_files(folder):
            name, data = _unpacked(path.name, _blanked(path, borrowed))
            hasher.update(name.encode() + b"\0" + data)
            self._count += 1
            names.append((name, len(data)))
            plain += data
            while len(plain) >= _PART:
                yield self._part(names, bytes(plain[:_PART]), trial)
                names = []
                del plain[:_PART]
        if names or plain:
            yield self._part(names, bytes(plain), trial)
        self._digest = hasher.digest()

    def _part(self, names: list[tuple[str, int]], plain: bytes, trial: bool) -> bytes:
        listing = _ENCODER.encode(names) if names else b""
        if not trial:
            self._kept.add(listing + plain)
        return self._encode(Part(len(listing), len(plain), self._compressor.compress(listing + plain), trial))

    def layout(self, stream: int, pages: Numbered, *, early: bool = False) -> bytes:
        """Tells what files of pages will be like, so that the target can put them together before the dump."""
        return self._encode(Layout(stream, self._pages(pages), early))

    def end(self, stream: int, pages: Numbered, borrowed: Sequence[Borrowed] = ()) -> bytes:
        """After `files`, the last message but one: what the restore needs."""
        return self._encode(End(stream, self._pages(pages), self._count, list(borrowed), self._digest))

    def digests(self, digests: list[bytes]) -> bytes:
        """The last message."""
        return self._encode(Digests(digests))

    def _pages(self, pages: Numbered) -> list[PagesFile]:
        packed = [self._compressor.compress(varint.encode_deltas(numbers)) for _, numbers in pages]
        return [PagesFile(name, len(numbers), data) for (name, numbers), data in zip(pages, packed, strict=True)]

    def _encode(self, message: Message) -> bytes:
        data = _ENCODER.encode(message)
        self.wire_bytes += len(data)
        return data


class _Kept:
    """The files of a dump, while they are not too many."""

    def __init__(self) -> None:
        self.data = b""
        self._size = 0

    def add(self, data: bytes) -> None:
        self._size += len(data)
        self.data = self.data + data if self._size <= MAX_KEPT else b""


def _unpacked(name: str, data: bytes) -> tuple[str, bytes]:
    """A small archive without its own compression, which hides what is known of it, under the name for that."""
    if name.endswith(ARCHIVE) and len(data) <= SMALL:
        with contextlib.suppress(zlib.error):
            inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
            plain = inflater.decompress(data, MAX_UNPACKED)
            if inflater.eof and not inflater.unused_data:
                return name.removesuffix(ARCHIVE) + UNPACKED, plain
    return name, data


def _packed(name: str, data: bytes) -> tuple[str, bytes]:
    """As CRIU wants it."""
    if name.endswith(UNPACKED):
        return name.removesuffix(UNPACKED) + ARCHIVE, gzip.compress(data, 1, mtime=0)
    return name, data


def _blanked(path: Path, borrowed: Sequence[Borrowed]) -> bytes:
    data = bytearray(path.read_bytes())
    for one in borrowed:
        if one.name == path.name:
            data[one.at : one.at + one.length] = bytes(one.length)
    return bytes(data)


def wanted_files(folder: Path) -> list[Path]:
    """The files that a restore needs, in order, but for pages."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not PAGES_NAME.fullmatch(path.name)
        and not path.name.startswith("stats-")
        and path.name != DESCRIPTORS
    ]


class CheckpointReceiver:
    """The target's side: writes the files to `folder`; `end` is set by the last message. Believes nothing."""

    def __init__(self, folder: Path, max_pages: int, known: bytes = b"") -> None:
        """`known`: what both sites kept of an earlier dump."""
        self.folder = folder
        self.layout: tuple[int, Numbered] | None = None
        """The latest one: from how many raw bytes of the picture on it holds, and the pages."""
        self.settled = False
        """It is the one that came after the first round."""
        self.end: End | None = None
        self.pages: Numbered = []
        self.digests: list[bytes] | None = None
        self._max_pages = max_pages
        self._decompressor = StreamDecompressor(dictionary=usual_dump() + known)
        self._kept = _Kept()
        self._hasher = xxhash.xxh3_128()
        self._open: list[tuple[str, int]] = []
        self._data = bytearray()
        self._count = self._size = 0
        self._drafted: dict[str, int] = {}
        """The most pages that any layout had for a file: drafts of them stay."""

    @property
    def kept(self) -> bytes:
        """What serves the next handoff as `known`; the sender has the same."""
        return self._kept.data

    def handle(self, message: bytes) -> None:
        """Takes one message. Raises Corrupt."""
        try:
            decoded = _DECODER.decode(message)
        except UNDECODABLE as error:
            raise Corrupt(f"a message of a dump makes no sense ({error}): run the same haulier at both sites") from None
        if self.end is not None and not (isinstance(decoded, Digests) and self.digests is None):
            raise Corrupt("a message of a dump came after its end")
        if isinstance(decoded, Part):
            self._part(decoded)
        elif isinstance(decoded, Layout):
            self.layout = decoded.stream, self._numbers(decoded.pages)
            self.settled = not decoded.early
        elif isinstance(decoded, End):
            self._end(decoded)
        elif len(decoded.pages) != len(self.pages) or self.end is None:
            raise Corrupt("the digests of a dump are not as many as its files of pages")
        else:
            self.digests = decoded.pages

    def _part(self, part: Part) -> None:
        if not 0 <= part.plain <= _PART or not 0 <= part.listing <= _PART:
            raise Corrupt(f"a dump's message announces {part.listing} and {part.plain} bytes")
        data = self._decompressor.decompress(part.data, part.listing + part.plain)
        if len(data) != part.listing + part.plain:
            raise Corrupt("a dump's message holds less than it announces")
        if part.trial:
            return
        self._kept.add(data)
        try:
            names = _LISTING.decode(data[: part.listing]) if part.listing else []
        except UNDECODABLE as error:
            raise Corrupt(f"a dump's list of files makes no sense ({error})") from None
        for name, size in names:
            if (
                not NAME.fullmatch(name)
                or name in (HELD, DESCRIPTORS)
                or PAGES_NAME.fullmatch(name)
                or not 0 <= size <= MAX_FILE
            ):
                raise Corrupt(f"a dump names a file {name[:80]!r} of {size} bytes")
        self._open += names
        self._data += data[part.listing :]
        self._size += len(data) - part.listing
        if (
            self._count + len(self._open) > MAX_FILES
            or len(self._data) > MAX_FILE + _PART
            or self._size > MAX_FILE + self._max_pages * PAGE
        ):
            raise Corrupt("a dump has too many files, or too large ones")
        while self._open and len(self._data) >= self._open[0][1]:
            name, size = self._open.pop(0)
            contents = bytes(self._data[:size])
            del self._data[:size]
            self._hasher.update(name.encode() + b"\0" + contents)
            self._count += 1
            name, contents = _packed(name, contents)
            # CRIU may wait for its inventory already.
            with (self.folder / (HELD if name == INVENTORY else name)).open("xb") as file:
                file.write(contents)

    def _end(self, end: End) -> None:
        if self._open or self._data or end.files != self._count or end.digest != self._hasher.digest():
            raise Corrupt("the files of the dump did not arrive as they were sent: try again")
        self.pages = self._numbers(end.pages)
        if len(end.borrowed) > MAX_BORROWED or any(
            not NAME.fullmatch(one.name) or PAGES_NAME.fullmatch(one.name) or not 0 <= one.at < one.at + one.length
            for one in end.borrowed
        ):
            raise Corrupt("a dump borrows what makes no sense from the container's files")
        self.end = end

    def give_back(self, root: Path) -> None:
        """Puts in what was borrowed, from the container's files below `root`. Corrupt where they have something else.

        After the end has come, and before the dump is used.
        """
        assert self.end is not None
        for one in self.end.borrowed:
            try:
                data = read_inside(root, one.path, one.offset, one.length)
                if len(data) != one.length or digest_of(data) != one.digest:
                    raise Corrupt(f"what the dump borrows from /{os.fsdecode(one.path)[:200]} is not there: try again")
                with (self.folder / one.name).open("r+b") as file:
                    if os.fstat(file.fileno()).st_size < one.at + one.length:
                        raise Corrupt(f"a dump borrows for {one.name} what lies beyond its end")
                    os.pwrite(file.fileno(), data, one.at)
            except OSError as error:
                raise Corrupt(f"what the dump borrows from /{os.fsdecode(one.path)[:200]}: {error}") from error

    def _numbers(self, files: list[PagesFile]) -> Numbered:
        found: Numbered = []
        total = 0
        for pages in files:
            total += pages.count
            if not PAGES_NAME.fullmatch(pages.name) or not pages.count >= 0 or total > 4 * self._max_pages:
                raise Corrupt(f"a dump names {pages.count} pages in {pages.name[:80]!r}")
            plain = self._decompressor.decompress(pages.numbers, 5 * pages.count + 16)
            numbers = varint.decode_deltas(plain)
            if len(numbers) != pages.count or (
                len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= self._max_pages)
            ):
                raise Corrupt(f"the pages of {pages.name} lie beyond the picture")
            found.append((pages.name, numbers))
            self._drafted[pages.name] = max(pages.count, self._drafted.get(pages.name, 0))
        if sum(self._drafted.values()) > 4 * self._max_pages or len(self._drafted) > MAX_FILES:
            raise Corrupt("a dump's layouts name too many files of pages")
        return found
