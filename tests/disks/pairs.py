"""Two sites with a disk transfer between them, in one process: messages cross a queue, handled by a thread a side."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haulier.chunks.blocks import BlockIndex, BlockSpace
from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.disks.transfer import DiskReceiver, DiskSender
from haulier.errors import HaulierError
from haulier.units import CHUNK


class Lane:
    """Messages in one direction, in order; `tap` sees and may change each on its way."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue()
        self.to: Callable[[bytes], None] = lambda message: None
        self.tap: Callable[[bytes], bytes] = lambda message: message
        self.messages: list[int] = []
        self.errors: list[HaulierError] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, message: bytes) -> None:
        assert isinstance(message, bytes)
        self.messages.append(len(message))
        self._queue.put(self.tap(message))

    def _run(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self.to(message)
            except HaulierError as error:
                self.errors.append(error)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(20)
        assert not self._thread.is_alive()


class Pair:
    """Source and target; `disk` at the source is a dict of chunks that differ from `base`."""

    def __init__(
        self,
        root: Path,
        source: ChunkStore,
        target: ChunkStore,
        base: Manifest,
        shared: list[bytes],
        **of_receiver: Any,
    ) -> None:
        self.source, self.target, self.base = source, target, base
        self.there, self.back = Lane(), Lane()
        self.commits: list[tuple[bytes, bool]] = []
        spaces = [BlockSpace(store) for store in (source, target)]
        for space in spaces:
            space.append(shared)
        self.spaces = spaces
        index = BlockIndex.build(source, shared)
        self.sender = DiskSender(
            source, base, spaces[0], index, self.there.send, "handoff/1", window_log=20, patience_s=20
        )
        self.receiver = DiskReceiver(
            target, base, spaces[1], self.back.send, "handoff/1", manifest_name="guest/web1",
            on_commit=lambda manifest, final: self.commits.append((manifest.digest, final)),
            **of_receiver,
        )  # fmt: skip
        self.there.to, self.back.to = self.receiver.handle, self.sender.handle

    def close(self) -> None:
        self.there.close()
        self.back.close()

    def check_equal(self) -> None:
        """The target has, durably, what the source says its disk is."""
        want = self.sender.manifest
        assert self.sender.committed == want == self.receiver.manifest
        assert self.target.load_manifest("guest/web1") == want
        fresh = ChunkStore(self.target.path)
        try:
            for fp in want.unique():
                assert fingerprint(fresh.get(fp)) == fp
        finally:
            fresh.close()
        assert self.sender.committed_chunks == self.receiver.committed_chunks
        assert len(self.spaces[0]) == len(self.spaces[1])
        for position in range(len(self.spaces[0])):
            assert self.spaces[0].fingerprint(position) == self.spaces[1].fingerprint(position)


def put_disk(store: ChunkStore, chunks: dict[int, bytes], size: int) -> Manifest:
    table = [ZERO] * -(-size // CHUNK)
    for index, data in chunks.items():
        table[index] = store.put(data)
    store.commit()
    return Manifest(size, b"".join(table))


@contextmanager
def pair(
    root: Path,
    chunks: dict[int, bytes],
    size: int,
    at_target: set[int] | None = None,
    shared: list[int] | None = None,
    **of_receiver: Any,
) -> Iterator[Pair]:
    """Both have the base manifest; the target holds only the chunks `at_target` of it (default: all)."""
    source, target = ChunkStore(root / "source"), ChunkStore(root / "target")
    base = put_disk(source, chunks, size)
    put_disk(target, {n: d for n, d in chunks.items() if at_target is None or n in at_target}, size)
    space = [base[n] for n in (sorted(chunks) if shared is None else shared)]
    made = Pair(root, source, target, base, space, **of_receiver)
    try:
        yield made
    finally:
        made.close()
        source.close()
        target.close()
