"""What the page codec leaves of a guest's memory to be compressed, batch by batch, and the files it is kept in."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from haulier.compress import StreamCompressor
from haulier.guests.command import RAM_ID
from haulier.memory.ahead import AheadReader
from haulier.memory.proxy import AHEAD_PAGES, SourceProxy
from haulier.units import PAGE

HEAD = struct.Struct("<Id")


class Batch(NamedTuple):
    """What is to be compressed, and the CPU seconds of the page codec before."""

    data: bytes
    encode_s: float


class Recorder(StreamCompressor):
    """Keeps what is to be compressed."""

    def __init__(self) -> None:
        super().__init__(-5, 20, False)
        self.batches: list[Batch] = []
        self._since = time.thread_time()

    def compress(self, *data: Any) -> bytes:
        encode_s = time.thread_time() - self._since
        self.batches.append(Batch(b"".join(bytes(memoryview(part).cast("B")) for part in data), encode_s))
        wire = super().compress(*data)
        self._since = time.thread_time()
        return wire


def encode_all(proxy: SourceProxy, ram: Path, enough: Callable[[], bool] = lambda: False) -> None:
    """Has all pages of a guest's memory file go through `proxy`, which is closed then."""
    reader = AheadReader(ram, RAM_ID)
    proxy.name({RAM_ID: reader.pages * PAGE})
    reader.plan_all()
    while not reader.done and not enough():
        assert proxy.mirror is not None
        numbers, pages = reader.take(proxy.mirror)
        for at in range(0, len(numbers), AHEAD_PAGES):
            proxy.ahead(RAM_ID, numbers[at : at + AHEAD_PAGES], pages[at : at + AHEAD_PAGES])
    reader.close()
    proxy.close()


def write(path: Path, batches: Sequence[Batch]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_bytes(b"".join(HEAD.pack(len(data), encode_s) + data for data, encode_s in batches))
    temporary.rename(path)


def read(path: Path) -> list[Batch]:
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size, encode_s = HEAD.unpack_from(data, at)
        at += HEAD.size
        found.append(Batch(data[at : at + size], encode_s))
        at += size
    return found
