"""The files of a CRIU dump: which of them hold pages, and whose pages these are. Parsers of what CRIU wrote here.

A pages file is pages one after the other and nothing else; the pagemap files that name it say, in the same order, which
addresses they are from. Formats: CRIU's images/pagemap.proto and its documentation of the image format.
"""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from haulier.containers.memory import Key
from haulier.containers.protobuf import fields
from haulier.errors import Corrupt
from haulier.units import PAGE

_MAGICS: Final = struct.pack("<II", 0x54564319, 0x56084025)
_PRESENT: Final = 4
_SIZE: Final = struct.Struct("<I")
PAGES_NAME: Final = re.compile(r"pages-(\d{1,9})\.img")
_MAP_NAME: Final = re.compile(r"pagemap-(shmem-)?(\d{1,18})\.img")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,120}")
"""Names of files of a dump that are taken from another site."""


@dataclass(frozen=True)
class PagesOf:
    """A pages file: for each of its stretches, whose it is and its page numbers there."""

    name: str
    stretches: list[tuple[Key, NDArray[np.int64]]]

    @property
    def count(self) -> int:
        return sum(len(pages) for _, pages in self.stretches)


def pages_of(folder: Path, sizes: Mapping[str, int] | None = None) -> list[PagesOf]:
    """The pages files that a dump's maps name. Corrupt when maps and pages do not fit each other.

    `sizes` in bytes of those that went through pipes, by their names.
    """
    stretches: dict[int, list[tuple[Key, NDArray[np.int64]]]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (len(path.name), path.name)):
        match = _MAP_NAME.fullmatch(path.name)
        if match is None:
            continue
        key = ("s" if match[1] else "p", int(match[2]))
        number, runs = _pagemap(path)
        pages = [np.arange(first, first + count, dtype=np.int64) for first, count in runs]
        if pages:
            stretches.setdefault(number, []).append((key, np.concatenate(pages)))
    found = []
    for path in sorted(folder.iterdir()):
        match = PAGES_NAME.fullmatch(path.name)
        if match is None:
            continue
        status = path.stat()
        size = (sizes or {}).get(path.name, status.st_size)
        if int(match[1]) not in stretches and (
            size or (stat.S_ISFIFO(status.st_mode) and path.name not in (sizes or {}))
        ):
            # Of an earlier dump in the same place, or a pipe that was not needed.
            continue
        made = PagesOf(path.name, stretches.get(int(match[1]), []))
        if made.count * PAGE != size:
            raise Corrupt(f"{path} has {size} bytes, its maps name {made.count} pages: try again")
        found.append(made)
    return found


def _pagemap(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """(number of its pages file, (first page, pages) of each run that the file holds)."""
    data = path.read_bytes()
    if data[: len(_MAGICS)] != _MAGICS:
        raise Corrupt(f"{path} is no page map of a CRIU that is known: use CRIU 4")
    messages = list(_messages(data, len(_MAGICS)))
    if not messages:
        raise Corrupt(f"{path} is empty")
    number = messages[0].get(1, -1)
    runs = []
    for entry in messages[1:]:
        if entry.get(4, _PRESENT) & _PRESENT and not entry.get(3, 0):
            runs.append((entry.get(1, 0) // PAGE, entry.get(5, 0) or entry.get(2, 0)))
    return number, runs


def _messages(data: bytes, at: int) -> Iterator[dict[int, int]]:
    while at < len(data):
        (size,) = _SIZE.unpack_from(data, at)
        at += _SIZE.size
        yield _numbers(data[at : at + size])
        at += size


def _numbers(data: bytes) -> dict[int, int]:
    """Numbers by field of a message that holds nothing else."""
    found = fields(data)
    if not all(isinstance(value, int) for value in found.values()):
        raise Corrupt("a page map of a newer CRIU holds what is not known here: use the same CRIU at both sites")
    return {number: int(value) for number, value in found.items()}
