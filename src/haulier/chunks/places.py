"""What one process remembers of places: open packs, checked locations, decompressed chunks.

A location is good for one *generation*, a counter in a mapping that all processes of a store share. A collection
deletes rows, moves the counter on, then punches holes. A reader compares the counter after it has read: if it moved,
the bytes may be zeros of a hole, and the index is asked again.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

from haulier.chunks.packs import HEADER, RAW, Location, Pack
from haulier.units import CHUNK, MIB

_WARM_MOST: Final = 131_072  # locations, about 230 bytes each; 8 GiB of disk
_DECODED_MOST: Final = 32 * MIB // CHUNK
_PACKS_MOST: Final = 256

_Warm = dict[bytes, tuple[int, int]]
"""Chunk -> (pack, offset of the payload). By number: a pack can be closed, and opened again, under its locations."""
Generation = tuple[bytes, int]


class Places:
    """Reads of checked chunks take no lock: the pair of generation and locations is replaced as one."""

    def __init__(self, generation: Path, packs: Path) -> None:
        self._packs = packs
        with open(generation, "a+b") as file:
            if file.seek(0, os.SEEK_END) < 8:
                file.truncate(0)
                file.write(bytes(8))
                file.flush()
            self._counter = mmap.mmap(file.fileno(), 8)
        self._seen: tuple[bytes, _Warm] = (self._counter[:8], {})
        self._forgotten = 0
        self._open: dict[int, Pack] = {}
        self._decoded: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def generation(self) -> Generation:
        """The counter as it is now, and how often this process forgot everything."""
        return self._counter[:8], self._forgotten

    def advance(self) -> None:
        """Make every process forget its locations. Only under the lock of a collection."""
        number = int.from_bytes(self._counter[:8], "little") + 1
        self._counter[:8] = (number % (1 << 64)).to_bytes(8, "little")

    def read(self, fp: bytes, offset: int, length: int) -> bytes | None:
        """Bytes of a chunk that this process has checked before; None when it has not, or must look again."""
        seen = self._seen
        known = seen[1].get(fp)
        if known is not None:
            try:
                pack = self._open.get(known[0]) or self.pack(known[0])
                data = os.pread(pack.fd, length, known[1] + offset)
            except OSError:
                return None
            if self._counter[:8] == seen[0] and self._seen is seen and len(data) == length:
                return data
        return self._from_decoded(fp, offset, length) if self._decoded else None

    def read_into(self, fp: bytes, offset: int, into: memoryview) -> bool:
        """Like `read`, without a copy; False leaves `into` undefined."""
        seen = self._seen
        known = seen[1].get(fp)
        if known is not None:
            try:
                pack = self._open.get(known[0]) or self.pack(known[0])
                count = os.preadv(pack.fd, (into,), known[1] + offset)
            except OSError:
                return False
            if self._counter[:8] == seen[0] and self._seen is seen and count == len(into):
                return True
        data = self._from_decoded(fp, offset, len(into)) if self._decoded else None
        if data is not None:
            into[:] = data
        return data is not None

    def read_now(self, fp: bytes, offset: int, length: int) -> bytes | None:
        """Like `read`, but None as well when the bytes are not in memory: never waits for a disk."""
        seen = self._seen
        known = seen[1].get(fp)
        if known is None:
            return self._from_decoded(fp, offset, length) if self._decoded else None
        pack = self._open.get(known[0])
        if pack is None:
            return None
        data = bytearray(length)
        try:
            count = os.preadv(pack.fd, (data,), known[1] + offset, os.RWF_NOWAIT)
        except OSError:
            return None  # not in memory, or a file system that cannot tell
        if count == length and self._counter[:8] == seen[0] and self._seen is seen:
            return bytes(data)
        return None

    def _from_decoded(self, fp: bytes, offset: int, length: int) -> bytes | None:
        with self._lock:
            data = self._decoded.get(fp)
            if data is None:
                return None
            self._decoded.move_to_end(fp)
        return data[offset : offset + length]

    def pack(self, number: int) -> Pack:
        """A pack, open: the same for all who read it. Raises OSError."""
        with self._lock:
            pack = self._open.get(number)
            if pack is None:
                # The one opened first goes, once its readers end: who needs it again pays for no more than an open.
                while len(self._open) >= _PACKS_MOST:
                    del self._open[next(iter(self._open))]
                pack = self._open[number] = Pack(self._packs, number)
        return pack

    def remember(self, generation: Generation, fp: bytes, at: Location, data: bytes) -> None:
        """Keep a location whose chunk was checked (of a compressed one, the chunk).

        `generation` is what it was before the index was asked; if it has moved since, nothing is kept.
        """
        with self._lock:
            if at.codec != RAW:
                self._decoded[fp] = data
                if len(self._decoded) > _DECODED_MOST:
                    self._decoded.popitem(last=False)
                return
            if self.generation() != generation:
                return
            if self._seen[0] != generation[0]:
                self._seen = (generation[0], {})
                self._open = {}  # lets go of packs that are gone
            warm = self._seen[1]
            if len(warm) >= _WARM_MOST:
                warm.pop(next(iter(warm)), None)
            warm[fp] = (at.pack, at.offset + HEADER)

    def forget(self) -> None:
        """Forget everything, and close the packs as their readers end."""
        with self._lock:
            self._forgotten += 1
            self._seen = (self._counter[:8], {})
            self._open = {}
            self._decoded.clear()
