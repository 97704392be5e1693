"""How a site comes to be: first of a fleet, or joined to one with a token; and how others learn of it, or that it is
gone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from haulier.agent import authority
from haulier.agent.authority import Token
from haulier.agent.client import Client
from haulier.agent.site import Site, check_host, check_name, split_address
from haulier.durable import write_atomically
from haulier.errors import UNDECODABLE, Conflict, NotTrusted, PeerError
from haulier.handoff.journal import Journal, SiteRow


class JoinRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What a joining site shows to the issuer."""

    secret: str
    name: str
    control: str
    bulk: list[str]
    request: str
    """A certificate request, PEM."""


def init(root: Path, name: str, control: str, bulk: Sequence[str] = ()) -> Site:
    """Makes the first site of a fleet, with the fleet's authority. Conflict if `root` holds a site already."""
    site = Site(root.absolute(), name, control, tuple(bulk))
    _refuse_existing(site)
    site.make_directories()
    authority.create_authority(site)
    with Journal(site.journal) as journal:
        journal.put_sites([SiteRow(site.name, site.control, site.bulk, issuer=True)])
    site.save()
    return site


def join(root: Path, name: str, control: str, bulk: Sequence[str], via: str, token_text: str) -> Site:
    """Makes a site that belongs to the fleet whose issuer's agent answers at `via`.

    NotTrusted if the token is unknown, used or expired, or if another fleet answers. Nothing is left in `root` then.
    """
    site = Site(root.absolute(), name, control, tuple(bulk))
    _refuse_existing(site)
    token = Token.decode(token_text)
    ca_pem = authority.only_certificate(str(Client.joining(via, None, None).get("/v1/join").get("ca", "")).encode())
    if authority.fleet_fingerprint(ca_pem) != token.fleet:
        raise NotTrusted(f"the site at {via} is of another fleet than the token: check --via")
    key, request = authority.new_request(site.name)
    before = set(site.root.iterdir()) if site.root.exists() else None
    site.make_directories()
    try:
        body = JoinRequest(token.secret.hex(), site.name, site.control, list(site.bulk), request.decode())
        answer = Client.joining(via, ca_pem, token.issuer).post("/v1/join", msgspec.to_builtins(body))
        try:
            certificate = str(answer["certificate"]).encode()
            rows = [msgspec.convert(row, SiteRow) for row in answer["sites"]]
            revoked = _revoked(answer)
        except (KeyError, TypeError, *UNDECODABLE):
            raise PeerError(
                f"the site at {via} answered the join request wrongly: run the same haulier there"
            ) from None
        write_atomically(site.ca_certificate, ca_pem)
        authority.install(site, key, certificate)
        with Journal(site.journal) as journal, journal.transaction():
            journal.put_sites(rows)
            for each, begins in revoked.items():
                journal.revoke(each, begins)
        site.save()
    except BaseException:
        # half a site would look like one to nobody, but its key is worth nothing and must not stay
        site.key.unlink(missing_ok=True)
        _clear(site.root, before)
        raise
    return site


def admit(site: Site, journal: Journal, body: JoinRequest) -> dict[str, Any]:
    """The issuer's side of `join`: takes the token, signs, records the new site."""
    check_name(body.name, "site")
    split_address(body.control)
    if len(body.bulk) > 16:
        raise Conflict("a site has at most 16 bulk addresses")
    for address in body.bulk:
        check_host(address, "bulk address")
    try:
        digest = Token(site.name, b"", bytes.fromhex(body.secret)).digest
    except ValueError:
        raise NotTrusted("the join token is damaged: copy the whole line that 'haulier site token' printed") from None
    host, _ = split_address(body.control)
    # Whoever has a key of an earlier site of that name is not heard from now on.
    begins = authority.next_beginning(journal.revoked().get(body.name, 0.0), time.time())
    certificate = authority.sign(site, body.name, body.request.encode(), (host, *body.bulk), begins)
    with journal.transaction():
        token = journal.use_token(digest, body.name, time.time())
        if body.name == site.name or (journal.find_site(body.name) is not None and token.site != body.name):
            raise Conflict(
                f"site {body.name!r} exists already: choose another name, or, to set that site up anew, "
                f"make a token with 'haulier site token --site {body.name}'"
            )
        journal.put_sites([SiteRow(body.name, body.control, tuple(body.bulk))])
        journal.revoke(body.name, authority.begins(certificate))
        facts = listed(journal)
    return {"certificate": certificate.decode(), **facts}


def listed(journal: Journal) -> dict[str, Any]:
    """What a site says of which sites there are, and of certificates that are heard no more."""
    return {"sites": [msgspec.to_builtins(row) for row in journal.sites()], "revoked": journal.revoked()}


def refresh(site: Site, journal: Journal) -> None:
    """Asks the issuer which sites there are. PeerError if it does not answer; nothing changes then."""
    issuers = [row for row in journal.sites() if row.issuer and row.name != site.name]
    for row in issuers:
        answer = Client.peer(site, row).fleet()
        try:
            rows = msgspec.convert(answer["sites"], list[SiteRow])
            revoked = _revoked(answer)
            for each in rows:
                check_name(each.name, "site")
                split_address(each.control)
        except (KeyError, TypeError, msgspec.MsgspecError, ValueError):
            raise PeerError(f"site {row.name!r} answered wrongly which sites there are") from None
        there = {each.name for each in rows}
        with journal.transaction():
            # who issues, and who we are, is known here: it is not for others to say
            journal.put_sites(
                [msgspec.structs.replace(each, issuer=each.name == row.name) for each in rows if each.name != site.name]
            )
            for name, begins in revoked.items():
                if name not in (site.name, row.name):
                    journal.revoke(name, begins)
                    if name not in there:
                        journal.drop_site(name)


def _revoked(answer: Mapping[str, Any]) -> dict[str, float]:
    """Since when certificates have to begin, by name of the site. An older haulier does not say."""
    found = msgspec.convert(answer.get("revoked", {}), dict[str, float])
    for name in found:
        check_name(name, "site")
    return found


def _clear(root: Path, before: set[Path] | None) -> None:
    """Removes what was not in `root` before; all of it where there was no such directory."""
    if before is None:
        shutil.rmtree(root, ignore_errors=True)
        return
    for path in set(root.iterdir()) - before:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _refuse_existing(site: Site) -> None:
    if (site.root / "site.toml").exists():
        raise Conflict(f"{site.root} already holds a site: give another --root, or use what is there")
