"""The site's journal: who owns which guest at which epoch, durable before it takes effect.

One SQLite file per site, in WAL mode with ``synchronous=FULL``: a method that changes something returns when the
change has reached the disk. The agent and every worker open the file at once; each method is one transaction, and
`Journal.transaction()` makes several calls one.

Ownership changes only through `advance`, which states what it expects to find and refuses anything else: two
processes that race for a guest cannot both win. What the states mean and which step may follow which is the table in
`haulier.handoff.ownership`; the journal only keeps the state's name.

A guest without a row has the state "absent".
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from haulier.errors import Conflict, Corrupt, HaulierError, NotTrusted, UnknownThing
from haulier.process import ProcessId

ABSENT: Final = "absent"
_BUSY_S: Final = 30.0
_SCHEMA: Final = 3
_ID_LETTERS: Final = "abcdefghjkmnpqrstuvwxyz23456789"


class GuestRow(msgspec.Struct, frozen=True):
    """A guest as this site knows it.

    `state`, `epoch`, `pending`, `last_epoch` and `taken` are the record of `haulier.handoff.ownership`: the epoch
    under which this site owns the guest, that of the handoff under way, the highest ever seen here, the highest ever
    owned here. `owner` is the site that runs it by this site's knowledge; `handoff` the id of the one that is under
    way or ended last; `manifest` the name of its disk's manifest in the store; `wanted` what the operator asked of an
    owned guest: "creating", "running", "stopped" or "removing".
    """

    name: str
    spec: dict[str, Any] = {}
    state: str = ABSENT
    owner: str = ""
    epoch: int = 0
    pending: int = 0
    last_epoch: int = 0
    taken: int = 0
    handoff: str = ""
    manifest: str = ""
    wanted: str = ""


class HandoffRow(msgspec.Struct, frozen=True):
    """One handoff as one of its two sites sees it. Times are Unix seconds; `ended` is 0 while it is under way."""

    id: str
    guest: str
    role: str
    """"source" or "target"."""
    peer: str
    state: str = "running"
    """"running" until a result is known, then "ended"."""
    phase: str = ""
    epoch: int = 0
    """The epoch that the target will have."""
    pid: int = 0
    created: float = 0.0
    ended: float = 0.0
    outcome: str = ""
    """"done", "cancelled" or "failed" once ended."""
    detail: dict[str, Any] = {}
    pid_ticks: int = 0
    pid_boot: str = ""
    """With `pid` the worker (`ProcessId`), told from a later process of the same number."""

    @property
    def worker(self) -> ProcessId:
        """Alive only while that very process is."""
        return ProcessId(self.pid, self.pid_ticks, self.pid_boot)


class SiteRow(msgspec.Struct, frozen=True):
    """A site of the fleet. `control` is host:port; `bulk` its addresses, one for each path."""

    name: str
    control: str
    bulk: tuple[str, ...] = ()
    issuer: bool = False
    """It signs certificates: its word decides which sites exist."""
    begins: float = 0.0
    """Unix seconds. Its certificates that begin earlier are heard no more: it was removed, or set up anew."""


class TokenRow(msgspec.Struct, frozen=True):
    """A join token; only the digest of its secret is kept."""

    digest: bytes
    expires: float
    site: str = ""
    """Only this site may use it; empty = any new site."""
    used: float = 0.0
    used_by: str = ""


_DDL: Final = """
CREATE TABLE IF NOT EXISTS guests (
    name TEXT PRIMARY KEY, spec TEXT NOT NULL, state TEXT NOT NULL, owner TEXT NOT NULL,
    epoch INTEGER NOT NULL, pending INTEGER NOT NULL, last_epoch INTEGER NOT NULL, taken INTEGER NOT NULL,
    handoff TEXT NOT NULL, manifest TEXT NOT NULL, wanted TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS handoffs (
    id TEXT PRIMARY KEY, guest TEXT NOT NULL, role TEXT NOT NULL, peer TEXT NOT NULL, state TEXT NOT NULL,
    phase TEXT NOT NULL, epoch INTEGER NOT NULL, pid INTEGER NOT NULL,
    created REAL NOT NULL, ended REAL NOT NULL, outcome TEXT NOT NULL, detail TEXT NOT NULL,
    pid_ticks INTEGER NOT NULL DEFAULT 0, pid_boot TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY, control TEXT NOT NULL, bulk TEXT NOT NULL, issuer INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS revoked (name TEXT PRIMARY KEY, begins REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS tokens (
    digest BLOB PRIMARY KEY, expires REAL NOT NULL, site TEXT NOT NULL, used REAL NOT NULL, used_by TEXT NOT NULL
) STRICT;
"""

HELD: Final = "held"
"""A handoff's `residual` in its detail, while the site where its guest came from keeps data for it."""
_LIVE: Final = "state<>'ended'"
_MAY_BE_HELD: Final = f"""instr(detail, '"residual": "{HELD}"')>0"""
"""As text: nobody can ask for what is in JSON that is damaged."""
_INDEXES: Final = (
    "CREATE INDEX IF NOT EXISTS handoffs_guest ON handoffs (guest)",
    "CREATE INDEX IF NOT EXISTS handoffs_ended ON handoffs (ended)",
    f"CREATE INDEX IF NOT EXISTS handoffs_live ON handoffs (created) WHERE {_LIVE}",
    f"CREATE INDEX IF NOT EXISTS handoffs_held ON handoffs (created) WHERE {_MAY_BE_HELD}",
)
"""Handoffs are never deleted, and the agent asks for these of them all the time."""
_SITES: Final = (
    "SELECT name, control, bulk, issuer, coalesce(begins, 0.0) AS begins FROM sites LEFT JOIN revoked USING (name)"
)

_GUEST_FIELDS: Final = frozenset(GuestRow.__struct_fields__) - {"name", "state"}
_HANDOFF_FIELDS: Final = frozenset(HandoffRow.__struct_fields__) - {"id"}


def new_handoff_id() -> str:
    """A fresh id, unique over all sites for practical purposes (59 bits), good as a file name."""
    return "h" + "".join(secrets.choice(_ID_LETTERS) for _ in range(12))


class Journal:
    """The journal at `path`; usable from any thread, and from several processes at once."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._depth = 0
        try:
            # Guests' environments are in it, passwords among them. SQLite's files beside it get the same mode.
            # Never opened where it is there: to close a file ends all locks that this process has on it, SQLite's too,
            # and whoever closes the journal next then takes it for its own and removes what was not yet merged.
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self.path.chmod(0o600)
            self._db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise HaulierError(f"the journal {self.path} cannot be opened ({error}): is it this user's?") from None
        try:
            self._db.row_factory = sqlite3.Row
            # synchronous is a property of the connection; without FULL a commit in WAL mode may be lost in a power cut
            self._db.execute("PRAGMA synchronous=FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA:
                raise Corrupt(f"{self.path} was written by a newer haulier (schema {version}): upgrade this one")
            if version < _SCHEMA:
                self._db.execute("PRAGMA journal_mode=WAL")
                with self.transaction():
                    for statement in _DDL.split(";"):
                        self._db.execute(statement)
                    if 0 < version < 3:
                        self._tell_workers_by_ticks()
                    self._db.execute(f"PRAGMA user_version={_SCHEMA}")
            # A journal that cannot be written now, as its disk is full, is only slower without them.
            with suppress(sqlite3.OperationalError):
                for statement in _INDEXES:
                    self._db.execute(statement)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise Corrupt(
                f"the journal {self.path} cannot be read ({error}): restore it before any guest is started"
            ) from None
        except BaseException:
            self._db.close()
            raise

    def _tell_workers_by_ticks(self) -> None:
        """Schema 3: workers were told by the time of day at which they began, and were lost when the clock was set."""
        rows = self._db.execute(f"SELECT id, pid, pid_started FROM handoffs WHERE {_LIVE} AND pid<>0").fetchall()
        self._db.execute("ALTER TABLE handoffs DROP COLUMN pid_started")
        self._db.execute("ALTER TABLE handoffs ADD COLUMN pid_ticks INTEGER NOT NULL DEFAULT 0")
        self._db.execute("ALTER TABLE handoffs ADD COLUMN pid_boot TEXT NOT NULL DEFAULT ''")
        for row in rows:
            if worker := ProcessId.begun(row["pid"], row["pid_started"]):
                self.set_worker(row["id"], worker)

    def close(self) -> None:
        """Closes the file; other openers are not disturbed."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Makes the calls inside one transaction: all of them are durable when it ends, or none. May be nested."""
        with self._lock:
            outer = self._depth == 0
            if outer:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
            except BaseException:
                if outer:
                    self._db.execute("ROLLBACK")
                raise
            else:
                if outer:
                    try:
                        self._db.execute("COMMIT")
                    except BaseException:
                        if self._db.in_transaction:
                            self._db.execute("ROLLBACK")
                        raise
            finally:
                self._depth -= 1

    # -- guests

    def guests(self) -> list[GuestRow]:
        """All guests of which this site has a record, absent ones too, in order of name."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM guests ORDER BY name").fetchall()
        return [_guest(row) for row in rows]

    def find_guest(self, name: str) -> GuestRow | None:
        with self._lock:
            row = self._db.execute("SELECT * FROM guests WHERE name=?", (name,)).fetchone()
        return _guest(row) if row is not None else None

    def guest(self, name: str) -> GuestRow:
        """UnknownThing if there is no record of it."""
        row = self.find_guest(name)
        if row is None:
            raise UnknownThing(f"no guest {name!r} at this site: 'haulier guest list' shows those there are")
        return row

    def advance(
        self,
        name: str,
        expect: str | Collection[str],
        state: str,
        *,
        expect_epoch: int | None = None,
        expect_handoff: str | None = None,
        **changes: Any,
    ) -> GuestRow:
        """Takes a guest from one of the states `expect` to `state`, with changes of other columns; durable on return.

        "absent" in `expect` also stands for a guest without a row, which is then created. A row is never deleted:
        `last_epoch` has to outlive the guest, and never falls. Conflict if the guest is in another state, epoch or
        handoff than expected: nothing is changed then. The new row is returned.
        """
        unknown = changes.keys() - _GUEST_FIELDS
        if unknown:
            raise TypeError(f"guests have no column {sorted(unknown)}")
        expected = {expect} if isinstance(expect, str) else set(expect)
        with self.transaction():
            old = self.find_guest(name) or GuestRow(name=name)
            if old.state not in expected:
                raise Conflict(f"guest {name!r} is {old.state!r} at this site, not {' or '.join(sorted(expected))}")
            if expect_epoch is not None and old.epoch != expect_epoch:
                raise Conflict(f"guest {name!r} is at epoch {old.epoch} at this site, not {expect_epoch}")
            if expect_handoff is not None and old.handoff != expect_handoff:
                raise Conflict(f"guest {name!r} is in handoff {old.handoff!r} at this site, not {expect_handoff!r}")
            new = msgspec.structs.replace(old, state=state, **changes)
            last = max(old.last_epoch, new.last_epoch, new.epoch)
            new = msgspec.structs.replace(new, last_epoch=last)
            self._db.execute(
                f"INSERT OR REPLACE INTO guests VALUES ({','.join('?' * len(GuestRow.__struct_fields__))})",
                _values(new),
            )
        return new

    def forget_guest(self, name: str, expect: str) -> None:
        """Deletes a guest's record, epochs too: only at the operator's word, and only where the guest is not."""
        with self.transaction():
            if self.guest(name).state != expect:
                raise Conflict(f"guest {name!r} is no longer {expect!r} at this site: look again")
            self._db.execute("DELETE FROM guests WHERE name=?", (name,))

    # -- handoffs

    def add_handoff(self, row: HandoffRow) -> HandoffRow:
        """Records a handoff; `created` is set to now if it is 0. Conflict if the id is taken."""
        if not row.created:
            row = msgspec.structs.replace(row, created=time.time())
        with self.transaction():
            try:
                self._db.execute(
                    f"INSERT INTO handoffs VALUES ({','.join('?' * len(HandoffRow.__struct_fields__))})",
                    _values(row),
                )
            except sqlite3.IntegrityError:
                raise Conflict(f"handoff {row.id!r} is already known at this site") from None
        return row

    def update_handoff(self, handoff: str, **changes: Any) -> HandoffRow:
        """Changes columns of one handoff; UnknownThing if there is none such. The new row is returned."""
        unknown = changes.keys() - _HANDOFF_FIELDS
        if unknown:
            raise TypeError(f"handoffs have no column {sorted(unknown)}")
        with self.transaction():
            row = msgspec.structs.replace(self.handoff(handoff), **changes)
            self._db.execute(
                f"INSERT OR REPLACE INTO handoffs VALUES ({','.join('?' * len(HandoffRow.__struct_fields__))})",
                _values(row),
            )
        return row

    def set_worker(self, handoff: str, worker: ProcessId) -> HandoffRow:
        """Whose work it is from now on."""
        return self.update_handoff(handoff, pid=worker.pid, pid_ticks=worker.ticks, pid_boot=worker.boot)

    def end_handoff(self, handoff: str, outcome: str, **changes: Any) -> HandoffRow:
        """Marks a handoff as ended, now; one that has ended already keeps its outcome."""
        with self.transaction():
            row = self.handoff(handoff)
            if row.state == "ended":
                return row
            return self.update_handoff(handoff, state="ended", outcome=outcome, ended=time.time(), pid=0, **changes)

    def find_handoff(self, handoff: str) -> HandoffRow | None:
        with self._lock:
            row = self._db.execute("SELECT * FROM handoffs WHERE id=?", (handoff,)).fetchone()
        return _handoff(row) if row is not None else None

    def handoff(self, handoff: str) -> HandoffRow:
        """UnknownThing if there is none such."""
        row = self.find_handoff(handoff)
        if row is None:
            raise UnknownThing(f"no handoff {handoff!r} at this site: 'haulier status' shows those there are")
        return row

    def handoffs(
        self, guest: str | None = None, live: bool = False, *, held: bool = False, ended_after: float | None = None
    ) -> list[HandoffRow]:
        """Handoffs, newest first; of one guest, or only those under way.

        With `held` those with a residual that is HELD; with `ended_after` those that ended later than that.
        """
        clauses, values = list[str](), list[str | float]()
        if guest is not None:
            clauses.append("guest=?")
            values.append(guest)
        if live:
            clauses.append(_LIVE)
        if held:
            clauses.append(_MAY_BE_HELD)
        if ended_after is not None:
            clauses.append("ended>?")
            values.append(ended_after)
        where = " WHERE " + " AND ".join(clauses) if clauses else ""
        with self._lock:
            rows = self._db.execute(
                f"SELECT * FROM handoffs{where} ORDER BY created DESC, rowid DESC", values
            ).fetchall()
        found = [_handoff(row) for row in rows]
        return [row for row in found if row.detail.get("residual") == HELD] if held else found

    # -- sites

    def sites(self) -> list[SiteRow]:
        """The sites of the fleet, this one among them, in order of name."""
        with self._lock:
            rows = self._db.execute(f"{_SITES} ORDER BY name").fetchall()
        return [_site(row) for row in rows]

    def find_site(self, name: str) -> SiteRow | None:
        with self._lock:
            row = self._db.execute(f"{_SITES} WHERE name=?", (name,)).fetchone()
        return _site(row) if row is not None else None

    def site(self, name: str) -> SiteRow:
        """UnknownThing if it is not of the fleet."""
        row = self.find_site(name)
        if row is None:
            known = ", ".join(site.name for site in self.sites()) or "none"
            raise UnknownThing(f"unknown site {name!r}: known are {known}; a site is added with 'haulier site join'")
        return row

    def put_sites(self, sites: Sequence[SiteRow]) -> None:
        """Adds or replaces sites, all or none. What is revoked stays so, whatever their `begins` says."""
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO sites (name, control, bulk, issuer) VALUES (?,?,?,?)",
                [(s.name, s.control, json.dumps(list(s.bulk)), int(s.issuer)) for s in sites],
            )

    def drop_site(self, name: str) -> None:
        """Forgets that there is such a site; what is revoked stays so."""
        with self.transaction():
            self._db.execute("DELETE FROM sites WHERE name=?", (name,))

    def revoke(self, name: str, begins: float) -> None:
        """Certificates of site `name` that begin before `begins` (Unix seconds) are heard no more, for ever."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO revoked (name, begins) VALUES (?,?)"
                " ON CONFLICT (name) DO UPDATE SET begins=max(begins, excluded.begins)",
                (name, begins),
            )

    def revoked(self) -> dict[str, float]:
        """Since when certificates of a site have to begin, by its name; also of sites that there are no more."""
        with self._lock:
            rows = self._db.execute("SELECT name, begins FROM revoked ORDER BY name").fetchall()
        return {row["name"]: row["begins"] for row in rows}

    # -- tokens

    def add_token(self, token: TokenRow) -> None:
        """Records a join token; tokens that expired more than a week ago are forgotten."""
        with self.transaction():
            self._db.execute("DELETE FROM tokens WHERE expires<?", (time.time() - 7 * 86400,))
            self._db.execute(
                "INSERT INTO tokens (digest, expires, site, used, used_by) VALUES (?,?,?,?,?)",
                (token.digest, token.expires, token.site, token.used, token.used_by),
            )

    def use_token(self, digest: bytes, site: str, now: float) -> TokenRow:
        """Takes a token for `site`, once. NotTrusted if it is unknown, used, expired, or meant for another site."""
        renew = "make a new one with 'haulier site token'"
        with self.transaction():
            row = self._db.execute("SELECT * FROM tokens WHERE digest=?", (digest,)).fetchone()
            if row is None:
                raise NotTrusted(f"the join token is not known at this site: {renew} at the site given with --via")
            token = TokenRow(row["digest"], row["expires"], row["site"], row["used"], row["used_by"])
            if token.used:
                raise NotTrusted(f"the join token was used already, by site {token.used_by!r}: {renew}")
            if now >= token.expires:
                raise NotTrusted(f"the join token expired {int(now - token.expires)} s ago: {renew}")
            if token.site and token.site != site:
                raise NotTrusted(f"the join token is for site {token.site!r}, not {site!r}: {renew}")
            self._db.execute("UPDATE tokens SET used=?, used_by=? WHERE digest=?", (now, site, digest))
        return token


def _decode(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Corrupt(f"the journal's record of {what} is damaged ({error})") from None
    if not isinstance(value, dict):
        raise Corrupt(f"the journal's record of {what} is damaged (not an object)")
    return value


def _guest(row: Mapping[str, Any]) -> GuestRow:
    columns = {key: row[key] for key in GuestRow.__struct_fields__}
    return GuestRow(**{**columns, "spec": _decode(columns["spec"], f"guest {columns['name']!r}")})


def _handoff(row: Mapping[str, Any]) -> HandoffRow:
    columns = {key: row[key] for key in HandoffRow.__struct_fields__}
    return HandoffRow(**{**columns, "detail": _decode(columns["detail"], f"handoff {columns['id']!r}")})


def _values(row: GuestRow | HandoffRow) -> tuple[Any, ...]:
    """Columns in the order of the table, which is the order of the struct."""
    return tuple(json.dumps(v) if isinstance(v, dict) else v for v in msgspec.structs.asdict(row).values())


def _site(row: Mapping[str, Any]) -> SiteRow:
    return SiteRow(row["name"], row["control"], tuple(json.loads(row["bulk"])), bool(row["issuer"]), row["begins"])
