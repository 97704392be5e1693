"""The files of a final dump on their way: all but the pages, which go as numbers in the picture. No I/O but files.

Messages, each an encoded map: FILES carries some files, compressed in one stream for the whole handoff, so that what
the trial dump before had in common costs next to nothing; END says what makes the dump whole. The bytes are described
in docs/formats/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from haulier.compress import StreamCompressor, StreamDecompressor
from haulier.containers.images import NAME, PAGES_NAME
from haulier.errors import Corrupt
from haulier.memory import sparse, varint

MAX_FILE: Final = 256 << 20
MAX_FILES: Final = 100_000
_PART: Final = 4 << 20
_LEVEL: Final = 9
_WINDOW_LOG: Final = 23


class PagesFile(msgspec.Struct, frozen=True, array_like=True):
    """A file of pages: `count` of them, their numbers in the picture (differences, compressed), digest of the file."""

    name: str
    count: int
    numbers: bytes
    digest: bytes


class Part(msgspec.Struct, frozen=True, tag="files", tag_field="type"):
    """Contents of files one after the other, compressed: names and lengths, or a further piece of the last one."""

    names: list[tuple[str, int]]
    plain: int
    data: bytes
    trial: bool = False
    """Of a trial dump: only there so that what comes later is small."""


class End(msgspec.Struct, frozen=True, tag="end", tag_field="type"):
    """All files were sent. `stream` is how many raw bytes of the picture have to be there before pages are taken."""

    stream: int
    pages: list[PagesFile]
    files: int
    digest: bytes
    """xxh3-128 over names and contents of the files of this dump, in order."""


Message = Part | End
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Message)


def digest_of(data: bytes | memoryview) -> bytes:
    """xxh3-128."""
    return xxhash.xxh3_128_digest(data)


class CheckpointSender:
    """The source's side."""

    def __init__(self) -> None:
        self._compressor = StreamCompressor(_LEVEL, _WINDOW_LOG, False)
        self.wire_bytes = 0

    def files(self, folder: Path, *, trial: bool = False) -> Iterator[bytes]:
        """Messages with all files of a dump but those of pages; CRIU's statistics and logs stay here."""
        hasher = xxhash.xxh3_128()
        self._count = 0
        names: list[tuple[str, int]] = []
        plain = bytearray()
        for path in wanted_files(folder):
            data = path.read_bytes()
            hasher.update(path.name.encode() + b"\0" + data)
            self._count += 1
            names.append((path.name, len(data)))
            plain += data
            while len(plain) >= _PART:
                yield self._part(names, bytes(plain[:_PART]), trial)
                names = []
                del plain[:_PART]
        if names or plain:
            yield self._part(names, bytes(plain), trial)
        self._digest = hasher.digest()

    def _part(self, names: list[tuple[str, int]], plain: bytes, trial: bool) -> bytes:
        return self._encode(Part(names, len(plain), self._compressor.compress(plain), trial))

    def end(self, stream: int, pages: list[tuple[str, NDArray[np.int64], bytes]]) -> bytes:
        """The last message; after `files`. `pages` are name, numbers in the picture, and digest of each file."""
        made = []
        for name, numbers, digest in pages:
            packed = self._compressor.compress(varint.encode_deltas(numbers))
            made.append(PagesFile(name, len(numbers), packed, digest))
        return self._encode(End(stream, made, self._count, self._digest))

    def _encode(self, message: Message) -> bytes:
        data = _ENCODER.encode(message)
        self.wire_bytes += len(data)
        return data


def wanted_files(folder: Path) -> list[Path]:
    """The files that a restore needs, in order, but for pages."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not PAGES_NAME.fullmatch(path.name) and not path.name.startswith("stats-")
    ]


class CheckpointReceiver:
    """The target's side: writes the files to `folder`; `end` is set by the last message. Believes nothing."""

    def __init__(self, folder: Path, max_pages: int) -> None:
        self.folder = folder
        self.end: End | None = None
        self.pages: list[tuple[str, NDArray[np.int64], bytes]] = []
        self._max_pages = max_pages
        self._decompressor = StreamDecompressor()
        self._hasher = xxhash.xxh3_128()
        self._open: list[tuple[str, int]] = []
        self._data = bytearray()
        self._count = 0

    def handle(self, message: bytes) -> None:
        """Takes one message. Raises Corrupt."""
        try:
            decoded = _DECODER.decode(message)
        except msgspec.MsgspecError as error:
            raise Corrupt(f"a message of a dump makes no sense ({error}): run the same haulier at both sites") from None
        if self.end is not None:
            raise Corrupt("a message of a dump came after its end")
        if isinstance(decoded, Part):
            self._part(decoded)
        else:
            self._end(decoded)

    def _part(self, part: Part) -> None:
        if not 0 <= part.plain <= _PART:
            raise Corrupt(f"a dump's message announces {part.plain} bytes")
        data = self._decompressor.decompress(part.data, part.plain)
        if len(data) != part.plain:
            raise Corrupt("a dump's message holds less than it announces")
        if part.trial:
            return
        for name, size in part.names:
            if not NAME.fullmatch(name) or PAGES_NAME.fullmatch(name) or not 0 <= size <= MAX_FILE:
                raise Corrupt(f"a dump names a file {name[:80]!r} of {size} bytes")
        self._open += part.names
        self._data += data
        if len(self._open) > MAX_FILES or len(self._data) > MAX_FILE + _PART:
            raise Corrupt("a dump has too many files")
        while self._open and len(self._data) >= self._open[0][1]:
            name, size = self._open.pop(0)
            contents = bytes(self._data[:size])
            del self._data[:size]
            self._hasher.update(name.encode() + b"\0" + contents)
            self._count += 1
            with (self.folder / name).open("xb") as file:
                file.write(contents)

    def _end(self, end: End) -> None:
        if self._open or self._data or end.files != self._count or end.digest != self._hasher.digest():
            raise Corrupt("the files of the dump did not arrive as they were sent: try again")
        total = 0
        for pages in end.pages:
            total += pages.count
            if not PAGES_NAME.fullmatch(pages.name) or not pages.count >= 0 or total > 4 * self._max_pages:
                raise Corrupt(f"a dump names {pages.count} pages in {pages.name[:80]!r}")
            plain = self._decompressor.decompress(pages.numbers, 5 * pages.count + 16)
            numbers = varint.decode_deltas(plain)
            if len(numbers) != pages.count or (
                len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= self._max_pages)
            ):
                raise Corrupt(f"the pages of {pages.name} lie beyond the picture")
            self.pages.append((pages.name, numbers, pages.digest))
        self.end = end


def write_pages(path: Path, numbers: NDArray[np.int64], picture: NDArray[np.uint8]) -> bytes:
    """Writes a file of the pages of `picture`, u8 (pages, 4096), of these numbers. Digest of what was written."""
    hasher = xxhash.xxh3_128()
    with path.open("xb", buffering=0) as file:
        for position, count in sparse.runs(numbers):
            first = int(numbers[position])
            data = picture[first : first + count].reshape(-1).data
            hasher.update(data)
            while data:
                data = data[file.write(data) :]
    return hasher.digest()
