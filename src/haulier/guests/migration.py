"""What the engine of a handoff tells a QEMU, on either side. Mixed into `Qemu`."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

from haulier.errors import GuestError

if TYPE_CHECKING:
    from haulier.guests.model import GuestSpec
    from haulier.guests.qmp import Event, Qmp

_FD_NAME: Final = "migration"
_UNDER_WAY: Final = frozenset({"setup", "active", "pre-switchover", "device", "wait-unplug"})
_POLL_S: Final = 0.005


class Migration:
    """Migration commands of one QEMU. Names of capabilities and parameters are given with '_' for '-'."""

    spec: GuestSpec

    if TYPE_CHECKING:

        @property
        def qmp(self) -> Qmp: ...
        def status(self) -> str: ...
        def cont(self) -> None: ...
        def wait_status(self, states: set[str] | frozenset[str], timeout: float = 30) -> str: ...

    def set_capabilities(self, **capabilities: bool) -> None:
        """`set_capabilities(events=True, return_path=True)`: those named are set, others stay."""
        wanted = [{"capability": k.replace("_", "-"), "state": v} for k, v in capabilities.items()]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})

    def set_parameters(self, **parameters: Any) -> None:
        """`set_parameters(downtime_limit=100)`: also while a migration is under way."""
        self.qmp.execute("migrate-set-parameters", {k.replace("_", "-"): v for k, v in parameters.items()})

    def prepare_incoming(self, uri: str) -> None:
        """At a target (`incoming=True`): listen at `uri` ("unix:PATH", "file:PATH"). Set capabilities first."""
        self.qmp.execute("migrate-incoming", {"uri": uri})

    def migrate_uri(self, uri: str, *, resume: bool = False) -> None:
        """Start sending to `uri`; `resume`: as `migrate_fd`."""
        self.qmp.execute("migrate", {"uri": uri} | ({"resume": True} if resume else {}))

    def migrate_fd(self, fd: int, *, resume: bool = False) -> None:
        """Start sending into a file descriptor (one end of a socket pair); the caller's descriptor stays open.

        `resume`: a post-copy that was paused goes on, once its target listens again (`haulier.guests.rescue`).
        """
        self.qmp.execute_fd("getfd", {"fdname": _FD_NAME}, fd)
        try:
            self.qmp.execute("migrate", {"uri": f"fd:{_FD_NAME}"} | ({"resume": True} if resume else {}))
        except GuestError:
            try:
                self.qmp.execute("closefd", {"fdname": _FD_NAME})
            except GuestError:
                pass
            raise

    def query_migrate(self) -> dict[str, Any]:
        """QEMU's own account of the migration; {} if there was none."""
        return dict(self.qmp.execute("query-migrate"))

    def wait_migration(self, states: Collection[str], timeout: float, since: int | None = None) -> Event:
        """The MIGRATION event with a status in `states`, since a mark of `qmp.mark()` (default: now).

        Needs the capability `events`. Raises `GuestError`, with QEMU's reason, when the migration ends in another
        way ("failed", "cancelled", "completed") first.
        """
        ends = {"failed", "cancelled", "completed", *states}
        event = self.qmp.wait_event(
            lambda e: e.name == "MIGRATION" and e.data.get("status") in ends, timeout=timeout, since=since
        )
        status = event.data["status"]
        if status not in states:
            reason = self.query_migrate().get("error-desc", "QEMU gives no reason")
            raise GuestError(f"migration of guest {self.spec.name} {status}: {reason}")
        return event

    def migrate_continue(self) -> None:
        """Leave pre-switchover: the disks are at the target."""
        self.qmp.execute("migrate-continue", {"state": "pre-switchover"})

    def start_postcopy(self) -> None:
        """Let the guest go before the rest of its memory: it stops, and pre-switchover follows.

        Needs the capability `postcopy_ram`, at both sides from the start. After `migrate_continue` this QEMU can never
        run its guest again.
        """
        self.qmp.execute("migrate-start-postcopy")

    def pause_postcopy(self) -> None:
        """Make QEMU give up the connection over which post-copy goes; nothing if there is none."""
        try:
            self.qmp.execute_oob("migrate-pause")
        except GuestError as error:
            if "postcopy" not in str(error).lower():
                raise

    def going_first(self) -> bool:
        """At a source: post-copy has begun, so that the guest can never run here again."""
        found = self.query_migrate()
        status = str(found.get("status", "none"))
        if status == "device" and found.get("error-desc"):
            # It broke as device state was to be sent: only with this capability QEMU then stays as it is.
            known = {each["capability"]: each["state"] for each in self.qmp.execute("query-migrate-capabilities")}
            return bool(known.get("postcopy-ram"))
        return status.startswith("postcopy")

    def migrate_cancel(self) -> None:
        """Give up sending; the guest runs on here by itself. No error if nothing is under way."""
        self.qmp.execute("migrate_cancel")

    def postmigrate(self, timeout: float = 10) -> None:
        """Wait until the run state has followed the event `completed` (it takes some milliseconds)."""
        self.wait_status({"postmigrate"}, timeout)

    def resume_source(self, timeout: float = 30) -> None:
        """Make a guest run again that was being, or has been, sent away. Only its owner may do this.

        Works from pre-switchover, device, postmigrate and paused; does nothing for one that runs. One that had stopped
        at an I/O error of its own is let go on once, and may stop again: no handoff can mend that. Afterwards dirty
        rounds have to start anew. Raises `GuestError` if it does not run within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        cancelled = False
        while True:
            migration = self.query_migrate().get("status", "none")
            if migration in _UNDER_WAY and not cancelled:
                self.migrate_cancel()
                cancelled = True
            state = self.status()
            if state == "running" and migration not in _UNDER_WAY and migration != "cancelling":
                return
            if state == "io-error" and migration not in _UNDER_WAY and migration != "cancelling":
                self.cont()
                return
            if state in {"paused", "postmigrate", "prelaunch"} and migration not in _UNDER_WAY:
                try:
                    self.cont()
                except GuestError:
                    # A migration that is ending may refuse it for a moment.
                    if time.monotonic() > deadline:
                        raise
            if time.monotonic() > deadline:
                raise GuestError(f"guest {self.spec.name} does not run again: it is {state}, its migration {migration}")
            time.sleep(_POLL_S)
