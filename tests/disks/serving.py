"""An ExportServer in a thread, over a store that is a dict, for tests of both ends of NBD."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haulier.chunks.fingerprint import ZERO, fingerprint
from haulier.chunks.manifest import Manifest
from haulier.disks.server import ExportServer
from haulier.errors import UnknownThing
from haulier.units import CHUNK


class DictStore(dict[bytes, bytes]):
    """Chunks by fingerprint; `gate` may hold up the reader of a chunk."""

    gate: Callable[[bytes], None] = staticmethod(lambda fp: None)

    def get(self, fp: bytes) -> bytes:  # type: ignore[override]
        self.gate(fp)
        try:
            return self[fp]
        except KeyError:
            raise UnknownThing("no such chunk") from None

    def read_now(self, fp: bytes, offset: int, length: int) -> bytes | None:
        return None

    def disk(self, chunks: Mapping[int, bytes], size: int) -> Manifest:
        """The manifest of a disk of `size` bytes that is zero but for `chunks`; they are stored."""
        table = [ZERO] * -(-size // CHUNK)
        for index, data in chunks.items():
            data = data + bytes(CHUNK - len(data))
            table[index] = fingerprint(data)
            self[table[index]] = data
        return Manifest(size, b"".join(table))


class Serving:
    """A running server; `call` runs a function in its loop."""

    def __init__(self, server: ExportServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self._loop = loop

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        async def run() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)


@contextmanager
def serving(store: DictStore, manifest: Manifest, path: Path, patience_s: float = 60.0) -> Iterator[Serving]:
    """Serve `manifest` on the unix socket `path`."""
    loop = asyncio.new_event_loop()
    server = ExportServer(store, manifest, patience_s)
    started = threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        listener = await loop.create_unix_server(server.connection, str(path))
        started.set()
        await stop.wait()
        listener.close()
        server.close()
        await asyncio.sleep(0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield Serving(server, loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        assert not thread.is_alive()
        loop.close()
