"""Sites without QEMU: residence and recovery act on a `Host` that only remembers what was done to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from haulier.agent.site import Site
from haulier.chunks.fingerprint import ZERO
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import GuestError, PeerError, UnknownThing
from haulier.guests.model import new_spec
from haulier.guests.paths import GuestPaths
from haulier.handoff import recovery, residence
from haulier.handoff.attempts import MANIFESTS
from haulier.handoff.custody import record_of
from haulier.handoff.journal import GuestRow, HandoffRow, Journal
from haulier.handoff.messages import Offer
from haulier.handoff.ownership import Event, State
from haulier.units import CHUNK

GUEST = "web1"
SPEC = new_spec(GUEST, "debian", memory_mib=512, disk_size=16 * CHUNK, address="10.77.0.10/24", gateway="10.77.0.1")
HANDOFF = "h1"
OFFER = Offer(
    handoff=HANDOFF,
    source="oslo",
    spec=msgspec.to_builtins(SPEC),
    epoch=4,
    secret="ab" * 32,
    manifest="cd" * 32,
    accelerator="tcg",
)


class Host:
    """One site's machine: at most one QEMU for the guest, and a log of what was done."""

    def __init__(self, root: Path, name: str, peer: str) -> None:
        # Two tests at once have handoffs of the same number.
        self.site = Site(root / name, name, "127.0.0.1:7440", ram=str(root / f"{name}.ram"))
        self.site.make_directories()
        self.journal = Journal(self.site.journal)
        self.peer = peer
        self.qemu: str | None = None
        """Its status; None = no process."""
        self.migration = "none"
        """What QEMU says of it."""
        self.stuck = False
        """It does not run on, whatever it is told."""
        self.stray = False
        """There is a QEMU that was not written down."""
        self.done: list[str] = []
        self.reachable = True

    def close(self) -> None:
        self.journal.close()

    def record(self, state: State, epoch: int = 0, pending: int = 0, *, role: str, last: int = 0) -> None:
        """The journal as a worker left it that died in the middle of a handoff."""
        self.journal.advance(
            GUEST,
            "absent",
            state.value,
            epoch=epoch,
            pending=pending,
            last_epoch=last or max(epoch, pending),
            taken=epoch,
            spec=msgspec.to_builtins(SPEC),
            owner=self.site.name if state is State.OWNER else "oslo",
            handoff=HANDOFF,
            manifest=residence.manifest_name(GUEST) if role == "source" else "",
            wanted="running" if role == "source" or state is State.OWNER else "",
        )
        self.journal.add_handoff(HandoffRow(HANDOFF, GUEST, role, self.peer, epoch=pending or last))
        directory = self.site.handoff_root(HANDOFF)
        directory.mkdir()
        self.site.mirror(HANDOFF).touch()
        with ChunkStore(self.site.store) as store:
            disk = Manifest(16 * CHUNK, ZERO * 16)
            store.save_manifest(residence.manifest_name(GUEST) if role == "source" else self.incoming, disk)
            store.add_lease(residence.lease_of(HANDOFF))
        guest = self.site.guest_root(GUEST)
        guest.mkdir()
        (guest / "overlay.qcow2").touch()

    @property
    def incoming(self) -> str:
        return residence.incoming_name(HANDOFF)

    @property
    def state(self) -> State:
        return record_of(self.journal.guest(GUEST)).state

    @property
    def row(self) -> GuestRow:
        return self.journal.guest(GUEST)

    @property
    def handoff(self) -> HandoffRow:
        return self.journal.handoff(HANDOFF)

    def manifests(self) -> list[str]:
        with ChunkStore(self.site.store) as store:
            # What an attempt leaves in the cache is test_attempts' and test_residence's.
            return sorted(name for name in store.manifest_names() if not name.startswith(MANIFESTS))

    def leases(self) -> list[str]:
        with ChunkStore(self.site.store) as store:
            return sorted(store.leases())

    def files(self) -> list[str]:
        """What is left of the guest's files."""
        guest = self.site.guest_root(GUEST)
        return sorted(path.name for path in guest.iterdir()) if guest.exists() else []


