"""A dump's TCP connections, and what they may say at once when they are restored. Reads what CRIU wrote, no more.

What a restored connection had sent counts as sent, and its peer lacks some of it. The kernel knows no times of it, so
it sends again only when something new was answered, or after its timer: a second or more, for it knows no round trip
either. Nothing new is sent while the old fills the congestion window, which begins with ten segments. So the window of
such connections begins with what they had sent and a little more: the little is answered, with what is missing before.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from haulier.containers.protobuf import fields
from haulier.errors import Corrupt

LEAST_SEGMENT: Final = 500
"""Bytes: the kernel counts what is restored in segments of 536 less options, whatever the path takes."""
MORE: Final = 160
"""Segments beyond those: fewer than 64 KiB of them Linux would rather hold back for a larger one."""
MOST: Final = 1 << 14
_MAGICS: Final = struct.pack("<II", 0x54564319, 0x51465506)
_HEAD: Final = struct.Struct("<I")
_MOST_HEAD: Final = 4096
_OUTQ_LEN, _UNSQ_LEN = 3, 12
"""CRIU's images/tcp-stream.proto: all that waits to be acknowledged or sent; what of it was not sent yet."""


def unanswered(head: bytes) -> tuple[int, int]:
    """(bytes sent and not acknowledged, bytes not sent yet) by the beginning of a connection's file. Corrupt."""
    if head[: len(_MAGICS)] != _MAGICS or len(head) < len(_MAGICS) + _HEAD.size:
        raise Corrupt("no connection of a CRIU that is known: use CRIU 4")
    (size,) = _HEAD.unpack_from(head, len(_MAGICS))
    begin = len(_MAGICS) + _HEAD.size
    found = fields(head[begin : begin + size])
    whole, unsent = found.get(_OUTQ_LEN, 0), found.get(_UNSQ_LEN, 0)
    if size > len(head) - begin or not isinstance(whole, int) or not isinstance(unsent, int) or unsent > whole:
        raise Corrupt("a connection's file says something else than CRIU writes: use the same CRIU at both sites")
    return whole - unsent, unsent


def window(images: Path) -> int:
    """Segments with which the dump's connections are to begin; 0 where Linux's ten will do. Corrupt."""
    most = 0
    for path in images.glob("tcp-stream-*.img"):
        with path.open("rb") as file:
            sent, unsent = unanswered(file.read(_MOST_HEAD))
        if sent and unsent:
            most = max(most, sent)
    return min(MOST, most // LEAST_SEGMENT + MORE) if most else 0
