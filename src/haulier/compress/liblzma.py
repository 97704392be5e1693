"""The one thing of liblzma that the standard library's lzma does not reach: a raw LZMA2 encoder that is flushed.

Its own LZMACompressor can only end a stream, and what is packed next knows nothing of what went before. This is the C
library below it, which is there wherever Python's module is; its interface is stable by its soname. Decoding needs
none of it.
"""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

from haulier.errors import HaulierError, Unsupported

_SONAME: Final = "liblzma.so.5"
_LZMA2: Final = 0x21
_NO_MORE: Final = 2**64 - 1
_SYNC_FLUSH: Final = 1
_OK, _STREAM_END = 0, 1
_ROOM: Final = 64 << 10
_NORMAL: Final = 2
HC4: Final = 0x04
"""Hash chains ..."""
BT4: Final = 0x14
"""... and binary trees, of four bytes."""


class _Stream(ctypes.Structure):
    """lzma_stream."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_size_t),
        ("total_in", ctypes.c_uint64),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_size_t),
        ("total_out", ctypes.c_uint64),
        ("allocator", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
        ("reserved_pointers", ctypes.c_void_p * 4),
        ("reserved_sizes", ctypes.c_uint64 * 4),
        ("reserved_enums", ctypes.c_int * 2),
    )


class _Options(ctypes.Structure):
    """The beginning of lzma_options_lzma, and more room than the rest of it takes: lzma_lzma_preset fills it in."""

    _fields_ = (
        ("dict_size", ctypes.c_uint32),
        ("preset_dict", ctypes.c_void_p),
        ("preset_dict_size", ctypes.c_uint32),
        ("lc", ctypes.c_uint32),
        ("lp", ctypes.c_uint32),
        ("pb", ctypes.c_uint32),
        ("mode", ctypes.c_uint32),
        ("nice_len", ctypes.c_uint32),
        ("mf", ctypes.c_uint32),
        ("depth", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 512),
    )


class Search(NamedTuple):
    """How hard a normal (not fast) encoder looks for matches, where no preset says it as it should be."""

    finder: int
    """HC4 or BT4."""
    enough: int
    """Bytes of a match that is taken without looking for a longer one."""
    depth: int
    """How many places it looks at."""


class _Filter(ctypes.Structure):
    """lzma_filter."""

    _fields_ = (("id", ctypes.c_uint64), ("options", ctypes.c_void_p))


def _library() -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(_SONAME)
    except OSError as error:
        raise Unsupported(f"{_SONAME} cannot be loaded ({error}): install it (Debian's liblzma5)") from None
    found.lzma_end.restype = None
    found.lzma_lzma_preset.restype = ctypes.c_ubyte  # lzma_bool: what is above it in the register means nothing
    return found


class Encoder:
    """One LZMA2 stream without end. One thread at a time; other threads run meanwhile.

    `dictionary` is how far either end looks back, in bytes; `before` what the decoder was given last; `search` is
    instead of what the preset says of it. A decoder need not know which it was.
    """

    def __init__(self, preset: int, dictionary: int, before: bytes = b"", search: Search | None = None) -> None:
        self._lzma = _library()
        self._stream = _Stream()
        options = _Options()
        if self._lzma.lzma_lzma_preset(ctypes.byref(options), ctypes.c_uint32(preset)):
            raise Unsupported(f"liblzma has no preset {preset}")
        options.dict_size = dictionary
        if search is not None:
            options.mode = _NORMAL
            options.mf, options.nice_len, options.depth = search
        if before:
            # The decoder's window is as it was: liblzma then begins with new probabilities, and empties no window.
            options.preset_dict = ctypes.cast(ctypes.c_char_p(before), ctypes.c_void_p)
            options.preset_dict_size = len(before)
        chain = (_Filter * 2)(
            _Filter(_LZMA2, ctypes.cast(ctypes.byref(options), ctypes.c_void_p)), _Filter(_NO_MORE, None)
        )
        if code := self._lzma.lzma_raw_encoder(ctypes.byref(self._stream), chain):
            raise HaulierError(f"liblzma cannot begin a stream (its error {code}): is memory short?")
        self._room = ctypes.create_string_buffer(_ROOM)

    def pack(self, data: bytes) -> bytes:
        """What a decoder gives back `data` from, at once."""
        stream, out = self._stream, []
        stream.next_in = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
        stream.avail_in = len(data)
        code = _OK
        while code == _OK:
            stream.next_out = ctypes.cast(self._room, ctypes.c_void_p)
            stream.avail_out = _ROOM
            code = self._lzma.lzma_code(ctypes.byref(stream), _SYNC_FLUSH)
            out.append(ctypes.string_at(self._room, _ROOM - stream.avail_out))
        stream.next_in = None
        if code != _STREAM_END:
            raise HaulierError(f"liblzma cannot go on (its error {code}): is memory short?")
        return b"".join(out)

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._lzma.lzma_end(ctypes.byref(self._stream))
