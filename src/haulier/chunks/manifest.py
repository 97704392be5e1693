"""Manifests: which chunks make up a disk, and what changed from one manifest to the next.

The bytes are described in docs/formats/manifests.md. A manifest's digest is taken over its plain form, never over
compressed bytes, so that two sites with different releases of zstd agree on it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from haulier.chunks.fingerprint import ZERO
from haulier.compress import zstd
from haulier.errors import Corrupt, UsageError
from haulier.units import CHUNK, FINGERPRINT, MAX_DISK

"""Largest disk, in bytes. Bounds what decoding a hostile manifest can cost (32 bytes a chunk: 512 MiB)."""
SECTOR: Final = 512

_VERSION: Final = 1
_MANIFEST: Final = struct.Struct("<4sB3xQII32s")  # magic, version, size, stored fingerprints, body length, digest
_DELTA: Final = struct.Struct("<4sB3xII32s32s")  # magic, version, changes, body length, old digest, new digest
_MANIFEST_MAGIC: Final = b"HMAN"
_DELTA_MAGIC: Final = b"HMDL"
_PLAIN: Final = b"haulier manifest\x01"
_LEVEL: Final = 1  # fingerprints do not compress; only the columns of flags and gaps do


class Manifest:
    """The fingerprints of a disk of `size` bytes, in order. Immutable; equal when the digests are.

    `size` is positive, a multiple of 512, at most MAX_DISK. `fingerprints` holds 32 bytes for each chunk of the disk,
    the last chunk counted whole. Raises UsageError when they do not fit each other.
    """

    __slots__ = ("_digest", "_fingerprints", "_size", "_unique")

    def __init__(self, size: int, fingerprints: bytes) -> None:
        if not 0 < size <= MAX_DISK or size % SECTOR:
            raise UsageError(f"a disk of {size} bytes: give a positive multiple of {SECTOR}, at most {MAX_DISK}")
        if len(fingerprints) != chunks_of(size) * FINGERPRINT:
            raise UsageError(
                f"a disk of {size} bytes has {chunks_of(size)} chunks of {FINGERPRINT}-byte fingerprints;"
                f" {len(fingerprints)} bytes were given"
            )
        self._size = size
        self._fingerprints = bytes(fingerprints)
        self._digest: bytes | None = None
        self._unique: frozenset[bytes] | None = None

    @classmethod
    def zero(cls, size: int) -> Manifest:
        """The manifest of a disk of zeros."""
        return cls(size, ZERO * chunks_of(size))

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    @property
    def fingerprints(self) -> bytes:
        """All fingerprints, 32 bytes each, in the order of the disk."""
        return self._fingerprints

    @property
    def digest(self) -> bytes:
        """BLAKE3-256 of the plain form: what two sites compare."""
        if self._digest is None:
            plain = blake3(_PLAIN + self._size.to_bytes(8, "little"))
            self._digest = plain.update(self._fingerprints).digest()
        return self._digest

    def __len__(self) -> int:
        return len(self._fingerprints) // FINGERPRINT

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"chunk {index} of a manifest of {len(self)}")
        return self._fingerprints[index * FINGERPRINT : (index + 1) * FINGERPRINT]

    def chunks(self) -> Iterator[bytes]:
        """Each chunk's fingerprint, in order."""
        raw = self._fingerprints
        return (raw[at : at + FINGERPRINT] for at in range(0, len(raw), FINGERPRINT))

    __iter__ = chunks

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manifest):
            return NotImplemented
        return self._size == other._size and self._fingerprints == other._fingerprints

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<Manifest {self.digest[:6].hex()} of {self._size} bytes>"

    def unique(self) -> frozenset[bytes]:
        """Each fingerprint once, without ZERO: the chunks that a store must hold."""
        if self._unique is None:
            # Most of a disk is often zero; this stands in the way of a stopped guest, so no loop over all of it.
            words = np.frombuffer(self._fingerprints, dtype="<u8").reshape(-1, FINGERPRINT // 8)
            stored = (words != np.frombuffer(ZERO, dtype="<u8")).any(axis=1)
            self._unique = frozenset(np.frombuffer(self._fingerprints, dtype=f"V{FINGERPRINT}")[stored].tolist())
        return self._unique

    def changed(self, other: Manifest) -> list[int]:
        """Ascending indexes at which the two differ. Raises UsageError for disks of different sizes."""
        if self._size != other._size:
            raise UsageError(f"manifests of {self._size} and of {other._size} bytes cannot be compared")
        return [int(i) for i in np.flatnonzero((_rows(self._fingerprints) != _rows(other._fingerprints)).any(axis=1))]

    def replace(self, changes: Mapping[int, bytes]) -> Manifest:
        """A manifest with other fingerprints at the given indexes. Raises UsageError for a bad index or fingerprint."""
        table = bytearray(self._fingerprints)
        count = len(self)
        for index, fp in changes.items():
            if not 0 <= index < count or len(fp) != FINGERPRINT:
                raise UsageError(f"chunk {index} of a manifest of {count}, fingerprint of {len(fp)} bytes")
            table[index * FINGERPRINT : (index + 1) * FINGERPRINT] = fp
        return Manifest(self._size, bytes(table))

    def encode(self) -> bytes:
        """The compressed form; `decode` is its inverse."""
        stored, body = _pack(_rows(self._fingerprints))
        return _MANIFEST.pack(_MANIFEST_MAGIC, _VERSION, self._size, stored, len(body), self.digest) + body

    @classmethod
    def decode(cls, data: bytes, max_size: int = MAX_DISK) -> Manifest:
        """The manifest in `data`. Raises Corrupt unless every byte is as it should be and the disk <= `max_size`."""
        size, stored, length, digest = _header(_MANIFEST, _MANIFEST_MAGIC, data, "manifest")
        if not 0 < size <= min(max_size, MAX_DISK) or size % SECTOR:
            raise Corrupt(f"manifest of a disk of {size} bytes: at most {max_size}, in sectors; ask for it again")
        table = _unpack(data[_MANIFEST.size :], length, chunks_of(size), stored, 0, "manifest")[1]
        manifest = cls(size, table)
        if manifest.digest != digest:
            raise Corrupt("manifest does not match its digest; ask for it again")
        return manifest


HEADER: Final = _MANIFEST.size


def peek(head: bytes) -> tuple[int, bytes]:
    """(bytes of the disk, digest) from the first HEADER bytes of an encoded manifest, unchecked. Raises Corrupt."""
    size, _, _, digest = _header(_MANIFEST, _MANIFEST_MAGIC, head, "manifest")
    return int(size), bytes(digest)


def chunks_of(size: int) -> int:
    """Number of chunks of a disk of `size` bytes."""
    return -(-size // CHUNK)


def encode_delta(old: Manifest, changes: Mapping[int, bytes]) -> bytes:
    """What turns `old` into `old.replace(changes)`; names the digests of both. Raises UsageError like `replace`."""
    new = old.replace(changes)
    indexes = sorted(changes)
    gaps = np.diff(np.array(indexes, dtype="<u4"), prepend=np.uint32(0)).astype("<u4").tobytes()
    rows = _rows(b"".join(changes[index] for index in indexes))
    body = _pack(rows, gaps)[1]
    return _DELTA.pack(_DELTA_MAGIC, _VERSION, len(indexes), len(body), old.digest, new.digest) + body


def apply_delta(old: Manifest, delta: bytes) -> Manifest:
    """The manifest after `delta`. Raises Corrupt when the delta is malformed, or made for another manifest."""
    count, length, before, after = _header(_DELTA, _DELTA_MAGIC, delta, "manifest delta")
    if before != old.digest:
        raise Corrupt(
            f"manifest delta was made for manifest {before[:6].hex()}, not for {old.digest[:6].hex()};"
            " ask for the whole manifest"
        )
    if count > len(old):
        raise Corrupt(f"manifest delta changes {count} of {len(old)} chunks; ask for the whole manifest")
    gaps, table = _unpack(delta[_DELTA.size :], length, count, None, 4 * count, "manifest delta")
    steps = np.frombuffer(gaps, dtype="<u4").astype(np.int64)
    indexes = np.cumsum(steps)
    if count and (int(indexes[-1]) >= len(old) or (steps[1:] == 0).any()):
        raise Corrupt("manifest delta names a chunk twice or beyond the disk; ask for the whole manifest")
    rows = _rows(old.fingerprints).copy()
    rows[indexes] = _rows(table)
    new = Manifest(old.size, rows.tobytes())
    if new.digest != after:
        raise Corrupt("manifest delta does not lead to the manifest it names; ask for the whole manifest")
    return new


def _rows(table: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(table, dtype=np.uint8).reshape(-1, FINGERPRINT)


def _header(layout: struct.Struct, magic: bytes, data: bytes, what: str) -> tuple[Any, Any, Any, Any]:
    """The four fields after the version, having checked length, magic and version."""
    if len(data) < layout.size:
        raise Corrupt(f"{what} of {len(data)} bytes is cut short; ask for it again")
    found, version, *fields = layout.unpack_from(data)
    if found != magic:
        raise Corrupt(f"this is no {what}: it starts with {found!r}")
    if version != _VERSION:
        raise Corrupt(f"{what} of version {version}, known is {_VERSION}; update haulier at this site")
    return tuple(fields)


def _pack(rows: NDArray[np.uint8], prefix: bytes = b"") -> tuple[int, bytes]:
    """(fingerprints stored, compressed columns): prefix, one bit a row (0 = ZERO), fingerprints other than ZERO."""
    stored = (rows != np.frombuffer(ZERO, dtype=np.uint8)).any(axis=1)
    bits = np.packbits(stored, bitorder="little").tobytes()
    return int(stored.sum()), zstd.compress(prefix + bits + rows[stored].tobytes(), _LEVEL)


def _unpack(body: bytes, length: int, count: int, stored: int | None, prefix: int, what: str) -> tuple[bytes, bytes]:
    """(prefix, fingerprints of `count` rows). Never inflates to more than `count` rows can take."""
    if len(body) != length:
        raise Corrupt(f"{what} has a body of {len(body)} bytes and should have {length}; ask for it again")
    head = prefix + (count + 7) // 8
    most = head + FINGERPRINT * (count if stored is None else min(stored, count))
    engine = zstd.ZstdDecompressor()
    try:
        plain = engine.decompress(body, most + 1)
    except zstd.ZstdError as error:
        raise Corrupt(f"{what} does not decompress ({error}); ask for it again") from None
    if not engine.eof or engine.unused_data or not head <= len(plain) <= most:
        raise Corrupt(f"{what} has columns of the wrong length; ask for it again")
    flags = np.unpackbits(np.frombuffer(plain[prefix:head], dtype=np.uint8), bitorder="little")
    if flags[count:].any():
        raise Corrupt(f"{what} has flags beyond its last chunk; ask for it again")
    present = flags[:count].astype(bool)
    if len(plain) != head + FINGERPRINT * int(present.sum()) or stored not in (None, int(present.sum())):
        raise Corrupt(f"{what} has columns that do not match each other; ask for it again")
    rows = np.empty((count, FINGERPRINT), dtype=np.uint8)
    rows[:] = np.frombuffer(ZERO, dtype=np.uint8)
    rows[present] = _rows(plain[head:])
    return plain[:prefix], rows.tobytes()
