"""Chunks of a guest's disk that other sites hold, fetched at the target beside what the source sends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from haulier.agent.site import Site
from haulier.chunks.store import ChunkStore
from haulier.errors import HaulierError

log = logging.getLogger(__name__)
QUIET_S = 20.0
"""Other sites that give nothing for so long are not asked any more."""


class Elsewhere:
    """Asks the other sites for chunks from the end, while the source sends them from the beginning.

    Neither waits for the other. What has come is told to the source, which then does not send it.
    """

    def __init__(self, site: Site, source: str, store: ChunkStore, lease: str) -> None:
        self._site, self._source, self._store, self._lease = site, source, store, lease
        self._thread: threading.Thread | None = None
        self._enough = threading.Event()

    def fetch(self, lacking: list[bytes], came: Callable[[list[bytes]], None]) -> None:
        """Begins with `lacking` (fingerprints in disk order); `came` hears of each chunk that is here, in a thread."""
        self._thread = threading.Thread(target=self._fetch, args=(lacking[::-1], came), name="elsewhere", daemon=True)
        self._thread.start()

    def enough(self) -> None:
        """Nothing is lacking any more."""
        self._enough.set()

    def close(self) -> None:
        """Waits up to ten seconds for what is on its way."""
        self._enough.set()
        if self._thread is not None:
            self._thread.join(10)

    def _fetch(self, lacking: list[bytes], came: Callable[[list[bytes]], None]) -> None:
        # Most handoffs ask nobody else, and their workers start without this.
        from haulier.fetch.fetching import fetch
        from haulier.fetch.holders import hints_for, sources_of

        try:
            sources = sources_of(self._site, exclude={self._source})
            if not sources:
                return
            report = fetch(
                lacking,
                sources,
                self._store,
                lease=self._lease,
                cancelled=self._enough.is_set,
                hints=hints_for(self._site, lacking),
                on_kept=lambda fp: came([fp]),
                stall_s=QUIET_S,
            )
            log.info("%d chunks of the base came from %s", report.chunks, [s.name for s in report.sources if s.chunks])
        except HaulierError as error:
            # The source sends whatever did not come.
            log.info("chunks from other sites: %s", error)
