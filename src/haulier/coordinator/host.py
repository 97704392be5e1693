"""Opens the coordinator that a site runs, when it is first needed, and again after another one had its database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Final, TypeVar

from haulier.agent.site import Site
from haulier.coordinator.backend import Backend, TakenOver
from haulier.coordinator.service import Coordinator
from haulier.errors import HaulierError, PeerError, Unsupported, UsageError

T = TypeVar("T")

_AT_ONCE: Final = 16
"""An agent that has the coordinator in it needs its other threads for guests."""
_WAIT_S: Final = 1.0
_FAILED_S: Final = 2.0
"""For so long those who come after a failure to open are told the same."""


def open_backend(site: Site, database: str = "") -> Backend:
    """The database named by a URL, or by ``database`` in site.toml, or else a file of the site.

    UsageError for another kind of URL, Unsupported if psycopg is not installed; otherwise raises as a `Backend`.
    """
    database = database or site.database
    if not database:
        from haulier.coordinator.sqlite import SqliteBackend

        return SqliteBackend(site.root / "coordinator" / "index.sqlite")
    if not database.startswith(("postgresql://", "postgres://")):
        raise UsageError(f"bad database {database[:20]!r}: give postgresql://..., or nothing for a file of this site")
    needs_psycopg()
    from haulier.coordinator.postgres import PostgresBackend

    return PostgresBackend(database)


def needs_psycopg() -> None:
    """Unsupported where the driver for PostgreSQL is not installed."""
    if find_spec("psycopg") is None:
        raise Unsupported("PostgreSQL needs psycopg: install haulier with its extra, 'haulier[postgres]'")


class Host:
    """Holds one `Coordinator`. A daemon serves whether or not the database can be reached; callers are told."""

    def __init__(self, open_: Callable[[], Backend]) -> None:
        self._open = open_
        self._lock = threading.Lock()
        self._current: Coordinator | None = None
        self._closed = False
        self._failed: tuple[float, HaulierError] | None = None
        self._places = threading.BoundedSemaphore(_AT_ONCE)

    @staticmethod
    def of(site: Site, database: str = "") -> Host:
        return Host(lambda: open_backend(site, database))

    def use(self, work: Callable[[Coordinator], T]) -> T:
        """`work` with the coordinator, opened if need be. Raises what opening it raises, PeerError when it is busy."""
        if not self._places.acquire(timeout=_WAIT_S):
            raise PeerError("the coordinator has too much to do, or waits for its database: try again later")
        try:
            coordinator = self._get()
            try:
                return work(coordinator)
            except TakenOver:
                with self._lock:
                    if self._current is coordinator:
                        self._current = None
                        coordinator.backend.close()
                return work(self._get())
        finally:
            self._places.release()

    def _get(self) -> Coordinator:
        with self._lock:
            if self._closed:
                raise UsageError("the coordinator was closed")
            if self._current is None:
                if self._failed is not None and time.monotonic() < self._failed[0]:
                    raise self._failed[1]
                try:
                    self._current = self._make()
                except HaulierError as error:
                    self._failed = (time.monotonic() + _FAILED_S, error)
                    raise
                self._failed = None
            return self._current

    def _make(self) -> Coordinator:
        backend = self._open()
        try:
            return Coordinator(backend)
        except BaseException:
            backend.close()
            raise

    def close(self) -> None:
        """Saves what is to be saved, if that is possible."""
        with self._lock:
            self._closed = True
            current, self._current = self._current, None
        if current is not None:
            try:
                current.close()
            finally:
                current.backend.close()
