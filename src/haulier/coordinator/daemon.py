"""`haulier coordinator run`: the coordinator in a process of its own, with the identity of the site whose root it has.

It listens at an address of its own, beside that site's agent or on a host that has no agent.
"""

from __future__ import annotations

import logging
from pathlib import Path

from haulier.agent.core import Core
from haulier.agent.routes import Route, sites
from haulier.agent.server import run_daemon
from haulier.agent.site import Site, split_address
from haulier.chunks.store import ChunkStore
from haulier.coordinator import routes
from haulier.coordinator.host import Host
from haulier.errors import HaulierError

log = logging.getLogger(__name__)


class CoordinatorDaemon:
    """See agent.server.Daemon. `listen` is HOST:PORT, "" for the site's own control address."""

    what = "coordinator"
    store: ChunkStore | None = None

    def __init__(self, site: Site, listen: str = "", database: str = "") -> None:
        self.site = site
        self.control = listen or site.control
        split_address(self.control)
        self.core = Core(site)
        self.journal = self.core.journal
        self.coordinator: Host | None = Host.of(site, database)

    @property
    def socket(self) -> Path:
        return self.site.run / "coordinator.sock"

    def routes(self) -> tuple[Route, ...]:
        return (*sites.FACTS, *routes.TABLE)

    def tidy(self) -> None:
        assert self.coordinator is not None
        try:
            self.coordinator.use(lambda coordinator: coordinator.database)
        except HaulierError as error:
            # callers are told the same until it can be reached
            log.error("%s", error)

    def recover(self) -> None:
        """Nothing: sites report by themselves."""

    def close(self) -> None:
        try:
            if self.coordinator is not None:
                self.coordinator.close()
        finally:
            self.core.close()


def run(root: Path, listen: str = "", database: str = "") -> None:
    """Runs the coordinator until SIGTERM or SIGINT."""
    run_daemon(Site.load(root), "coordinator", lambda site: CoordinatorDaemon(site, listen, database))
