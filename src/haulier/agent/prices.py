"""What fetching a chunk again would cost: asked of the coordinator where there is one, else of the other sites.

Answers are hints. They make a policy choose better or worse and decide nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Final

from haulier.agent.core import Core
from haulier.agent.site import Site
from haulier.coordinator.client import CoordinatorClient
from haulier.errors import HaulierError
from haulier.handoff.journal import SiteRow
from haulier.policy.coordinated import Facts
from haulier.units import CHUNK

log = logging.getLogger(__name__)

UNKNOWN_S: Final = 8 / 1e6
"""Seconds a byte for what nobody is known to have: 1 Mbps, dearer than any link that is worth having."""
MEASURED_FOR_S: Final = 600.0
ASK_MOST: Final = 131_072
"""Chunks that other sites are asked about: 4 MiB of fingerprints to each."""


class Prices:
    """Facts of chunks, for this site."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._rates: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def of(self, fps: list[bytes]) -> dict[bytes, Facts]:
        """Facts of each of `fps`."""
        if not fps:
            return {}
        try:
            coordinator = CoordinatorClient.of(Site.load(self._core.site.root))
            if coordinator is not None:
                return self._told(fps, coordinator)
        except HaulierError as error:
            log.info("the coordinator cannot say what chunks cost: %s", error)
        return self._from_sites(fps)

    def _told(self, fps: list[bytes], coordinator: CoordinatorClient) -> dict[bytes, Facts]:
        told = coordinator.facts(fps, self._core.site.name)
        return {  # it counts this site's own copy too
            fp: Facts(min(each.refetch_s / CHUNK, UNKNOWN_S), max(each.copies - 1, 0), each.popularity, each.plan)
            for fp, each in zip(fps, told, strict=True)
        }

    def _from_sites(self, fps: list[bytes]) -> dict[bytes, Facts]:
        copies: Counter[bytes] = Counter()
        best: dict[bytes, float] = {}
        asked = fps[:ASK_MOST]
        others = [row for row in self._core.journal.sites() if row.name != self._core.site.name]
        for row in others if asked else ():
            try:
                client = self._core.peer(row.name)
                rate = self._rate(row)
                lacking = set(client.lacking(asked))
            except HaulierError as error:
                log.info("what site %s has is not known: %s", row.name, error)
                continue
            for at, fp in enumerate(asked):
                if at not in lacking:
                    copies[fp] += 1
                    best[fp] = min(best.get(fp, UNKNOWN_S), 8 / rate)
        return {fp: Facts(best.get(fp, UNKNOWN_S), copies[fp]) for fp in fps}

    def _rate(self, row: SiteRow) -> float:
        """Bits a second from another site, as measured within the last minutes."""
        with self._lock:
            known = self._rates.get(row.name)
        if known is not None and time.monotonic() - known[0] < MEASURED_FOR_S:
            return known[1]
        rate, _ = self._core.peer(row.name).measure()
        with self._lock:
            self._rates[row.name] = (time.monotonic(), max(rate, 1.0))
        return max(rate, 1.0)
