"""Images in layers as two agents serve them: what is refused, what keeps an image, pushes from agent to agent."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from haulier.agent import containers
from haulier.agent import layers as agent_layers
from haulier.agent.cache import Change
from haulier.chunks.fingerprint import fingerprint
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import (
    Conflict,
    GuestError,
    HandoffFailed,
    HaulierError,
    NoRoom,
    NotTrusted,
    UnknownThing,
    UsageError,
)
from haulier.guests.model import new_spec
from haulier.handoff import residence, spawning
from haulier.handoff.journal import HandoffRow
from haulier.images import commit, layers
from haulier.session import PathAddress, Session, TlsConfig
from haulier.units import CHUNK
from tests.agent.conftest import Fleet
from tests.support.freezing import as_container, freezable
from tests.support.waiting import wait_for


def keep(store: ChunkStore, name: str, seeds: list[int], **meta: str) -> Manifest:
    fps = [store.put(random.Random(seed).randbytes(CHUNK)) for seed in seeds]
    manifest = Manifest(len(fps) * CHUNK, b"".join(fps))
    store.save_manifest(name, manifest, meta)
    return manifest


@pytest.fixture
def stack(fleet: Fleet) -> Fleet:
    store = fleet.at_oslo.store
    keep(store, "image/debian", [1, 2, 3, 4])
    keep(store, "image/web", [1, 2, 13, 4], parent="debian", guest="web1", uuid="u")
    guest(fleet, "web1", "web", "owner", "stopped")
    return fleet


def guest(fleet: Fleet, name: str, image: str, state: str, wanted: str, owner: str = "oslo") -> None:
    spec = msgspec.to_builtins(new_spec(name, image, memory_mib=64, disk_size=4 * CHUNK))
    manifest = residence.manifest_name(name)
    fleet.at_oslo.journal.advance(
        name, {"absent"}, state, owner=owner, epoch=1, last_epoch=1, spec=spec, manifest=manifest, wanted=wanted
    )
    keep(fleet.at_oslo.store, manifest, [1, 2, 13, 99])


def test_the_tree_has_guests_as_leaves(stack: Fleet) -> None:
    (debian,) = stack.client.get("/v1/image-tree")["images"]
    assert (debian["name"], debian["bytes"], debian["guests"]) == ("debian", 4 * CHUNK, [])
    (web,) = debian["children"]
    assert (web["name"], web["layer"], web["bytes"]) == ("web", "application", CHUNK)
    assert [(g["name"], g["layer"], g["bytes"]) for g in web["guests"]] == [("web1", "instance", CHUNK)]
    shown = stack.client.get("/v1/images/web")
    assert [(part["name"], part["bytes"]) for part in shown["layers"]] == [("debian", 4 * CHUNK), ("web", CHUNK)]
    assert shown["guests"] == ["web1"] and shown["children"] == []
    listed = {each["name"]: each for each in stack.client.images()}
    assert listed["debian"]["children"] == ["web"] and listed["web"]["parent"] == "debian"


def test_an_image_that_something_needs_is_kept(stack: Fleet) -> None:
    with pytest.raises(Conflict, match="'web' is a layer on image 'debian'"):
        stack.client.delete("/v1/images/debian")
    with pytest.raises(Conflict, match="'web1' was made from image 'web'"):
        stack.client.delete("/v1/images/web")
    stack.at_oslo.journal.advance("web1", "owner", "absent", spec={})
    stack.client.delete("/v1/images/web")
    stack.client.delete("/v1/images/debian")
    with pytest.raises(UnknownThing):
        stack.client.delete("/v1/images/debian")


def test_commits_that_are_refused(stack: Fleet) -> None:
    def ask(guest: str, name: str = "new") -> dict[str, Any]:
        return stack.client.wait(stack.client.post("/v1/image-commits", {"guest": guest, "name": name}))

    with pytest.raises(UnknownThing, match="nobody"):
        ask("nobody")
    with pytest.raises(UsageError):
        ask("web1", "New Image")
    with pytest.raises(Conflict, match="already"):
        ask("web1", "debian")
    guest(stack, "gone", "web", "away", "", owner="lisbon")
    with pytest.raises(Conflict, match="at site 'lisbon'"):
        ask("gone")
    guest(stack, "half", "web", "owner", "creating")
    with pytest.raises(Conflict, match="creating"):
        ask("half")
    guest(stack, "orphan", "lost", "owner", "stopped")
    with pytest.raises(UnknownThing, match="push it here first"):
        ask("orphan")
    with pytest.raises(HaulierError):
        ask("web1")  # it has no overlay
    guest(stack, "late", "web", "owner", "stopped")
    there = Manifest(CHUNK, fingerprint(b"of another site"))
    stack.at_oslo.store.save_manifest(residence.manifest_name("late"), there, partial=True)
    with pytest.raises(Conflict, match="'haulier fill late'"):
        ask("late")
    # Its worker has not begun yet: the guest is this site's as before, and may be frozen for the handoff at any moment.
    stack.at_oslo.journal.add_handoff(HandoffRow(id="h1", guest="web1", role="source", peer="lisbon"))
    with pytest.raises(Conflict, match=r"handed over \(handoff h1\)"):
        ask("web1")
    assert stack.at_oslo.store.manifest_names("image/") == ["image/debian", "image/web"]


def test_a_handoff_that_began_meanwhile_keeps_a_commit_away(stack: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    own, journal = stack.at_oslo.layers, stack.at_oslo.journal
    looked = own._check_new

    def begins(name: str) -> None:
        if not journal.handoffs(guest="web1"):
            journal.add_handoff(HandoffRow(id="h1", guest="web1", role="source", peer="lisbon"))
        looked(name)

    monkeypatch.setattr(own, "_check_new", begins)
    with pytest.raises(Conflict, match=r"handed over \(handoff h1\)"):
        stack.client.wait(stack.client.post("/v1/image-commits", {"guest": "web1", "name": "new"}))


def test_a_commit_ends_the_guests_prefetch_first(stack: Fleet) -> None:
    journal = stack.at_oslo.journal
    journal.add_handoff(HandoffRow(id="p1", guest="web1", role="prefetch-source", peer="lisbon", created=1.0))
    with pytest.raises(HaulierError):  # it has no overlay
        stack.client.wait(stack.client.post("/v1/image-commits", {"guest": "web1", "name": "new"}))
    assert journal.handoff("p1").state == "ended"


def test_a_handoff_begins_with_a_guest_that_does_not_stand_still(stack: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.at_oslo.journal.advance("web1", "owner", "owner", wanted="running")
    mark = commit.still_mark(stack.oslo.guest_root("web1"))
    mark.parent.mkdir(parents=True)
    mark.touch()
    found: list[bool] = []

    def start_source(*of: Any) -> None:
        found.append(mark.exists())
        raise HandoffFailed("far enough")

    monkeypatch.setattr(spawning, "start_source", start_source)
    with pytest.raises(HandoffFailed):
        stack.client.start_handoff("web1", "lisbon")
    assert found == [False]


def test_a_push_from_agent_to_agent(stack: Fleet) -> None:
    def push(**words: str) -> dict[str, Any]:
        return stack.client.wait(stack.client.post("/v1/image-pushes", words))

    report = push(name="web", to="lisbon")
    assert (report["source"], report["target"], report["layers"]) == ("oslo", "lisbon", ["debian", "web"])
    assert [item["lacking"] for item in report["items"]] == [4, 1]
    there = stack.at_lisbon.layers.show("web")
    assert there["digest"] == stack.at_oslo.layers.show("web")["digest"] and there["parent"] == "debian"
    assert push(name="web", to="lisbon")["items"] == []
    with pytest.raises(UnknownThing):
        push(name="web", to="nowhere")
    with pytest.raises(Conflict, match="this site"):
        push(name="web", to="oslo")
    with pytest.raises(UnknownThing):
        push(name="nothing", to="lisbon")


def past(store: ChunkStore, seeds: list[int]) -> list[bytes]:
    """Chunks that nothing refers to any more."""
    fps = list(keep(store, "past", seeds).chunks())
    store.drop_manifest("past")
    return fps


def test_a_push_makes_room_in_the_cache_of_the_site_that_takes_it(stack: Fleet) -> None:
    at = stack.at_lisbon
    # chunk 13 is of the image: what is wanted here must not go to make room for the rest of it
    old, wanted = past(at.store, list(range(100, 120))), past(at.store, [13])
    at.cache.change(Change(policy="lru", budget=23 * (CHUNK + 64)))
    assert at.store.missing([*old, *wanted]) == []
    report = stack.client.wait(stack.client.post("/v1/image-pushes", {"name": "web", "to": "lisbon"}))
    assert [item["lacking"] for item in report["items"]] == [4, 0]
    assert 2 <= len(at.store.missing(old)) <= 4
    assert at.cache.facts()["used"] <= at.cache.budget


def test_a_push_that_the_budget_has_no_room_for_is_refused_before_anything_is_sent(stack: Fleet) -> None:
    at = stack.at_lisbon
    used = list(keep(at.store, "image/own", list(range(100, 110))).chunks())
    old = past(at.store, [*range(200, 204), 1])
    at.cache.change(Change(budget=14 * (CHUNK + 64)))
    before = at.store.missing(old)
    with pytest.raises(NoRoom, match=r"lisbon.*budget.*haulier cache budget"):
        stack.client.wait(stack.client.post("/v1/image-pushes", {"name": "web", "to": "lisbon"}))
    assert at.store.missing(used) == [] and at.store.missing(old) == before, "nothing was evicted for it"
    # and it holds on to nothing
    wait_for(lambda: at.store.manifest_names("incoming/") == [] and at.store.leases() == [], 20)
    assert at.store.manifest_names("image/") == ["image/own"]


def test_offers_of_a_push_are_checked(stack: Fleet) -> None:
    offer = {"push": "p1", "secret": "0" * 64, "images": [["web", "0" * 64]]}
    with pytest.raises(NotTrusted):
        stack.client.post("/v1/peer/pushes", offer)
    for wrong in (
        {"secret": "short"},
        {"images": []},
        {"images": [["../x", "0" * 64]]},
        {"push": "/"},
        {"images": "x"},
    ):
        with pytest.raises(HaulierError):
            stack.to_lisbon().post("/v1/peer/pushes", offer | wrong)
    assert stack.at_lisbon.core.jobs.all() == []


def test_pushes_that_are_taken_at_a_time_are_few(stack: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    at, secret = stack.at_lisbon, "5e" * 32
    offer = {"secret": secret, "images": [["other", "0" * 64]]}
    open_at: list[int] = []

    def offers(number: int) -> None:
        answer = stack.to_lisbon().post("/v1/peer/pushes", {"push": f"p{number}", **offer})
        open_at.append(answer["port"])

    def ends(port: int) -> None:
        tls = TlsConfig(stack.oslo.certificate, stack.oslo.key, stack.oslo.ca_certificate, "lisbon")
        before = running()
        session = Session.connect(tls, bytes.fromhex(secret), [PathAddress("127.0.0.1", port)])
        assert session.wait_connected(20)
        session.close()
        wait_for(lambda: running() < before, 20)

    def running() -> int:
        return sum(job.state == "running" for job in at.core.jobs.all())

    def push() -> None:
        stack.client.wait(stack.client.post("/v1/image-pushes", {"name": "web", "to": "lisbon"}))

    offers(1), offers(2)
    with pytest.raises(NoRoom, match="try again when one has ended"):
        offers(3)
    with pytest.raises(NoRoom, match="2 pushes of a site at a time"):
        push()
    assert running() == 2
    ends(open_at[0])
    monkeypatch.setattr(agent_layers, "MAX_ARRIVALS", (3, 1))
    with pytest.raises(NoRoom, match="1 in all"):
        push()
    monkeypatch.undo()
    push()
    wait_for(lambda: running() == 1, 20)
    offers(4)
    ends(open_at[1]), ends(open_at[2])

    def breaks(*of: Any, **more: Any) -> Any:
        raise OSError("no thread")

    with monkeypatch.context() as broken:
        broken.setattr(at.core.jobs, "start", breaks)
        for number in (5, 6, 7):
            with pytest.raises(HaulierError, match="failed inside the agent"):
                offers(number)
    assert at.layers._arrivals.total() == 0


def test_leases_of_pushes_end_with_the_agent(stack: Fleet) -> None:
    stack.at_oslo.store.add_lease("push/p1")
    stack.at_oslo.store.add_lease("handoff/h1")
    stack.at_oslo.layers.adopt()
    assert stack.at_oslo.store.leases() == ["handoff/h1"]


def test_a_guest_that_stands_still_for_a_commit_is_let_go(stack: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = residence.guest_paths(stack.oslo, "web1")
    paths.root.mkdir(parents=True)
    done: list[str] = []

    class Qmp:
        def execute(self, command: str, args: Any = None, timeout: float = 30) -> Any:
            done.append(command)
            return []

    class Paused:
        qmp = Qmp()

        def status(self) -> str:
            return "paused"

        def cont(self) -> None:
            done.append("cont")

        def guest_agent(self, timeout: float) -> Any:
            raise commit.GuestError("no agent")

        def close(self) -> None:
            done.append("close")

    monkeypatch.setattr(commit.Qemu, "adopt", lambda paths, worker: Paused())
    stack.at_oslo.layers.adopt()
    assert done == [], "no guest stands still"
    (paths.root / "still").touch()
    stack.at_oslo.layers.adopt()
    assert done[-2:] == ["cont", "close"] and not (paths.root / "still").exists()


def test_a_guest_that_a_commit_could_not_let_run_on_is_let_later(stack: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = commit.still_mark(stack.oslo.guest_root("web1"))
    mark.parent.mkdir(parents=True)
    mark.write_bytes(commit.FREEZE)
    own, asked = stack.at_oslo.layers, []

    def release(paths: Any) -> None:
        asked.append(stack.at_oslo.core.is_busy("web1"))
        if len(asked) == 1:
            raise GuestError("it does not thaw")
        mark.unlink()

    monkeypatch.setattr(commit, "release", release)
    monkeypatch.setattr(agent_layers, "RELEASE_AGAIN_S", 0.0)
    with stack.at_oslo.core.alone("web1", "being committed"):
        own.supervise()
    assert asked == [], "a commit may be under way"
    own.supervise()
    assert mark.exists()
    own.supervise()
    own.supervise()
    assert asked == [True, True] and not mark.exists()


@pytest.mark.root
def test_a_container_that_stands_still_for_a_commit_is_let_go(stack: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    site, journal = stack.oslo, stack.at_oslo.journal
    with freezable() as (child, freezer):
        spec = as_container(site, "web1", child)
        journal.advance("web1", "owner", "owner", spec=msgspec.to_builtins(spec), wanted="running")
        residence.container_paths(site, "web1").upper.mkdir()
        mark = commit.still_mark(site.guest_root("web1"))

        def fails(*args: Any, **options: Any) -> None:
            assert freezer.frozen() and mark.exists(), "who is killed now leaves a mark"
            raise NoRoom("no room")

        monkeypatch.setattr(containers, "import_container", fails)
        with ChunkStore(site.store) as store, pytest.raises(NoRoom):
            containers.commit(site, store, spec, "new", lambda share, what: None)
        assert not freezer.asked() and not mark.exists()

        freezer.freeze()
        stack.at_oslo.layers.adopt()
        assert freezer.frozen(), "not for a commit"
        mark.touch()
        journal.add_handoff(HandoffRow(id="h1", guest="web1", role="source", peer="lisbon"))
        stack.at_oslo.layers.adopt()
        assert freezer.frozen() and mark.exists(), "it may stand still for its handoff"
        journal.end_handoff("h1", "failed")
        stack.at_oslo.layers.adopt()
        assert not freezer.asked() and not mark.exists()


def arrived(fleet: Fleet, name: str, image: str) -> None:
    """A guest of `image` that came to lisbon from oslo."""
    spec = msgspec.to_builtins(new_spec(name, image, memory_mib=64, disk_size=4 * CHUNK))
    fleet.at_lisbon.journal.advance(
        name, {"absent"}, "owner", owner="lisbon", epoch=2, last_epoch=2, spec=spec, manifest="", wanted="running"
    )
    fleet.at_lisbon.journal.add_handoff(HandoffRow(id="h1", guest=name, role="target", peer="oslo"))


def test_a_site_learns_what_the_images_of_its_guests_consist_of(stack: Fleet) -> None:
    store, learn = stack.at_lisbon.store, stack.at_lisbon.layers.learn
    arrived(stack, "web1", "web")
    learn()
    assert store.manifest_names() == ["layer/debian", "layer/web"]
    split = layers.split_of(store, "web")
    seeds = {1: "base", 13: "application", 99: "instance"}
    assert {seed: split.of(fingerprint(random.Random(seed).randbytes(CHUNK))) for seed in seeds} == seeds
    assert stack.at_lisbon.layers.tree() == [] and store.stats().chunks == 0, "an image that is not here is not shown"
    # Where the image itself comes, what was learnt goes; and so where the guest goes.
    stack.client.wait(stack.client.post("/v1/image-pushes", {"name": "debian", "to": "lisbon"}))
    learn()
    assert store.manifest_names() == ["image/debian", "layer/web"]
    assert layers.chain(store, "web", learnt=True) == ["debian", "web"]
    stack.at_lisbon.journal.advance("web1", "owner", "absent", spec={})
    learn()
    assert store.manifest_names() == ["image/debian"]


def test_a_site_that_says_nothing_is_not_asked_all_the_time(stack: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived(stack, "odd", "nobody-has-it")
    asked: list[str] = []
    peer = stack.at_lisbon.core.peer

    def counted(name: str) -> Any:
        asked.append(name)
        return peer(name)

    monkeypatch.setattr(stack.at_lisbon.core, "peer", counted)
    for _ in range(3):
        stack.at_lisbon.layers.learn()
    assert asked == ["oslo"] and stack.at_lisbon.store.manifest_names() == []
