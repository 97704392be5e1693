"""Pages of a dump, taken from CRIU while it writes them: its files of pages are pipes with names.

A file in memory would have to be filled page by page with memory that a virtual host may first have to ask for. Through
a pipe CRIU hands over the processes' own pages, and they are copied once, beside it, into memory that is at hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.containers.images import PAGES_NAME
from haulier.containers.memory import populate
from haulier.errors import GuestError
from haulier.units import MIB, PAGE

MOST_PIPES: Final = 64
"""Of a container with more processes the other files of pages are plain ones."""
_PIPE: Final = MIB
_SLACK: Final = 4 * MIB
_POLL_MS: Final = 50


class ArrivingPages:
    """The files of pages of the one dump that is written to `folder` while the block lasts.

    `expected` are their names and how many bytes each will have, more or less; with `keep` False what comes is only
    counted. Plain files of these names are replaced.
    """

    def __init__(self, folder: Path, expected: Mapping[str, int], *, keep: bool = True) -> None:
        self._names: dict[int, str] = {}
        self._buffers: dict[str, mmap.mmap] = {}
        self._counted: dict[str, int] = {}
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._keep = keep
        self._scratch = bytearray(0 if keep else _PIPE)
        try:
            for name in list(expected)[:MOST_PIPES]:
                (folder / name).unlink(missing_ok=True)
                os.mkfifo(folder / name, 0o600)
                opened = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._names[opened] = name
                with contextlib.suppress(OSError):
                    fcntl.fcntl(opened, fcntl.F_SETPIPE_SZ, _PIPE)
                if keep:
                    self._buffers[name] = mmap.mmap(-1, expected[name] + _SLACK, flags=mmap.MAP_PRIVATE)
                    populate(self._buffers[name], expected[name])
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._run, name="pages", daemon=True)

    def __enter__(self) -> ArrivingPages:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._close()

    def result(self) -> dict[str, NDArray[np.uint8]]:
        """When the dump is whole: the pages of each file that CRIU opened, u8 (n, 4096). GuestError for half a page."""
        self._end()
        return {
            name: np.frombuffer(self._buffers[name], np.uint8, size).reshape(-1, PAGE)
            for name, size in self._counted.items()
        }

    def sizes(self) -> dict[str, int]:
        """When the dump is whole: bytes of each file that CRIU opened."""
        self._end()
        return dict(self._counted)

    def _end(self) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise GuestError(f"the pages of a dump did not come: {self._error}") from self._error
        for name, size in self._counted.items():
            if size % PAGE:
                raise GuestError(f"{name} of a dump ends within a page, after {size} bytes: try again")

    def _run(self) -> None:
        try:
            poll = select.poll()
            for opened in self._names:
                poll.register(opened, select.POLLIN)
            left = set(self._names)
            while left:
                # Asked before the look: what CRIU wrote before its end is there by then.
                over = self._over.is_set()
                ready = poll.poll(0 if over else _POLL_MS)
                for opened, what in ready:
                    # A pipe that nobody has opened yet says nothing; one that was closed again hangs up.
                    if not self._take(opened) and what & select.POLLHUP:
                        poll.unregister(opened)
                        left.discard(opened)
                if over and not ready:
                    return
        except BaseException as error:
            self._error = error

    def _take(self, opened: int) -> int:
        """Bytes that were read; 0 at its end."""
        name = self._names[opened]
        at = self._counted.setdefault(name, 0)
        if self._keep and at + _PIPE > len(self._buffers[name]):
            self._grow(name, at)
        place = memoryview(self._buffers[name])[at : at + _PIPE] if self._keep else memoryview(self._scratch)
        try:
            many = os.readv(opened, [place])
        except BlockingIOError:
            return 0
        finally:
            place.release()
        self._counted[name] = at + many
        return many

    def _grow(self, name: str, used: int) -> None:
        small = self._buffers[name]
        large = mmap.mmap(-1, 2 * len(small) + _SLACK, flags=mmap.MAP_PRIVATE)
        with memoryview(small) as view:
            large[:used] = view[:used]
        self._buffers[name] = large

    def _close(self) -> None:
        """Buffers stay for whoever has a result of them."""
        while self._names:
            os.close(self._names.popitem()[0])
        self._buffers = {}


def names_of(count: int) -> Iterable[str]:
    """The names that CRIU gives to the first `count` files of pages."""
    return (f"pages-{number}.img" for number in range(1, count + 1))


assert all(PAGES_NAME.fullmatch(name) for name in names_of(2))
