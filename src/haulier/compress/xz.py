"""xz as one stream without end, flushed after each batch: every batch is packed by all that went before it.

Of what the page logic leaves of guest memory, even its quickest level makes up to a fifth fewer bytes than zstd does at
any that is as fast, because it models bytes by their place in a word. It pays where the link is slow. Levels from
FIRST_LEVEL on are its own: FIRST_LEVEL + 6 is xz level 6, and that is preset 6 of the tool of that name, as are 0 to 2.
"""

from __future__ import annotations

import lzma
from typing import Any, Final

from haulier.compress.liblzma import BT4, HC4, Encoder, Search
from haulier.compress.stream import Buffer
from haulier.errors import Corrupt, UsageError

FIRST_LEVEL: Final = 20
LEVELS: Final = 10
SEARCHES: Final = {3: Search(HC4, 32, 2), 4: Search(BT4, 32, 4), 5: Search(BT4, 64, 8)}
"""Between presets 1 and 6 there is a gap: of pages of memory 2 and 3 make hardly fewer bytes than 1, of some more, and
take half as long again; 4 and 5 are slower than these, which look at few places for matches, and price what they find
as the strong presets do."""
DICTIONARY: Final = 2 << 20
"""Bytes that either end looks back over, and so about what the target needs; the source takes a dozen times that."""
REMEMBERED: Final = 1 << 20
"""Of what went before, so much is known to a level that takes over: to take in more costs more than it earns."""


def is_xz(level: int) -> bool:
    """Whether that level is one of xz's, not of zstd's."""
    return level >= FIRST_LEVEL


def name_of(level: int) -> str:
    """The level in words."""
    return f"xz level {level - FIRST_LEVEL}" if is_xz(level) else f"zstd level {level}"


class Packer:
    """The source's end. The level may change between any two batches."""

    def __init__(self, level: int, before: bytes = b"") -> None:
        """`before`: what the peer's Unpacker gave out last. UsageError for a level that is not one of xz's."""
        self._before = bytearray(before)
        self.set_level(level)

    def set_level(self, level: int) -> None:
        """From the next batch on. UsageError for a level that is not one of xz's."""
        if not FIRST_LEVEL <= level < FIRST_LEVEL + LEVELS:
            raise UsageError(f"level {level} is none of xz's: {FIRST_LEVEL} to {FIRST_LEVEL + LEVELS - 1}")
        self.level = level
        own = level - FIRST_LEVEL
        self._encoder = Encoder(own, DICTIONARY, bytes(self._before), SEARCHES.get(own))

    def pack(self, *data: Buffer) -> bytes:
        """The bytes from which the peer's Unpacker gives back all of `data` at once."""
        plain = b"".join(data)
        packed = self._encoder.pack(plain)
        self._before += plain
        del self._before[:-REMEMBERED]
        return packed


class Unpacker:
    """The other end of a Packer. After any error it is useless: end the session."""

    def __init__(self) -> None:
        filters: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": DICTIONARY}]
        self._lzma = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)

    def unpack(self, data: Buffer, max_out: int) -> bytes:
        """What `data` holds, `max_out` bytes at most; Corrupt if it is more, or no LZMA2, or ends the stream."""
        try:
            out = self._lzma.decompress(bytes(data), max_length=max_out + 1)
        except lzma.LZMAError as error:
            raise Corrupt(f"a compressed batch is not valid xz ({error}); end this session and start again") from error
        except EOFError as error:
            raise Corrupt("bytes follow the end of the xz stream; end this session") from error
        if len(out) > max_out:
            raise Corrupt(f"a compressed batch holds more than the {max_out} bytes announced; end this session")
        if self._lzma.eof:
            raise Corrupt("the peer ended the xz stream in the middle of the session; end it")
        return out
