"""Sizes that every part agrees on, in bytes."""

from typing import Final

PAGE: Final = 4096
"""A page of guest memory."""
BLOCK: Final = 4096
"""A block of a disk: the unit of recipes and of references from memory to disk."""
CHUNK: Final = 65536
"""A chunk of a disk: the unit of manifests, of the store and of dirty bitmaps (= qcow2 cluster)."""
BLOCKS_PER_CHUNK: Final = CHUNK // BLOCK
FINGERPRINT: Final = 32
"""Length of a fingerprint (BLAKE3-256)."""
MIB: Final = 1 << 20
MAX_DISK: Final = 1 << 40
"""The largest disk that is handled: its manifest takes 512 MiB of memory."""