class FakeQemu:
    """As much of `haulier.guests.qemu.Qemu` as residence uses."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.spec = SPEC
        self.qmp = SimpleNamespace(mark=lambda: 0, wait_event=lambda *_, **__: SimpleNamespace(at=12.5))

    def status(self) -> str:
        if self.host.qemu is None or self.host.qemu == "waits for a page":
            raise GuestError("QEMU does not answer")
        return self.host.qemu

    def cont(self) -> None:
        self.host.done.append("cont")
        self.host.qemu = "running"

    def resume_source(self) -> None:
        if self.host.stuck:
            raise GuestError("it does not run again")
        if self.host.qemu != "running":
            self.host.done.append("resume")
        self.host.qemu = "running"

    def kill(self) -> None:
        self.host.done.append("kill")
        self.host.qemu = None

    def going_first(self) -> bool:
        return self.host.migration.startswith("postcopy")

    def query_migrate(self) -> dict[str, str]:
        return {"status": self.host.migration}

    def close(self) -> None:
        pass


class Hosts:
    """Two sites whose agents reach each other, unless told otherwise."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.oslo = Host(root, "oslo", "lisbon")
        self.lisbon = Host(root, "lisbon", "oslo")
        self.both = (self.oslo, self.lisbon)
        self.said: list[tuple[str, str, int]] = []
        self.ran_when_said: list[bool] = []
        self.worker_alive = False
        monkeypatch.setattr(residence, "Qemu", SimpleNamespace(adopt=self._adopt, clear=self._clear))
        for module in (residence, recovery):
            monkeypatch.setattr(module, "DiskExport", SimpleNamespace(attach=self._attach))
        monkeypatch.setattr(residence, "started_as", self._strays)
        monkeypatch.setattr(residence, "delete_tap", lambda name: None)
        monkeypatch.setattr(residence, "clean_up", lambda qmp: None)
        monkeypatch.setattr(recovery, "worker_alive", lambda row: self.worker_alive)

    def close(self) -> None:
        for host in self.both:
            host.close()

    def _of(self, path: Path) -> Host:
        return next(host for host in self.both if path.is_relative_to(host.site.root))

    def _adopt(self, paths: GuestPaths, *, worker: bool = False) -> Any:
        host = self._of(paths.root)
        if host.qemu is None:
            raise UnknownThing("no QEMU")
        return FakeQemu(host)

    def _strays(self, program: str, argument: str) -> list[Any]:
        host = self._of(Path(argument))
        if not host.stray or not program.startswith("qemu"):
            return []

        def kill() -> None:
            host.done.append("kill stray")
            host.stray = False

        return [SimpleNamespace(kill=kill)]

    def _clear(self, paths: GuestPaths) -> None:
        pass

    def _attach(self, control: Path) -> Any:
        host = self._of(control)
        if not control.parent.exists():
            raise GuestError("no export")
        return SimpleNamespace(
            stop=lambda: host.done.append("stop export"), swap=lambda name: host.done.append(f"export {name}")
        )

    def messenger(self, name: str) -> Any:
        """The agent of the site `name`, as the other site's agent talks to it."""
        host = self.oslo if name == "oslo" else self.lisbon
        return SimpleNamespace(own=lambda guest, event, epoch, handoff="": self._own(host, guest, event, epoch))

    def _own(self, host: Host, guest: str, event: str, epoch: int) -> Sequence[tuple[str, int]]:
        self.said.append((host.site.name, event, epoch))
        self.ran_when_said.append(bool(self.runners()))
        if not host.reachable:
            raise PeerError("cannot be reached")
        return recovery.handle(host.site, host.journal, guest, Event(event), epoch)

    def recover(self, host: Host) -> bool:
        return recovery.recover(host.site, host.journal, host.handoff, self.messenger)

    def runners(self) -> list[str]:
        return [host.site.name for host in self.both if host.qemu == "running"]
