"""The frames of the chunk service, as bytes. Formats: docs/formats/chunk-service.md.

Each is one binary WebSocket message. Decoders bound what they take and raise Corrupt for nonsense.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from haulier.chunks.fingerprint import Buffer, fingerprint
from haulier.compress import zstd
from haulier.errors import Corrupt
from haulier.units import CHUNK, FINGERPRINT

PATH: Final = "/v1/peer/chunks"
PROTOCOL: Final = "haulier-chunks.1"

WANT, WANT_NOW, HURRY, HAVE, PING = 1, 2, 3, 4, 5
DATA, ABSENT, HOLDINGS, PONG = 129, 130, 131, 132
RAW, ZSTD = 0, 1

MAX_FINGERPRINTS: Final = 4096
MAX_REQUEST: Final = 16 + MAX_FINGERPRINTS * FINGERPRINT
MAX_ANSWER: Final = 64 + CHUNK + 1024
_HEAD: Final = struct.Struct("<BI")
_DATA: Final = struct.Struct("<BB32s")
_PING: Final = struct.Struct("<BQ")


def fingerprints(kind: int, fps: Sequence[bytes], number: int = 0) -> bytes:
    """WANT, WANT_NOW, HURRY, HAVE and ABSENT: a number (of the question, for HAVE) and fingerprints."""
    return _HEAD.pack(kind, number) + b"".join(fps)


def read_fingerprints(message: bytes) -> tuple[int, list[bytes]]:
    """(number, fingerprints). Corrupt if there are none, too many, or a part of one."""
    count, rest = divmod(len(message) - _HEAD.size, FINGERPRINT)
    if rest or not 0 < count <= MAX_FINGERPRINTS:
        raise Corrupt(f"a chunk frame of {len(message)} bytes: run the same haulier at both sites")
    number = _HEAD.unpack_from(message)[1]
    return number, [message[at : at + FINGERPRINT] for at in range(_HEAD.size, len(message), FINGERPRINT)]


def data(fp: bytes, chunk: bytes, level: int = 3) -> bytes:
    """A chunk, compressed where that is shorter."""
    packed = zstd.compress(chunk, level)
    if len(packed) < len(chunk):
        return _DATA.pack(DATA, ZSTD, fp) + packed
    return _DATA.pack(DATA, RAW, fp) + chunk


def read_data(message: bytes) -> tuple[bytes, int, memoryview]:
    """(fingerprint, codec, packed chunk); what it unpacks to is not looked at yet."""
    if not _DATA.size < len(message) <= MAX_ANSWER:
        raise Corrupt(f"a chunk came in {len(message)} bytes")
    _kind, codec, fp = _DATA.unpack_from(message)
    return fp, codec, memoryview(message)[_DATA.size :]


def unpack(codec: int, packed: Buffer, fp: bytes) -> bytes:
    """The chunk `fp` out of what came. Corrupt if it is anything else: whoever sent it is not to be believed."""
    if codec == ZSTD:
        engine = zstd.ZstdDecompressor()
        try:
            chunk = engine.decompress(packed, CHUNK + 1)
        except zstd.ZstdError as error:
            raise Corrupt(f"chunk {fp[:6].hex()} does not unpack ({error})") from None
    elif codec == RAW:
        chunk = bytes(packed)
    else:
        raise Corrupt(f"chunk {fp[:6].hex()} came in the unknown form {codec}")
    if len(chunk) != CHUNK or fingerprint(chunk) != fp:
        raise Corrupt(f"chunk {fp[:6].hex()} came with other contents")
    return chunk


def holdings(number: int, held: Sequence[bool]) -> bytes:
    """The answer to question `number`: one bit for each fingerprint."""
    bits = bytearray((len(held) + 7) // 8)
    for at, flag in enumerate(held):
        if flag:
            bits[at >> 3] |= 1 << (at & 7)
    return _HEAD.pack(HOLDINGS, number) + bytes(bits)


def read_holdings(message: bytes, asked: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """(held, not held) of what was asked. Corrupt if the answer has another length."""
    bits = message[_HEAD.size :]
    if len(bits) != (len(asked) + 7) // 8:
        raise Corrupt(f"an answer of {len(bits)} bytes about {len(asked)} chunks")
    held: list[bytes] = []
    lacking: list[bytes] = []
    for at, fp in enumerate(asked):
        (held if bits[at >> 3] >> (at & 7) & 1 else lacking).append(fp)
    return held, lacking


def number(message: bytes) -> int:
    """The number of a question or answer."""
    if len(message) < _HEAD.size:
        raise Corrupt("a chunk frame is cut short")
    return int(_HEAD.unpack_from(message)[1])


def ping(kind: int, token: int) -> bytes:
    """PING or PONG."""
    return _PING.pack(kind, token)


def read_ping(message: bytes) -> int:
    if len(message) != _PING.size:
        raise Corrupt("a ping of the wrong length")
    return int(_PING.unpack(message)[1])
