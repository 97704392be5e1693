"""Fingerprints and manifests for tests of the coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from haulier.chunks.manifest import Manifest
from haulier.coordinator import messages as m
from haulier.coordinator.service import Coordinator
from haulier.coordinator.sqlite import SqliteBackend
from haulier.units import CHUNK


def fp(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def fps(numbers: Iterable[int]) -> list[bytes]:
    return [fp(number) for number in numbers]


def manifest(numbers: Iterable[int]) -> Manifest:
    table = b"".join(fps(numbers))
    return Manifest(len(table) // 32 * CHUNK, table)


class Clock:
    """Unix seconds, moved by hand."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def sqlite_coordinator(path: Path, clock: Clock | None = None) -> Coordinator:
    return Coordinator(SqliteBackend(path / "index.sqlite"), clock or Clock())


class Site:
    """What a site says to a coordinator, in the shortest form."""

    def __init__(self, coordinator: Coordinator, name: str) -> None:
        self.coordinator = coordinator
        self.name = name

    def hello(self) -> m.HelloAnswer:
        return self.coordinator.hello(self.name, m.HelloReport(control="127.0.0.1:1", bulk=["127.0.0.1"]))

    def report(
        self,
        added: Iterable[int] = (),
        removed: Iterable[int] = (),
        *,
        complete: Iterable[bytes] = (),
        replace: bool = False,
    ) -> m.HoldingsAnswer:
        answer = self.coordinator.holdings(
            self.name,
            m.HoldingsReport(
                base=self.hello().revision,
                replace=replace,
                complete=list(complete),
                added=m.join(fps(added)),
                removed=m.join(fps(removed)),
            ),
        )
        assert not answer.again
        return answer

    def has_manifest(self, name: str, numbers: Iterable[int], *, replace: bool = False) -> bytes:
        """Reports a manifest and sends it if it is asked for; its digest."""
        made = manifest(numbers)
        entry = m.ManifestEntry(name=name, digest=made.digest, size=made.size)
        answer = self.coordinator.manifests(self.name, m.ManifestsReport(manifests=[entry], replace=replace))
        if made.digest in answer.unknown:
            data = made.encode()
            part = m.ManifestPart(digest=made.digest, at=0, total=len(data), data=data)
            assert self.coordinator.manifest_part(self.name, part).complete
        return made.digest
