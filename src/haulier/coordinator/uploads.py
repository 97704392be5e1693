"""Manifests on their way to the coordinator, piece by piece, bounded in number and size. In memory: what a restart
takes is sent again. Not for several threads at once."""

from __future__ import annotations

from typing import Final

from haulier.coordinator.messages import ManifestPart

MOST: Final = 16
MOST_BYTES: Final = 512 << 20


class Uploads:
    """`add` returns where to go on, and the whole once it is there."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, bytes], bytearray] = {}

    def add(self, site: str, part: ManifestPart) -> tuple[int, bytes | None]:
        """Takes a piece if it is the next one. The oldest uploads make room for new ones."""
        key = (site, part.digest)
        data = self._parts.pop(key, bytearray())
        if part.at == len(data) and part.data and len(data) + len(part.data) <= part.total:
            data += part.data
        if len(data) == part.total:
            return part.total, bytes(data)
        self._parts[key] = data
        while len(self._parts) > 1 and (len(self._parts) > MOST or sum(map(len, self._parts.values())) > MOST_BYTES):
            del self._parts[next(iter(self._parts))]
        return len(data), None
