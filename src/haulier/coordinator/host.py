"""Opens the coordinator that a site runs, when it is first needed, and again after another one had its database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from haulier.agent.site import Site
from haulier.coordinator.backend import Backend, TakenOver
from haulier.coordinator.service import Coordinator
from haulier.errors import UsageError

T = TypeVar("T")


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
    from haulier.coordinator.postgres import PostgresBackend

    return PostgresBackend(database)


class Host:
    """Holds one `Coordinator`. A daemon serves whether or not the database can be reached; callers are told."""

    def __init__(self, open_: Callable[[], Backend]) -> None:
        self._open = open_
        self._lock = threading.Lock()
        self._current: Coordinator | None = None
        self._closed = False

    @staticmethod
    def of(site: Site, database: str = "") -> Host:
        return Host(lambda: open_backend(site, database))

    def use(self, work: Callable[[Coordinator], T]) -> T:
        """`work` with the coordinator, opened if need be. Raises what opening it raises."""
        coordinator = self._get()
        try:
            return work(coordinator)
        except TakenOver:
            with self._lock:
                if self._current is coordinator:
                    self._current = None
                    coordinator.backend.close()
            return work(self._get())

    def _get(self) -> Coordinator:
        with self._lock:
            if self._closed:
                raise UsageError("the coordinator was closed")
            if self._current is None:
                backend = self._open()
                try:
                    self._current = Coordinator(backend)
                except BaseException:
                    backend.close()
                    raise
            return self._current

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
