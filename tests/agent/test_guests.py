"""Guests of a site: refused words, half-made and half-removed ones, exports that die, containers taken over from LXC.

No QEMU runs here."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from haulier.agent import containers
from haulier.agent import guests as module
from haulier.agent.client import Client
from haulier.agent.guests import RunRequest, default_gateway
from haulier.agent.server import Agent
from haulier.chunks.manifest import Manifest
from haulier.containers import lxc
from haulier.containers.network import RUN, namespace_name
from haulier.disks.export import DiskExport
from haulier.disks.nbd import NbdReader
from haulier.errors import Conflict, GuestError, HaulierError, NoRoom, UnknownThing, UsageError
from haulier.guests import launch
from haulier.handoff import recovery, residence
from haulier.handoff.ownership import Event
from haulier.network import tunnel
from tests.agent.conftest import Fleet
from tests.support.lxc import OfLxc, of_lxc

CHUNK = 65536


@pytest.fixture
def image(fleet: Fleet) -> Manifest:
    store = fleet.at_oslo.store
    manifest = Manifest(CHUNK * 2, store.put(os.urandom(CHUNK)) + store.put(os.urandom(CHUNK)))
    store.save_manifest("image/debian", manifest)
    return manifest


class NoQemu:
    def close(self) -> None:
        pass


@pytest.fixture
def booted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`boot_cold` that boots nothing."""
    calls: list[dict[str, Any]] = []

    def boot_cold(spec: Any, paths: Any, **options: Any) -> NoQemu:
        paths.prepare()
        paths.overlay.write_bytes(b"overlay")
        calls.append({"spec": spec, **options})
        return NoQemu()

    monkeypatch.setattr(launch, "boot_cold", boot_cold)
    return calls


def run(client: Client, name: str = "web1", **changes: Any) -> dict[str, Any]:
    return client.wait(client.post("/v1/guests", {"name": name, "image": "debian", "memory_mib": 64, **changes}))


def test_a_guest_is_made_listed_and_removed(fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]) -> None:
    shown = run(fleet.client)
    assert (shown["state"], shown["epoch"], shown["status"]) == ("owner", 1, "dead")
    assert booted[0]["manifest"] == "guest/web1" and booted[0]["tap"] is None and booted[0]["identity"]
    assert booted[0]["spec"].disk_size == CHUNK * 2
    store = fleet.at_oslo.store
    assert store.load_manifest("guest/web1") == image
    store.drop_manifest("image/debian")  # the guest keeps its disk
    assert [g["name"] for g in fleet.client.guests()] == ["web1"]
    fleet.client.delete("/v1/guests/web1")
    assert fleet.client.guests() == [] and store.manifest_names() == []
    assert not fleet.oslo.guest_root("web1").exists()
    with pytest.raises(UnknownThing, match="no guest 'web1'"):
        fleet.client.guest("web1")


def test_epochs_go_on_after_a_removal(fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]) -> None:
    run(fleet.client)
    fleet.client.delete("/v1/guests/web1")
    assert run(fleet.client)["epoch"] == 2


def test_a_token_that_was_refused_stays_refused_when_another_guest_has_the_name(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]
) -> None:
    """Its source may not have heard of it yet; were it told that the token was taken, it would retire the only copy."""
    journal = fleet.at_oslo.journal
    journal.advance("web1", "absent", "refused", last_epoch=2, taken=0)
    assert run(fleet.client)["epoch"] == 3
    assert recovery.handle(fleet.oslo, journal, "web1", Event.TOKEN, 2) == [("refused", 2)]
    assert journal.guest("web1").state == "owner"


def test_a_guest_whose_arrival_is_not_settled_is_not_booted_from_its_image(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]
) -> None:
    run(fleet.client)
    fleet.at_oslo.journal.advance("web1", "owner", "owner", manifest="")
    booted.clear()
    with pytest.raises(Conflict, match="only just arrived"):
        fleet.client.wait(fleet.client.post("/v1/guests/web1/start", {}))
    assert booted == []


