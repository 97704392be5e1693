"""As much of the protocol buffers' encoding as CRIU's messages take: numbers, texts, messages in messages. Pure."""

from __future__ import annotations

from haulier.errors import Corrupt


def field(number: int, value: int | str | bytes) -> bytes:
    """One field: a number that is not negative, a text, or an encoded message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends). Corrupt when the data ends before."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Corrupt("a message of CRIU is cut short")


def fields(data: bytes) -> dict[int, int | bytes]:
    """The last value of each field: numbers, and bytes of texts and messages. Corrupt for anything else."""
    found: dict[int, int | bytes] = {}
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == 0:
            found[tag >> 3], at = read_varint(data, at)
        elif tag & 7 == 2:
            size, at = read_varint(data, at)
            if at + size > len(data):
                raise Corrupt("a message of CRIU is cut short")
            found[tag >> 3] = data[at : at + size]
            at += size
        elif tag & 7 in (1, 5):
            size = 8 if tag & 7 == 1 else 4
            found[tag >> 3] = data[at : at + size]
            at += size
        else:
            raise Corrupt("a message of CRIU holds what is not known here: use the same CRIU at both sites")
    return found
