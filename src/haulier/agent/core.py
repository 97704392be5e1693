"""What the parts of one agent share. Everything here is blocking and may be used from any thread."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from haulier.agent import joining
from haulier.agent.client import Client
from haulier.agent.jobs import Jobs
from haulier.agent.site import Site
from haulier.errors import Conflict, HaulierError, NotTrusted, UnknownThing
from haulier.handoff.journal import Journal, SiteRow

_REFRESH_EVERY_S = 5.0

SETTLING_S: Final = 5.0
BRIEF_S: Final = 20.0
_POLL_S: Final = 0.02


def ownership_of(guest: str) -> str:
    """What `alone` knows messages about a guest's ownership by, which come while other things are done with it."""
    return f"ownership of {guest}"


class Core:
    """One site, its journal, its jobs, and the knowledge of other sites."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.journal = Journal(site.journal)
        self.jobs = Jobs()
        self.started = time.time()
        self.children: list[subprocess.Popen[bytes]] = []
        """Workers that this process started: their ends have to be waited for."""
        self.reload: Callable[[], object] = lambda: None
        """Has who connects from now on see the certificate that is there now: set by who listens."""
        self.asking = threading.Lock()
        """QEMU serves one connection of the agent at a time."""
        self._busy: dict[str, str] = {}
        self._brief: set[str] = set()
        self._busy_lock = threading.Lock()
        self._refresh_lock = threading.Lock()
        self._refreshed = float("-inf")

    def close(self) -> None:
        self.journal.close()

    # -- other sites

    def refresh_sites(self) -> None:
        """Asks the issuer for the list of sites, at most every few seconds; silent where it does not answer."""
        with self._refresh_lock:
            if time.monotonic() - self._refreshed < _REFRESH_EVERY_S:
                return
            self._refreshed = time.monotonic()
            try:
                joining.refresh(self.site, self.journal)
            except HaulierError:
                return

    def known_site(self, name: str) -> SiteRow:
        """UnknownThing if it is not of the fleet, as far as can be learnt now."""
        row = self.journal.find_site(name)
        if row is None:
            self.refresh_sites()
            row = self.journal.site(name)
        return row

    def other_site(self, name: str) -> SiteRow:
        """Like `known_site`, and not this site itself."""
        if name == self.site.name:
            raise Conflict(f"{name!r} is this site: name another")
        return self.known_site(name)

    def trusted_site(self, name: str, begins: float) -> SiteRow:
        """The site that a certificate names which is good since `begins` (Unix seconds). NotTrusted if the fleet does
        not know it (any more), or has set it up anew since."""
        try:
            row = self.known_site(name)
        except UnknownThing:
            what = "has a certificate of this fleet but is not among its sites (any more)"
            raise NotTrusted(f"site {name!r} {what}: let it join again") from None
        if begins < row.begins:
            raise NotTrusted(f"this certificate of site {name!r} was withdrawn when that site was set up anew")
        return row

    def peer(self, name: str) -> Client:
        """A client of another site's agent."""
        return Client.peer(self.site, self.other_site(name))

    # -- one thing at a time

    @contextmanager
    def alone(self, guest: str, doing: str, *, brief: bool = False) -> Iterator[None]:
        """Keeps other operations of this agent away from a guest or image; Conflict if one is under way.

        `brief`: of what the agent does by itself and soon has done; nobody asked for it, so others wait for it,
        for BRIEF_S at most.
        """
        deadline = time.monotonic() + BRIEF_S
        while not self._taken(guest, doing, brief, patient=time.monotonic() < deadline):
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            with self._busy_lock:
                del self._busy[guest]
                self._brief.discard(guest)

    def _taken(self, guest: str, doing: str, brief: bool, patient: bool) -> bool:
        with self._busy_lock:
            if guest not in self._busy:
                self._busy[guest] = doing
                if brief:
                    self._brief.add(guest)
                return True
            if guest in self._brief and patient and not brief:
                return False
            raise Conflict(f"{guest!r} is busy ({self._busy[guest]}): try again when that has ended")

    @contextmanager
    def taken_in(self, guest: str, doing: str) -> Iterator[None]:
        """`alone`, while no word about who owns it is carried out: an earlier copy may still be thrown away for it.

        That is waited for, for SETTLING_S at most. Conflict if something else is under way.
        """
        deadline = time.monotonic() + SETTLING_S
        with self.alone(guest, doing):
            while self.is_busy(ownership_of(guest)) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            with self.alone(ownership_of(guest), doing):
                yield

    def is_busy(self, guest: str) -> bool:
        with self._busy_lock:
            return guest in self._busy