def test_a_guest_that_stopped_at_an_io_error_goes_on(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fleet.client)
    booted.clear()
    status = ["io-error"]

    def recover_io(timeout: float) -> None:
        status[0] = "running"

    qemu = SimpleNamespace(
        status=lambda: status[0], recover_io=recover_io, close=lambda: None, pid=os.getpid(), accel="tcg"
    )
    monkeypatch.setattr(residence, "adopt", lambda *_, **__: qemu)
    shown = fleet.client.wait(fleet.client.post("/v1/guests/web1/start", {}))
    assert shown["status"] == "running" and booted == []
    with pytest.raises(Conflict, match="runs already"):
        fleet.client.wait(fleet.client.post("/v1/guests/web1/start", {}))


def test_a_guest_goes_on_that_stops_only_after_its_export_was_started_again(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read waits while QEMU connects again, and may fail in the end; that QEMU does not answer is not the end."""
    run(fleet.client)
    ours = module.Guests(copy.copy(fleet.at_oslo.core), fleet.at_oslo.store, fleet.at_oslo.guests.addresses)
    monkeypatch.setattr(fleet.at_oslo.core, "is_busy", lambda _: True)  # its own watch stays away
    status = ["running"]
    tried: list[float] = []

    def says() -> str:
        if status[0] == "hangs":
            raise GuestError("no answer")
        return status[0]

    def recover_io(timeout: float) -> None:
        tried.append(timeout)
        if len(tried) == 1:
            raise GuestError("stops again")
        status[0] = "running"

    qemu = SimpleNamespace(status=says, recover_io=recover_io, close=lambda: None)
    monkeypatch.setattr(residence, "adopt", lambda *_, **__: qemu)
    paths = residence.guest_paths(fleet.oslo, "web1")
    try:
        ours.supervise()  # starts the export
        DiskExport.attach(paths.nbd_ctl)
        for status[0], times in (("hangs", 0), ("io-error", 1), ("io-error", 2)):
            ours.supervise()
            assert len(tried) == times
        with NbdReader(paths.nbd_sock, "disk0"):
            ours.supervise()
            # From now on what stops it is not that its export had died.
            status[0] = "io-error"
            ours.supervise()
            assert len(tried) == 2
    finally:
        DiskExport.attach(paths.nbd_ctl).stop()


def test_a_duplicate(fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]) -> None:
    run(fleet.client)
    with pytest.raises(Conflict, match="there is a guest 'web1' already, here"):
        run(fleet.client)
    fleet.at_oslo.journal.advance("web1", "owner", "away", owner="lisbon")
    with pytest.raises(Conflict, match="already, at site 'lisbon'"):
        run(fleet.client)
    assert len(booted) == 1


def test_auto_gives_each_guest_an_address_of_its_own(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "length_of", lambda bridge, address: 24)
    monkeypatch.setattr(module, "create_tap", lambda name: None)
    with pytest.raises(UsageError, match="guest_addresses"):
        run(fleet.client, address="auto")
    object.__setattr__(fleet.at_oslo.site, "guest_addresses", "10.77.0.100-10.77.0.101")
    given = {run(fleet.client, name, address="auto")["address"] for name in ("web1", "web2")}
    assert given == {"10.77.0.100/24", "10.77.0.101/24"}
    assert {call["spec"].gateway for call in booted} == {"10.77.0.1"}
    with pytest.raises(NoRoom, match="enlarge"):
        run(fleet.client, "web3", address="auto")


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"name": "../x"}, UsageError, "bad guest name"),
        ({"address": "10.77.0.10/24", "net": "mptcp"}, UsageError, "no addresses for guests"),
        ({"address": "10.77.0.10/24", "net": "mptcp", "agent": False}, UsageError, "set by its agent"),
        ({"name": ""}, UsageError, "bad guest name"),
        ({"image": "nix"}, UnknownThing, "no image 'nix'"),
        ({"image": "../x"}, UsageError, "bad image name"),
        ({"memory_mib": 1}, UsageError, "memory_mib"),
        ({"memory_mib": 1 << 20}, NoRoom, "give this one less memory"),
        ({"memory_mib": "much"}, UsageError, "does not make sense"),
        ({"vcpus": 0}, UsageError, "vcpus"),
        ({"address": "10.77.0.10"}, UsageError, "prefix"),
        ({"address": "nowhere"}, UsageError, "bad guest address"),
        ({"mac": "01:00:00:00:00:01"}, UsageError, "MAC"),
        ({"colour": "red"}, UsageError, "colour"),
    ],
)
def test_bad_words(fleet: Fleet, image: Manifest, changes: dict[str, Any], kind: type[HaulierError], why: str) -> None:
    with pytest.raises(kind, match=why):
        run(fleet.client, **changes)
    assert fleet.at_oslo.journal.guests() == []


def test_a_guest_that_does_not_start_leaves_nothing(
    fleet: Fleet, image: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boot_cold(spec: Any, paths: Any, **options: Any) -> NoQemu:
        paths.prepare()
        raise GuestError("it did not start")

    monkeypatch.setattr(launch, "boot_cold", boot_cold)
    with pytest.raises(GuestError, match="did not start"):
        run(fleet.client)
    assert fleet.client.guests() == []
    assert fleet.at_oslo.store.manifest_names("guest/") == []
    assert not fleet.oslo.guest_root("web1").exists()


@pytest.mark.parametrize("wanted", ["creating", "removing"])
def test_what_was_half_done_when_the_agent_was_killed_is_cleared_away(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]], wanted: str
) -> None:
    run(fleet.client)
    agent = fleet.at_oslo
    agent.journal.advance("web1", "owner", "owner", wanted=wanted)
    assert fleet.client.guests()[0]["status"] == wanted
    for call in ("start", "stop"):
        with pytest.raises(Conflict, match=f"is {wanted}"):
            fleet.client.post(f"/v1/guests/web1/{call}")
    agent.guests.adopt()
    assert fleet.client.guests() == [] and agent.store.manifest_names("guest/") == []
    assert agent.journal.guest("web1").last_epoch == 1
    agent.guests.adopt()


def test_a_guest_in_a_handoff_is_left_alone(fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]) -> None:
    run(fleet.client)
    fleet.at_oslo.journal.advance("web1", "owner", "offered", handoff="h1", pending=2)
    for method, path in (("POST", "/start"), ("POST", "/stop"), ("DELETE", "")):
        with pytest.raises(Conflict, match="haulier cancel h1"):
            fleet.client.call(method, f"/v1/guests/web1{path}", {})


def test_what_is_left_of_a_guest_that_moved_away(fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]) -> None:
    run(fleet.client)
    agent = fleet.at_oslo
    agent.store.save_manifest(residence.retained_name("web1"), image)
    agent.journal.advance("web1", "owner", "away", owner="lisbon", epoch=0, manifest="")
    assert fleet.client.guests()[0]["status"] == "at lisbon"
    with pytest.raises(Conflict, match="is at site 'lisbon': stop it there"):
        fleet.client.post("/v1/guests/web1/stop")
    fleet.client.delete("/v1/guests/web1")
    left = agent.journal.guest("web1")
    assert (left.state, left.spec, left.last_epoch) == ("absent", {}, 1) and fleet.client.guests() == []
    assert agent.store.manifest_names("retained/") == []
    fleet.client.delete("/v1/guests/web1?force=1")
    assert agent.journal.find_guest("web1") is None


def test_one_thing_at_a_time(fleet: Fleet, image: Manifest, booted: list[dict[str, Any]]) -> None:
    run(fleet.client)
    with fleet.at_oslo.core.alone("web1", "being examined"):
        with pytest.raises(Conflict, match="'web1' is busy \\(being examined\\)"):
            fleet.client.delete("/v1/guests/web1")
    fleet.client.delete("/v1/guests/web1")


def test_an_image_that_guests_build_on_stays(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fleet.client)
    agent: Agent = fleet.at_oslo
    golden_id = "a" * 64

    class Golden:
        id = golden_id
        path = fleet.oslo.golden / golden_id

        class meta:
            image = "debian"

    from haulier.agent import images

    monkeypatch.setattr(images, "list_goldens", lambda root: [Golden])
    row = agent.journal.guest("web1")
    agent.journal.advance("web1", "owner", "owner", spec={**row.spec, "golden": golden_id})
    with pytest.raises(Conflict, match="'web1' was born from"):
        agent.images.remove("debian")
    agent.journal.advance("web1", "owner", "owner", spec=row.spec)
    assert agent.images.remove("debian")["goldens"] == 1
    with pytest.raises(UnknownThing):
        agent.images.remove("debian")


def test_images_that_cannot_be_imported(fleet: Fleet, short: Any, image: Manifest) -> None:
    add = lambda **body: fleet.client.wait(fleet.client.post("/v1/images", {"warm": False, **body}))  # noqa: E731
    with pytest.raises(UnknownThing, match="no file"):
        add(name="x", file="/nonexistent")
    with pytest.raises(UsageError, match="absolute"):
        add(name="x", file="relative")
    with pytest.raises(Conflict, match="already"):
        add(name="debian", file="/etc/passwd")
    odd = short / "odd.raw"
    odd.write_bytes(b"x" * 1000)
    with pytest.raises(HaulierError, match="512"):
        add(name="x", file=str(odd))
    empty = short / "empty.raw"
    empty.write_bytes(b"")
    with pytest.raises(HaulierError):
        add(name="x", file=str(empty))
    assert fleet.at_oslo.store.manifest_names("image/") == ["image/debian"]


def test_default_gateway() -> None:
    assert default_gateway("10.77.0.10/24") == "10.77.0.1"
    assert default_gateway("10.77.0.1/24") == ""
    assert default_gateway("") == ""


def test_a_request_without_an_agent_inside_is_never_a_clone(
    fleet: Fleet, image: Manifest, booted: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_golden(*args: Any, **options: Any) -> None:
        raise AssertionError("looked for a golden snapshot")

    monkeypatch.setattr(module, "find_golden", find_golden)
    run(fleet.client, agent=False)
    assert booted[0]["identity"] is False
    assert RunRequest(name="x", image="y").agent


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[OfLxc]:
    with of_lxc(tmp_path / "lxc", "ours") as found:
        yield found


def adopt(fleet: Fleet, ours: OfLxc) -> dict[str, Any]:
    words = {"name": "web1", "container": ours.name, "folder": str(ours.folder), "memory_mib": 64}
    return fleet.client.post("/v1/lxc", words)


def attach_nothing(real: Callable[..., str]) -> Callable[..., str]:
    def call(words: list[str], *more: Any) -> str:
        if words[:3] == ["ip", "netns", "attach"]:
            raise GuestError("no namespace")
        return real(words, *more)

    return call


def fill_up(*_: Any, **__: Any) -> None:
    raise NoRoom("the disk is full")


@pytest.mark.root
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("where", ["manifest", "namespace", "end"])
def test_a_container_goes_on_whatever_its_taking_over_dies_of(
    fleet: Fleet, ours: OfLxc, monkeypatch: pytest.MonkeyPatch, where: str, killed: bool
) -> None:
    agent, pid, paths = fleet.at_oslo, ours.pid(), residence.container_paths(fleet.oslo, "web1")
    namespace = RUN / namespace_name(paths.root, "adopted")
    with monkeypatch.context() as broken:
        if where == "manifest":
            broken.setattr(agent.store, "save_manifest", fill_up)
        elif where == "namespace":
            broken.setattr(lxc, "_call", attach_nothing(lxc._call))
        else:
            take_over = lxc.take_over
            broken.setattr(lxc, "take_over", lambda *words: (take_over(*words), fill_up()))
        if killed:
            # Nothing is cleared away then, until the next agent starts.
            broken.setattr(agent.guests, "_erase", fill_up)
        with pytest.raises(HaulierError):
            adopt(fleet, ours)
    if killed:
        agent.guests.adopt()
    assert fleet.client.guests() == [] and agent.store.manifest_names("guest/") == []
    assert not paths.root.exists() and not namespace.exists()
    assert ours.pid() == pid and ours.config.exists(), "LXC has it as before"
    shown = adopt(fleet, ours)
    assert (shown["status"], shown["pid"], shown["epoch"]) == ("running", pid, 2) and namespace.exists()
    fleet.client.delete("/v1/guests/web1?force=1")
    assert ours.pid() == 0 and not namespace.exists()


@pytest.mark.root
def test_what_runs_already_is_not_ended_with_a_guest_that_is_not_made(
    fleet: Fleet, ours: OfLxc, image: Manifest, booted: list[dict[str, Any]]
) -> None:
    pid = ours.pid()
    adopt(fleet, ours)
    agent = fleet.at_oslo
    spec = residence.spec_of(agent.journal.guest("web1"))
    with pytest.raises(Conflict, match="runs already"):
        containers.launch(fleet.oslo, agent.store, spec, "guest/web1", lambda *_: None)
    agent.journal.advance("web1", "owner", "absent")
    with pytest.raises(Conflict, match="of no guest"):
        run(fleet.client)
    assert ours.pid() == pid and booted == []
    residence.clear(fleet.oslo, "web1")


@pytest.mark.root
def test_what_was_taken_over_is_started_again_where_its_files_are(fleet: Fleet, ours: OfLxc) -> None:
    pid = adopt(fleet, ours)["pid"]
    assert fleet.client.wait(fleet.client.post("/v1/guests/web1/stop", {}))["status"] == "stopped"
    started = fleet.client.wait(fleet.client.post("/v1/guests/web1/start", {}))
    assert started["status"] == "running" and started["pid"] != pid
    fleet.client.delete("/v1/guests/web1?force=1")


@pytest.mark.root
def test_lxc_knows_what_was_taken_over_and_cannot_start_it(fleet: Fleet, ours: OfLxc) -> None:
    """It is started at each start of the host; by then another site may run it."""
    adopt(fleet, ours)
    assert ours.says() == ("here", "RUNNING")
    ours.stop()
    assert not ours.start() and fleet.client.guest("web1")["status"] == "dead"
    started = fleet.client.wait(fleet.client.post("/v1/guests/web1/start", {}))
    assert started["status"] == "running" and ours.pid() == 0
    fleet.client.delete("/v1/guests/web1?force=1")


@pytest.fixture
def both(fleet: Fleet, ours: OfLxc) -> OfLxc:
    """Taken over, and then started by LXC all the same: it has another first process than the guest."""
    adopt(fleet, ours)
    ours.stop()
    next(ours.config.parent.glob("config.*")).rename(ours.config)
    assert ours.start()
    return ours


@pytest.mark.root
def test_a_guest_that_lxc_runs_is_not_started_a_second_time(fleet: Fleet, both: OfLxc) -> None:
    pid = both.pid()
    with pytest.raises(Conflict, match="LXC itself runs"):
        fleet.client.wait(fleet.client.post("/v1/guests/web1/start", {}))
    assert both.pid() == pid
    fleet.client.wait(fleet.client.post("/v1/guests/web1/stop", {}))
    assert both.pid() == 0 and not both.config.exists()
    assert fleet.client.wait(fleet.client.post("/v1/guests/web1/start", {}))["status"] == "running"
    fleet.client.delete("/v1/guests/web1?force=1")


@pytest.mark.root
def test_an_original_that_lxc_runs_is_ended_when_its_guest_runs_elsewhere(fleet: Fleet, both: OfLxc) -> None:
    residence.retire(fleet.oslo, "web1", "h1")
    assert both.pid() == 0 and not both.start() and not fleet.oslo.guest_root("web1").exists()
