"""Who stays in the fleet: sites are put out of it, and certificates renewed before they end.

The site that made the fleet decides. What it put out is refused there at once, and elsewhere when a site hears of it:
it tells all that answer, and those that did not ask it when they start and every hour.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec

from haulier.agent import authority, joining
from haulier.agent.client import Client
from haulier.agent.core import Core
from haulier.agent.jobs import Progress
from haulier.agent.residuals import Residuals
from haulier.agent.site import check_name, split_address
from haulier.errors import Conflict, HaulierError, NotTrusted, PeerError, UnknownThing, Unsupported
from haulier.handoff import clients
from haulier.handoff.journal import SiteRow
from haulier.handoff.ownership import MAY_RUN, UNDER_WAY

log = logging.getLogger(__name__)

RENEW_DAYS: Final = 365.0
"""So long before its end a certificate is renewed: a site that is cut off for months still has one then."""
EVERY_S: Final = 3600.0
ANSWER_S: Final = 20.0
_AT_ONCE: Final = 16
_MOST_NEEDS: Final = 20


class Leaving(msgspec.Struct, forbid_unknown_fields=True):
    """Asks what stands against the leaving of a site."""

    site: str


class Renewal(msgspec.Struct, forbid_unknown_fields=True):
    """`request`: a certificate request (PEM) with the key that the asking site has."""

    request: str


class Membership:
    """This site's part in it."""

    def __init__(self, core: Core, residuals: Residuals) -> None:
        self.core = core
        self.site = core.site
        self.journal = core.journal
        self._residuals = residuals
        self._due = 0.0

    def supervise(self) -> None:
        """Learns who left, and renews this site's certificate in time."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY_S
        self.core.refresh_sites()
        if authority.days_left(self.site.certificate) < RENEW_DAYS:
            self.renew()

    # -- leaving -------------------------------------------------------------------------------------------------------

    def remove(self, name: str, force: bool) -> dict[str, Any]:
        """Begins to put a site out of the fleet; a `Job`.

        Its result: {"site", "told": sites that know, "untold": sites that will ask}; Conflict while the site is needed,
        unless `force`. Unsupported where this site did not make the fleet.
        """
        row = self.core.other_site(check_name(name, "site"))
        if not self.site.ca_key.exists():
            raise Unsupported(f"site {self.site.name!r} did not make this fleet: do this at the site that did")
        job = self.core.jobs.start("remove site", name, lambda progress: self._remove(row, force, progress))
        return dict(msgspec.to_builtins(job))

    def _remove(self, row: SiteRow, force: bool, progress: Progress) -> dict[str, Any]:
        name = row.name
        others = [each for each in self.journal.sites() if each.name not in (self.site.name, name)]
        progress(0.0, "" if force else "asking the other sites what it is needed for")
        if not force and (against := self._against(row, others)):
            more = f"; and {len(against) - _MOST_NEEDS} more" if len(against) > _MOST_NEEDS else ""
            raise Conflict(
                f"site {name!r} is still needed: {'; '.join(against[:_MOST_NEEDS])}{more} (what cannot be settled any "
                "more, as that site is gone for good, is passed over with --force)"
            )
        with self.journal.transaction():
            begins = self.journal.revoked().get(name, 0.0)
            self.journal.revoke(name, authority.next_beginning(begins, time.time()))
            self.journal.drop_site(name)
        log.info("site %s was put out of the fleet", name)
        progress(0.6, "telling the other sites")
        told = self._ask(others, lambda client: client.post("/v1/peer/refresh", timeout=ANSWER_S))
        return {
            "site": name,
            "told": [each.name for each in others if isinstance(told[each.name], dict)],
            "untold": [each.name for each in others if not isinstance(told[each.name], dict)],
        }

    def _against(self, row: SiteRow, others: list[SiteRow]) -> list[str]:
        """What stands against its leaving, by the word of all sites."""
        found = self.needed(row.name)
        there = self._ask([row], lambda client: client.get("/v1/guests", ANSWER_S))[row.name]
        if isinstance(there, dict):
            guests = [each for each in there.get("guests", ()) if isinstance(each, dict)]
            living = [str(each.get("name")) for each in guests if each.get("state") in MAY_RUN]
            found += [f"guest {each!r} lives there: hand it over, or remove it" for each in living]
        else:
            known = [each.name for each in self.journal.guests() if each.owner == row.name]
            found += [f"guest {each!r} lived there when it was last heard of" for each in known]
        answers = self._ask(others, lambda client: client.post("/v1/peer/needed", {"site": row.name}, ANSWER_S))
        for name, answer in answers.items():
            if isinstance(answer, UnknownThing):
                found.append(f"site {name!r} cannot say whether it needs it: upgrade haulier there")
            elif not isinstance(answer, dict):
                found.append(f"site {name!r} does not say whether it needs it ({answer})")
            else:
                said = answer.get("needed")
                found += [f"at site {name!r}: {text}" for text in said] if isinstance(said, list) else []
        return [text[:500] for text in found]

    def needed(self, name: str) -> list[str]:
        """What site `name` is needed for here."""
        check_name(name, "site")
        found = []
        for guest in self.journal.guests():
            row = self.journal.find_handoff(guest.handoff) if guest.handoff else None
            if guest.state in UNDER_WAY and row is not None and row.peer == name:
                found.append(f"handoff {row.id} of guest {guest.name!r} is under way ('haulier status')")
        for held in self._residuals.held():
            if held.peer == name:
                found.append(f"guest {held.guest!r} left data there ('haulier fill {held.guest}')")
        for tunnel in clients.records(self.site).all():
            if tunnel.peer == name:
                found.append(f"clients of guest {tunnel.guest!r} reach it by a tunnel between the two")
        return found

    def told(self, caller: str) -> dict[str, Any]:
        """The site that made the fleet says that something changed: it is asked what."""
        if not self.journal.site(caller).issuer:
            raise NotTrusted(f"site {caller!r} did not make this fleet: what changed in it is not for it to say")
        joining.refresh(self.site, self.journal)
        return {}

    def _ask(
        self, rows: Iterable[SiteRow], call: Callable[[Client], dict[str, Any]]
    ) -> dict[str, dict[str, Any] | HaulierError]:
        """Many at once; what each answered, or what went wrong."""

        def one(row: SiteRow) -> dict[str, Any] | HaulierError:
            try:
                return call(Client.peer(self.site, row))
            except HaulierError as error:
                return error

        rows = list(rows)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="membership") as pool:
            return {row.name: answer for row, answer in zip(rows, pool.map(one, rows), strict=True)}

    # -- certificates --------------------------------------------------------------------------------------------------

    def renew(self) -> dict[str, Any]:
        """Gets a certificate for the same key that is good for longer: {"site", "days"}. The key stays: a new one
        could be at odds with the certificate after a crash between the two."""
        request = authority.request_with(self.site)
        if self.site.ca_key.exists():
            certificate = authority.sign(self.site, self.site.name, request, self._addresses(self.site.name))
        else:
            issuers = [row for row in self.journal.sites() if row.issuer]
            if not issuers:
                raise UnknownThing("it is not known here which site made the fleet: join again")
            answer = Client.peer(self.site, issuers[0]).post("/v1/peer/certificate", {"request": request.decode()})
            try:
                certificate = str(answer["certificate"]).encode()
            except KeyError:
                raise PeerError(f"site {issuers[0].name!r} answered wrongly: run the same haulier there") from None
        authority.check_certificate(self.site, certificate)
        authority.install_certificate(self.site, certificate)
        self.core.reload()
        days = authority.days_left(self.site.certificate)
        log.info("the certificate of site %s was renewed, it is good for %.0f days", self.site.name, days)
        return {"site": self.site.name, "days": days}

    def certify(self, caller: str, body: Renewal) -> dict[str, Any]:
        """The other side of `renew`, where the fleet was made. Nothing is taken from the request but its key."""
        begins = self.journal.revoked().get(caller, 0.0)
        certificate = authority.sign(self.site, caller, body.request.encode(), self._addresses(caller), begins)
        return {"certificate": certificate.decode()}

    def _addresses(self, name: str) -> list[str]:
        row = self.journal.site(name)
        return [split_address(row.control)[0], *row.bulk]
