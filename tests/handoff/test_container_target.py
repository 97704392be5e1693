"""What a container's target builds while chunks come, and that it builds nothing more once the handoff is over."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from haulier.agent.containers import first_manifest
from haulier.chunks.store import ChunkStore
from haulier.containers import container as containers
from haulier.containers.importing import import_container
from haulier.containers.model import ContainerSpec
from haulier.handoff import container_target
from haulier.handoff.container_target import ContainerTarget
from haulier.handoff.journal import HandoffRow, Journal
from haulier.handoff.messages import Job, PrepareMemory
from haulier.handoff.ownership import State
from haulier.units import CHUNK
from tests.handoff.hosts import GUEST, HANDOFF, OFFER, SPEC
from tests.support.agents import make_site
from tests.support.waiting import wait_for


class Building(ContainerTarget):
    """One that has all chunks, and a network that is only noted in `prepared`."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.prepared: list[str] = []
        self.said: list[Any] = []
        session = SimpleNamespace(on=lambda *_: None)
        self.control = SimpleNamespace(session=session, send=self.said.append, tell=self.said.append)  # type: ignore[assignment]
        self._space = None  # type: ignore[assignment]

    def begin(self) -> None:
        self._prepare_memory(PrepareMemory(""))

    def prepare(self, spec: Any, paths: containers.ContainerPaths, lower: object, attempt: str) -> Any:
        self.prepared.append(attempt)
        paths.upper.mkdir(exist_ok=True)
        quiet = dict.fromkeys(("hush", "begin_restore", "widen", "finish_restore", "quieten"), lambda *_: None)
        return SimpleNamespace(**quiet)


@pytest.fixture
def building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Building]:
    site = make_site(tmp_path / "l", "lisbon")
    site.handoff_root(HANDOFF).mkdir(parents=True)
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(3 * CHUNK))
    with ChunkStore(site.store) as store:
        image = import_container(store, "app", source)
    own = ContainerSpec(layers=(len(image),), command=("x",))
    spec = msgspec.structs.replace(SPEC, container=own, disk_size=(len(image) + 4) * CHUNK)
    offer = msgspec.structs.replace(OFFER, spec=msgspec.to_builtins(spec))
    with Journal(site.journal) as journal:
        journal.advance(
            GUEST, "absent", State.RECEIVING.value, pending=4, last_epoch=4, handoff=HANDOFF, spec=offer.spec
        )
        journal.add_handoff(HandoffRow(HANDOFF, GUEST, "target", "oslo", epoch=4))
        job = Job(handoff=HANDOFF, role="target", guest=GUEST, peer="oslo", offer=offer)
        made = Building(site, journal, job, threading.Event())
        made._receiver = SimpleNamespace(manifest=first_manifest(spec, image))  # type: ignore[assignment]
        monkeypatch.setattr(container_target.containers, "driver_of", lambda spec: made)
        try:
            yield made
        finally:
            made._stop_building()
            if made._proxy is not None:
                made._proxy.close()
            made._store.close()


def test_what_an_earlier_attempt_left_of_the_containers_files_is_gone(building: Building) -> None:
    stale = containers.ContainerPaths(building.site.guest_root(GUEST), building.site.run).upper / "folder/deleted"
    stale.parent.mkdir(parents=True)
    stale.touch()
    building.begin()
    wait_for(lambda: building._upper_manifest is not None)
    assert building.prepared == [HANDOFF]
    assert not stale.exists()


def test_a_handoff_that_ends_while_another_unpacks_waits_for_nobody(building: Building) -> None:
    layers = building.site.layers
    layers.mkdir(exist_ok=True)
    lock = os.open(layers, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        building.begin()
        building._stop_building()
        assert building._builder is not None and not building._builder.is_alive()
    finally:
        os.close(lock)
    assert not building.prepared and not list(layers.iterdir())


@pytest.mark.parametrize("when", ["a layer is half made", "layers are there", "files are written"])
def test_nothing_more_is_made_once_the_handoff_is_over(
    building: Building, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    make, get, prepare = container_target.make_layers, building._store.get, building.prepare

    def over(*_: object) -> None:
        building._closing = True

    def get_last(fingerprint: bytes) -> bytes:
        over()
        return get(fingerprint)

    def make_all(*words: Any, **more: Any) -> list[Path]:
        made = make(*words, **more)
        over()
        return made

    def prepare_it(*words: Any) -> Any:
        over()
        return prepare(*words)

    if when == "a layer is half made":
        monkeypatch.setattr(building._store, "get", get_last)
    elif when == "layers are there":
        monkeypatch.setattr(container_target, "make_layers", make_all)
    else:
        monkeypatch.setattr(building, "prepare", prepare_it)
    building.begin()
    assert building._builder is not None
    building._builder.join(30)
    assert not building._builder.is_alive()
    assert bool(building.prepared) == (when == "files are written")
    assert building._upper_manifest is None and not any(isinstance(word, Exception) for word in building.said)
    if when == "a layer is half made":
        assert not list(building.site.layers.iterdir())


@pytest.mark.parametrize("error", ["", "the disk is broken"])
def test_a_copy_is_whole_only_when_its_files_are_on_disk(
    building: Building, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    synced: list[Path] = []

    def sync(folder: Path) -> None:
        if error:
            raise OSError(error)
        assert "loaded" not in building.said
        synced.append(folder)

    monkeypatch.setattr(container_target, "sync_files", sync)
    for name in ("hurry", "save_signatures"):
        monkeypatch.setattr(container_target, name, lambda *_: None)
    monkeypatch.setattr(container_target.containers, "mount", lambda *_: None)
    for name in ("_dump_is_here", "_assemble"):
        monkeypatch.setattr(building, name, lambda *_: True)
    building.begin()
    wait_for(lambda: building._upper_manifest is not None)
    building._checkpoint = SimpleNamespace(pages=(), digests=[], give_back=lambda *_: None)  # type: ignore[assignment]
    building._tasks.put((building._upper_manifest, True))  # type: ignore[arg-type]
    wait_for(lambda: len(building.said) > 1)
    assert building._builder is not None
    building._builder.join(30)
    told = [word for word in building.said if word == "loaded" or isinstance(word, Exception)]
    assert [str(word) for word in told] == [error or "loaded"]
    assert synced == ([] if error else [building.container_paths.upper])
