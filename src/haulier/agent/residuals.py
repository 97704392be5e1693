"""Data left behind: what guests here still lack, what this site keeps for guests that went away, and when it may go.

Two durable records. Where the guest is: ``residual`` in the handoff's row of the journal, "held" from the moment that
the offer was taken until the site it came from has been told that nothing is missing any more, then "released".
Where it came from: the manifest ``residual/GUEST/HANDOFF``, which keeps its chunks from collection and eviction,
written before the token passed and dropped only at the word of that guest's new site, or of this site's operator.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, Final

import msgspec

from haulier.agent.core import Core
from haulier.agent.jobs import Job, Progress
from haulier.agent.site import check_name
from haulier.chunks.store import ChunkStore
from haulier.disks.export import DiskExport
from haulier.disks.fill import Mode
from haulier.errors import Conflict, HaulierError, NotTrusted, PeerError, UnknownThing, UsageError
from haulier.fetch.fetching import fetch
from haulier.fetch.holders import sources_of
from haulier.guests.qemu import Qemu
from haulier.handoff import residence
from haulier.handoff.journal import GuestRow, HandoffRow
from haulier.handoff.ownership import MAY_RUN, State
from haulier.units import CHUNK

log = logging.getLogger(__name__)

RELEASED: Final = "released"
POLL_S: Final = 0.5
TELL_EVERY_S: Final = 10.0
TELL_AGAIN_S: Final = (2.0, 60.0)
"""After a failure, and at most, as it goes on."""
PINS: Final = "residual/"
NOT_HERE: Final = frozenset({State.AWAY, State.ABSENT, State.REFUSED})
"""States in which a guest lacks nothing here."""
UNKNOWN: Final = 1
"""Bytes that are said to be missing where nobody can tell: no chunk is so short."""


class ResidualMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """From the site where a guest is to the one that it came from. `left` is in bytes; 0 = the pins may go."""

    guest: str
    handoff: str
    left: int


class Residuals:
    """Both sides of what was left behind."""

    def __init__(self, core: Core, store: ChunkStore) -> None:
        self.core = core
        self.site = core.site
        self.journal = core.journal
        self.store = store
        self._told: dict[str, tuple[int, float]] = {}
        """Pin -> (bytes that its guest still lacked, when that was said)."""
        self._said: dict[str, tuple[int, float]] = {}
        self._failing: dict[tuple[str, str], tuple[str, float, float]] = {}
        """(Site, handoff, or "" where the site does not answer at all) -> (why, when to try again, how long after)."""

    # -- where the guest is ----------------------------------------------------------------------------------------

    def held(self, guest: str = "") -> list[HandoffRow]:
        """Handoffs whose source still keeps something for a guest here."""
        return [
            row
            for row in self.journal.handoffs(guest=guest or None, held=True)
            if row.role == "target" and (row.outcome in ("", "done") or self._was_taken(row))
        ]

    def _was_taken(self, row: HandoffRow) -> bool:
        """The guest came here by it, or by a later one: one that has failed may have lost memory alone (post-copy)."""
        guest = self.journal.find_guest(row.guest)
        return row.outcome == "done" or (guest is not None and 0 < row.epoch <= guest.taken)

    def missing(self, guest: GuestRow) -> int:
        """Bytes of the guest's disk that are not at this site. UnknownThing where its manifest is not in the store:
        then nobody knows, and nothing may be let go of."""
        if guest.state not in MAY_RUN or not guest.manifest:
            return 0
        if self.store.is_complete(guest.manifest):
            return 0
        # The export counts as it goes; only its "nothing" is looked into.
        told = self._fill_facts(guest.name, guest.manifest).get("missing_bytes", 0)
        if isinstance(told, int) and told > 0:
            return told
        manifest = self.store.load_manifest(guest.manifest)
        return len(self.store.missing(manifest.unique())) * CHUNK

    def here(self) -> list[dict[str, Any]]:
        """Guests here of whose disk something is elsewhere."""
        found = []
        for row in self.held():
            guest = self.journal.find_guest(row.guest)
            if row.state != "ended" or guest is None or guest.state not in MAY_RUN or not guest.manifest:
                continue
            found.append(
                {
                    "guest": row.guest,
                    "source": row.peer,
                    "handoff": row.id,
                    "left_bytes": self.missing(guest),
                    "fill": self._fill_facts(row.guest),
                }
            )
        return found

    def _fill_facts(self, guest: str, manifest: str = "") -> dict[str, Any]:
        with contextlib.suppress(HaulierError, OSError):
            stats = DiskExport.attach(residence.guest_paths(self.site, guest).nbd_ctl).stats()
            if manifest in ("", stats["manifest"]):
                return dict(stats.get("fill", {}))
        return {}

    def check_may_leave(self, guest: str, to: str) -> None:
        """Conflict if the guest cannot be handed to `to` because data that it needs is at a third site."""
        held = self.held(guest)
        row = self.journal.find_guest(guest)
        if not held or row is None or all(one.peer == to for one in held):
            return
        left = self.missing(row)
        if left:
            raise Conflict(
                f"{left / 1e6:.1f} MB of guest {guest!r} are still at site {held[0].peer!r}: "
                f"'haulier fill {guest}' brings them here, or hand it back to {held[0].peer!r}"
            )

    def fill(self, name: str, mode: str) -> Job:
        """Mode "full" fetches all that is missing, as fast as it goes; the job ends when it is here. "background" and
        "off" say how to go on from here."""
        guest = self.journal.guest(check_name(name, "guest"))
        if guest.state not in MAY_RUN:
            raise Conflict(f"guest {name!r} is not at this site: its disk is filled where it is")
        try:
            wanted = Mode(mode)
        except ValueError:
            raise UsageError(f"a disk is filled off, background or full, not {mode[:40]!r}") from None

        def work(progress: Progress) -> dict[str, Any]:
            before = self.missing(guest)
            export = self._export(name)
            if export is not None:
                export.fill(wanted.value)
            if wanted is Mode.FULL:
                self._fill_up(guest, export, before, progress)
                if export is not None:
                    export.fill(Mode.BACKGROUND.value)
                self.tell(name)
            return {"guest": name, "mode": wanted.value, "left_bytes": self.missing(guest), "fetched_bytes": before}

        return self.core.jobs.start("fill", name, work)

    def _export(self, name: str) -> DiskExport | None:
        with contextlib.suppress(UnknownThing):
            return DiskExport.attach(residence.guest_paths(self.site, name).nbd_ctl)
        return None

    def _fill_up(self, guest: GuestRow, export: DiskExport | None, before: int, progress: Progress) -> None:
        if export is None:
            manifest = self.store.load_manifest(guest.manifest)
            share = 1 / max(1, before // CHUNK)
            fetch(
                manifest.unique(),
                sources_of(self.site),
                self.store,
                progress=lambda done, total: progress(done * share, f"{(total - done) * CHUNK / 1e6:.1f} MB to go"),
            )
            return
        while left := self.missing(guest):
            why = self._fill_facts(guest.name).get("error", "")
            progress(1 - left / max(1, before), f"{left / 1e6:.1f} MB to go" + (f" ({why})" if why else ""))
            if not export.alive():
                raise PeerError(f"the disk export of guest {guest.name!r} ended: the agent starts it again, ask again")
            time.sleep(POLL_S)

    # -- kept going ------------------------------------------------------------------------------------------------

    def supervise(self) -> None:
        """Lets guests go on that stopped at a read, once what they read is here; notes which disks are whole."""
        for guest in self.journal.guests():
            # Not only data left behind: a chunk that was damaged here and has to come from elsewhere is the same.
            if guest.state in MAY_RUN and not self.core.is_busy(guest.name) and self._refused(guest.name):
                self._let_go_on(guest)
        for row in self.held():
            kept = self.journal.find_guest(row.guest)
            if row.state != "ended" or kept is None or kept.state not in MAY_RUN or self.core.is_busy(kept.name):
                continue
            with contextlib.suppress(UnknownThing):
                if kept.manifest and not self.missing(kept):
                    self._complete(kept)

    def _refused(self, guest: str) -> bool:
        """Whether its export ever had to refuse a read because nobody brought it in time."""
        with contextlib.suppress(HaulierError, OSError):
            return bool(DiskExport.attach(residence.guest_paths(self.site, guest).nbd_ctl).stats()["errors"])
        return False

    def _let_go_on(self, guest: GuestRow) -> None:
        with self.core.asking:
            qemu = residence.adopt(self.site, guest.name)
            if qemu is not None:
                self._try_to_go_on(guest, qemu)

    def _try_to_go_on(self, guest: GuestRow, qemu: Qemu) -> None:
        try:
            if qemu.status() == "io-error" and not self._fill_facts(guest.name).get("unserved", 1):
                log.info("guest %s goes on: what it read has come", guest.name)
                qemu.recover_io(5.0)
        except HaulierError as error:
            log.warning("guest %s stands at a read: %s", guest.name, error)
        finally:
            qemu.close()

    def _complete(self, guest: GuestRow) -> None:
        """From now on the manifest says that all of it is here."""
        if not self.store.is_complete(guest.manifest):
            self.store.save_manifest(guest.manifest, self.store.load_manifest(guest.manifest))
            log.info("all of guest %s is here", guest.name)

    def tell(self, guest: str = "") -> None:
        """Tells the sites that keep something for guests here how much is still missing.

        With `guest` only what is kept for that one, and at once: also what was just said, or just failed. Any thread
        may call; whatever one of them waits for, another does not.
        """
        for row in self.journal.handoffs(guest=guest or None, held=True):
            if row.role == "target" and row.state == "ended":
                self._tell(row, at_once=bool(guest))

    def _tell(self, row: HandoffRow, at_once: bool) -> None:
        site, alone = (row.peer, ""), (row.peer, row.id)
        if not at_once and time.monotonic() < max(self._failing.get(key, ("", 0.0, 0.0))[1] for key in (site, alone)):
            return
        guest = self.journal.find_guest(row.guest)
        left = 0
        if guest is not None and self._was_taken(row):
            if guest.state in MAY_RUN:
                if not guest.manifest:
                    return  # still being settled
                try:
                    left = self.missing(guest)
                    if not left:
                        self._complete(guest)
                except UnknownThing as error:
                    self._failed(alone, logging.ERROR, f"what guest {row.guest} lacks cannot be told: {error}")
                    return
            elif guest.state not in NOT_HERE:
                return  # under way: this is told when it is over
        said, at = self._said.get(row.id, (-1, 0.0))
        if not at_once and said == left and time.monotonic() - at < TELL_EVERY_S:
            return
        message = ResidualMessage(guest=row.guest, handoff=row.id, left=left)
        try:
            answer = self.core.peer(row.peer).post("/v1/peer/residual", msgspec.to_builtins(message), timeout=15.0)
        except HaulierError as error:
            # Where it does not answer, what else it keeps need not be tried as well.
            key = site if isinstance(error, PeerError) else alone
            self._failed(key, logging.INFO, f"site {row.peer} cannot be told what guests from there lack: {error}")
            return
        for key in (site, alone):
            self._failing.pop(key, None)
        self._said[row.id] = (left, time.monotonic())
        if not left and not answer.get("kept"):
            now = self.journal.handoff(row.id)
            self.journal.update_handoff(row.id, detail={**now.detail, "residual": RELEASED})
            log.info("nothing of guest %s is left at site %s", row.guest, row.peer)

    def _failed(self, key: tuple[str, str], level: int, why: str) -> None:
        """Puts the next try off, for longer each time; logs what was not said before."""
        before, _, wait = self._failing.get(key, ("", 0.0, TELL_AGAIN_S[0]))
        if why != before:
            log.log(level, "%s", why)
        self._failing[key] = (why, time.monotonic() + wait, min(2 * wait, TELL_AGAIN_S[1]))

    # -- where it came from ----------------------------------------------------------------------------------------

    def left(self) -> list[dict[str, Any]]:
        """What this site keeps for guests that went away."""
        found = []
        for name in self.store.manifest_names(PINS):
            guest, _, handoff = name.removeprefix(PINS).partition("/")
            meta = self.store.manifest_meta(name)
            told = self._told.get(name)
            found.append(
                {
                    "guest": guest,
                    "target": meta.get("target", ""),
                    "handoff": handoff,
                    "since": meta.get("since", 0.0),
                    "kept_bytes": len(self.store.load_manifest(name).unique()) * CHUNK,
                    "left_bytes": told[0] if told else None,
                }
            )
        return found

    def told(self, message: ResidualMessage, caller: str) -> dict[str, Any]:
        """A guest's new site says what it still lacks; with nothing missing the pins go."""
        check_name(message.guest, "guest"), check_name(message.handoff, "handoff")
        name = residence.pin_name(message.guest, message.handoff)
        if name not in self.store.manifest_names(name):
            return {"kept": False}
        if self.store.manifest_meta(name).get("target") != caller:
            raise NotTrusted(f"what guest {message.guest!r} left behind is not site {caller!r}'s to speak of")
        if message.left != 0:
            self._told[name] = (message.left, time.time())
            return {"kept": True}
        live = self.journal.find_handoff(message.handoff)
        if live is not None and live.state != "ended":
            return {"kept": True}  # the token is still on its way back here, for all we know
        self.store.drop_manifest(name)
        self._told.pop(name, None)
        log.info("guest %s needs nothing here any more", message.guest)
        return {"kept": False}

    def release(self, guest: str, force: bool) -> dict[str, Any]:
        """At either side: have a guest's pins go, if nothing is missing. `force` (only where they are) asks nobody.

        Conflict while something is missing, UnknownThing where nothing was left behind.
        """
        check_name(guest, "guest")
        pins = [pin for pin in self.left() if pin["guest"] == guest]
        held = self.held(guest)
        if not pins and not held:
            raise UnknownThing(f"nothing of guest {guest!r} is left behind, here or for it: see 'haulier status'")
        for row in held:
            known = self.journal.guest(guest)
            left = self.missing(known)
            if left:
                raise Conflict(
                    f"{left / 1e6:.1f} MB of guest {guest!r} are only known to be at site {row.peer!r}: "
                    f"'haulier fill {guest}' first"
                )
        if held:
            self.tell(guest)
            if self.held(guest):
                raise PeerError(f"site {held[0].peer!r} cannot be told now: it will be, as soon as it answers")
        for pin in pins:
            if not force:
                self._ask_release(pin)
            with contextlib.suppress(UnknownThing):
                self.store.drop_manifest(residence.pin_name(guest, str(pin["handoff"])))
        return {"guest": guest, "released": [row.id for row in held] + [str(pin["handoff"]) for pin in pins]}

    def _ask_release(self, pin: dict[str, Any]) -> None:
        guest, target = str(pin["guest"]), str(pin["target"])
        try:
            answer = self.core.peer(target).post(
                "/v1/peer/residual/left", {"guest": guest, "handoff": pin["handoff"], "left": 0}, timeout=15.0
            )
            left = int(answer["left"])
        except (HaulierError, KeyError, TypeError, ValueError) as error:
            raise Conflict(
                f"site {target!r}, where guest {guest!r} went, does not say whether it has everything ({error}); "
                "--force lets go of it all the same, and what is missing there is then lost"
            ) from None
        if left == UNKNOWN:
            raise Conflict(
                f"guest {guest!r} is under way, and site {target!r} cannot say what it lacks: "
                "try again when the handoff is over"
            )
        if left:
            raise Conflict(
                f"guest {guest!r} at site {target!r} still lacks {left / 1e6:.1f} MB that are kept here: "
                f"'haulier fill {guest}' there first (--force lets go of it all the same, and the data is lost)"
            )

    def asked(self, message: ResidualMessage, caller: str) -> dict[str, Any]:
        """The site that keeps something asks how much is still missing here."""
        row = self.journal.find_handoff(check_name(message.handoff, "handoff"))
        if row is None or row.peer != caller or row.guest != message.guest:
            raise NotTrusted(f"site {caller!r} has no part in handoff {message.handoff!r}")
        if row.state != "ended":
            return {"left": UNKNOWN}
        guest = self.journal.find_guest(message.guest)
        if guest is None or guest.state in NOT_HERE:
            return {"left": 0}
        if guest.state not in MAY_RUN or not guest.manifest:
            return {"left": UNKNOWN}  # it leaves, comes, or has just come: nothing is settled yet
        return {"left": self.missing(guest)}
