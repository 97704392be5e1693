"""Streaming zstd, flushed after each batch, with a window that outlives the batches.

One context serves one direction of one handoff, so that guest A's secrets never shape the length of guest B's bytes.
Both ends hold the window in memory: 1 << window_log bytes each. The decompressor never gives out more than it was told
to expect, and never allocates a larger window than it was told to allow.
"""

from __future__ import annotations

from typing import Final

from haulier.compress import zstd
from haulier.errors import Corrupt, UsageError

MIN_WINDOW_LOG: Final = 20
MAX_WINDOW_LOG: Final = 27
DEFAULT_WINDOW_LOG: Final = 25
FAST_LINK_BPS: Final = 150e6
LONG_LEVEL: Final = 7
"""From here on zstd looks back over the whole window: of guest memory it earns less than it costs."""
NEAR_WINDOW_LOG: Final = 21
"""The window without long-distance matching: more is never found, and only strains the caches."""

Buffer = bytes | bytearray | memoryview


def window(level: int, log: int = DEFAULT_WINDOW_LOG, long: bool | None = None) -> tuple[int, bool]:
    """The window's log and whether to look back over all of it, for StreamCompressor: `log` and `long` as far as given.

    By default far from LONG_LEVEL on, because below speed matters more.
    """
    far = level >= LONG_LEVEL if long is None else long
    return (log if far else min(log, NEAR_WINDOW_LOG)), far


def level_for(link_bps: float) -> int:
    """The zstd level that pays on a link of that many bits a second.

    Level 5 makes as few bytes of pages as level 9 does, to within 0.2 %, at three times the speed (130 MB/s of pages
    that nothing else explains), and 4 to 5 % fewer than levels 2 and 3. From about 150 Mbps on one core is the limit,
    and level 2 gives up those bytes for more than twice the pages a second.
    """
    return 5 if link_bps < FAST_LINK_BPS else 2


def _raw(dictionary: bytes) -> zstd.ZstdDict | None:
    return zstd.ZstdDict(dictionary, is_raw=True) if dictionary else None


class StreamCompressor:
    """One zstd frame without end.

    `level` is zstd's; `window_log` is the base-2 logarithm of the window in bytes; `long` turns long-distance matching
    on, which finds what was sent tens of megabytes ago at a small price. `dictionary` is what the peer has as well, as
    if it had been sent before.
    """

    def __init__(
        self, level: int = 3, window_log: int = DEFAULT_WINDOW_LOG, long: bool = True, dictionary: bytes = b""
    ) -> None:
        if not MIN_WINDOW_LOG <= window_log <= MAX_WINDOW_LOG:
            raise UsageError(f"window_log {window_log} is outside {MIN_WINDOW_LOG} to {MAX_WINDOW_LOG}")
        options: dict[int, int] = {
            zstd.CompressionParameter.compression_level: level,
            zstd.CompressionParameter.window_log: window_log,
            zstd.CompressionParameter.enable_long_distance_matching: int(long),
            zstd.CompressionParameter.checksum_flag: 0,
        }
        try:
            self._zstd = zstd.ZstdCompressor(options=options, zstd_dict=_raw(dictionary))
        except (ValueError, zstd.ZstdError) as error:
            raise UsageError(f"zstd does not take level {level}: {error}") from error

    def compress(self, *data: Buffer) -> bytes:
        """The bytes from which the peer's decompressor gives back all of `data` at once (a block boundary)."""
        out = [self._zstd.compress(part, zstd.ZstdCompressor.CONTINUE) for part in data]
        out.append(self._zstd.flush(zstd.ZstdCompressor.FLUSH_BLOCK))
        return b"".join(out)


class StreamDecompressor:
    """The other end of a StreamCompressor. After any error the context is useless: end the session."""

    def __init__(self, max_window_log: int = MAX_WINDOW_LOG, dictionary: bytes = b"") -> None:
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: max_window_log}
        self._zstd = zstd.ZstdDecompressor(_raw(dictionary), options=options)

    def decompress(self, data: Buffer, max_out: int) -> bytes:
        """What `data` holds, `max_out` bytes at most; Corrupt if it is more, or is not zstd, or ends the frame."""
        try:
            out = self._zstd.decompress(data, max_length=max_out + 1)
            if len(out) <= max_out and not (self._zstd.needs_input or self._zstd.eof):
                out += self._zstd.decompress(b"", max_length=max_out + 1 - len(out))
        except zstd.ZstdError as error:
            raise Corrupt(
                f"a compressed batch is not valid zstd ({error}); end this session and start again"
            ) from error
        except EOFError as error:
            raise Corrupt("bytes follow the end of the zstd frame; end this session") from error
        if len(out) > max_out:
            raise Corrupt(f"a compressed batch holds more than the {max_out} bytes announced; end this session")
        if self._zstd.eof:
            raise Corrupt("the peer ended the zstd frame in the middle of the stream; end this session")
        return out
