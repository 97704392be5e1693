"""What attempts leave: kept, found again, compared, and gone by budget, age and gc."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from haulier.agent.site import Site
from haulier.chunks.manifest import Manifest
from haulier.chunks.store import ChunkStore
from haulier.errors import Corrupt, NoRoom
from haulier.handoff import agreeing, attempts, retained
from haulier.handoff.attempts import Attempt, Kept, over
from haulier.handoff.messages import Compare, GivenUp, GiveUp, Unlike, encode
from haulier.memory import salvage
from haulier.memory.base import MemoryBase
from haulier.memory.mirror import Mirror
from haulier.session import Settings
from haulier.units import CHUNK, PAGE

UUID = "8b7c5ad4-6d9e-4c43-9a1a-0f3c5d2b1a00"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path / "site", "oslo", "127.0.0.1:7440", ram=str(tmp_path / "ram"))
    site.make_directories()
    return site


def cut(site: Site, handoff: str, pages: dict[int, int], *, guest: str = "web1", peer: str = "lisbon") -> bool:
    """An attempt that sent these pages and was cut."""
    mirror = Mirror.create(site.mirror(handoff), {"ram0": 64 * PAGE})
    for page, fill in pages.items():
        mirror.set(np.array([page]), np.full((1, PAGE), fill, np.uint8))
    mirror.close()
    meta = Attempt(handoff=handoff, guest=guest, uuid=UUID, peer=peer)
    kept = attempts.keep(site, meta, site.mirror(handoff), None)
    assert not site.mirror(handoff).exists()
    return kept


def test_what_was_sent_is_found_by_the_next_attempt(site: Site) -> None:
    assert cut(site, "h1", {3: 7})
    assert retained.candidates(site, "web1", UUID, "") == ["attempt:h1"]
    base = retained.open_base(site, "web1", UUID, "attempt:h1")
    assert base is not None and base.view("ram0")[3][0] == 7
    assert retained.candidates(site, "web1", UUID[::-1], "") == [], "another guest of that name"


def test_each_site_that_a_guest_was_to_go_to_has_its_own_and_the_later_replaces_the_earlier(site: Site) -> None:
    cut(site, "h1", {3: 7})
    cut(site, "h2", {3: 8}, peer="porto")
    cut(site, "h3", {3: 9})
    assert retained.candidates(site, "web1", UUID, "") == ["attempt:h3", "attempt:h2"]
    with pytest.raises(Corrupt, match="try again"):
        retained.open_base(site, "web1", UUID, "attempt:h1")


def test_a_handoff_that_ends_well_leaves_its_own_picture_alone(site: Site) -> None:
    cut(site, "h1", {3: 7})
    mirror = Mirror.create(site.mirror("h2"), {"ram0": 64 * PAGE})
    mirror.complete()
    mirror.close()
    meta = retained.Retained(id="x", guest="web1", uuid=UUID, epoch=2)
    retained.keep(site, meta, site.mirror("h2"))
    assert retained.candidates(site, "web1", UUID, "") == ["x"]


def test_nothing_is_kept_of_nothing_or_where_nothing_may_be(site: Site) -> None:
    meta = Attempt(handoff="h1", guest="web1", uuid=UUID, peer="lisbon")
    assert not attempts.keep(site, meta, site.mirror("h1"), None)
    site.mirror("h1").write_bytes(b"no mirror at all" * 300)
    assert not attempts.keep(site, meta, site.mirror("h1"), None)
    assert not site.mirror("h1").exists()
    assert not cut(replace(site, keep_bytes=0), "h2", {1: 1})
    assert attempts.candidates(site, "web1", UUID) == []


def test_what_could_not_be_kept_takes_no_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, base: MemoryBase | None) -> None:
        raise NoRoom("no room")

    monkeypatch.setattr(salvage, "salvage", full)
    assert not cut(site, "h1", {3: 7})
    assert not list(site.attempts.glob("*/*"))


def test_an_attempt_that_sent_nothing_does_not_replace_one_that_did(site: Site) -> None:
    cut(site, "h1", {3: 7})
    assert not cut(site, "h2", {})
    assert attempts.candidates(site, "web1", UUID) == ["attempt:h1"]


def test_over_the_budget_the_oldest_go(site: Site) -> None:
    small = replace(site, keep_bytes=3 * CHUNK)
    for number in range(6):
        cut(small, f"h{number}", {1: 1}, guest=f"g{number}")
    kept = [one.guest for one in attempts.kept(site)]
    assert kept and kept == [f"g{n}" for n in range(6 - len(kept), 6)]
    assert sum(one.bytes for one in attempts.kept(site)) <= 3 * CHUNK
    assert attempts.expire(site, everything=True, dry_run=True) and attempts.kept(site)
    attempts.expire(site, everything=True)
    assert attempts.kept(site) == []


def test_what_goes_is_the_old_then_the_oldest() -> None:
    things = [
        Kept(guest=str(at), kind="cut", peer="", bytes=10, at=at, path="") for at in (50.0, 10.0, 30.0, 40.0, 20.0)
    ]
    assert [one.at for one in over(things, 60, 1000, 100)] == []
    assert [one.at for one in over(things, 60, 1000, 35)] == [10, 20]
    assert [one.at for one in over(things, 60, 20, 35)] == [10, 20, 30]
    assert len(over(things, 60, 0, 100)) == 5


def test_old_things_go_by_age(site: Site) -> None:
    cut(site, "h1", {3: 7})
    (path,) = site.attempts.glob("*/*/meta.json")
    text = path.read_text()
    path.write_text(text.replace('"at":', '"at":0.0,"was":'))
    assert [one.at for one in attempts.kept(site)] == [0.0]
    cut(site, "h2", {3: 7}, guest="web2")
    assert [one.guest for one in attempts.kept(site)] == ["web2"]


def test_the_chunks_that_came_stay_known_until_they_are_old(site: Site) -> None:
    with ChunkStore(site.store) as store:
        fp = store.put(os.urandom(CHUNK))
        store.save_manifest("incoming/h1", Manifest(CHUNK, fp))
        attempts.keep_chunks(store, "web1", "incoming/h1")
        attempts.keep_chunks(store, "web2", "incoming/none")
        assert store.manifest_names("attempt/") == ["attempt/web1"] and not store.is_pinned("attempt/web1")
        assert attempts.expire_chunks(store, 60) == []
        assert attempts.expire_chunks(store, 0) == ["attempt/web1"] and store.has(fp)


class Line:
    """The source's control channel, with the target's answers at its other end."""

    def __init__(self, target: agreeing.TargetComparison) -> None:
        self.target = target
        self.answers: list[Any] = []

    def send(self, message: Any) -> None:
        answer = self.target.compare(message) if isinstance(message, Compare) else self.target.give_up(message)
        self.answers.append(answer)

    def wait(self, kind: type, timeout: float) -> Any:
        (answer,) = self.answers
        self.answers = []
        assert isinstance(answer, kind) and isinstance(answer, Unlike | GivenUp)
        return answer


def pictures(site: Site) -> tuple[MemoryBase, MemoryBase]:
    cut(site, "h1", {3: 7, 40: 1, 41: 2})
    cut(site, "h2", {3: 7, 40: 1, 42: 5}, peer="porto")
    return attempts.open_base(site, "web1", "attempt:h1"), attempts.open_base(site, "web1", "attempt:h2")


def test_two_sites_end_with_the_same_picture(site: Site) -> None:
    mine, theirs = pictures(site)
    line = Line(agreeing.TargetComparison(theirs))
    assert agreeing.at_source(mine, "attempt:h1", cast(Any, line)) == 2
    assert salvage.regions(mine) == salvage.regions(theirs)
    assert mine.view("ram0")[40][0] == 1 and mine.view("ram0")[3][0] == 7
    assert agreeing.at_source(mine, "attempt:h1", cast(Any, line)) == 0


def test_pictures_that_are_too_unlike_are_given_up_whole(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(site, "h1", {3: 7, 40: 1, 41: 2})
    cut(site, "h2", {3: 8, 40: 2, 41: 2}, peer="porto")
    mine, theirs = (attempts.open_base(site, "web1", f"attempt:{name}") for name in ("h1", "h2"))
    monkeypatch.setattr(salvage, "MOST_UNLIKE", 1)
    assert agreeing.at_source(mine, "attempt:h1", cast(Any, Line(agreeing.TargetComparison(theirs)))) == 64
    assert salvage.regions(mine) == salvage.regions(theirs) == bytes(16)
    mirror = Mirror.create(None, {"ram0": 64 * PAGE}, mine)
    assert not mirror.view.any()
    mirror.close()


def test_the_largest_messages_of_a_comparison_go_through_a_session() -> None:
    most, pages = salvage.MOST_UNLIKE, salvage.MOST_UNLIKE * salvage.REGION
    largest = [
        Compare(bytes(salvage.MAX_PAGES // salvage.REGION * 8)),
        Unlike(bytes(4 * most), bytes(8 * pages)),
        GiveUp(bytes(pages // 8)),
    ]
    assert all(len(encode(message)) <= Settings().max_message for message in largest)


def test_what_two_sites_could_not_compare_is_not_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(salvage, "MAX_PAGES", 63)
    assert not cut(site, "h1", {3: 7})
    assert not list(site.attempts.glob("*/*"))
    monkeypatch.setattr(salvage, "MAX_PAGES", 64)
    assert cut(site, "h1", {3: 7})


@pytest.mark.parametrize("regions", [b"\0" * 3, b"\1\0\0\0" * 2, b"\1\0\0\0\0\0\0\0"], ids=["cut", "twice", "back"])
def test_a_list_of_regions_that_makes_no_sense_is_refused(site: Site, regions: bytes) -> None:
    mine = pictures(site)[0]
    count = len(regions) // 4 * salvage.REGION * 8
    line = SimpleNamespace(send=lambda message: None, wait=lambda kind, timeout: Unlike(regions, bytes(count)))
    with pytest.raises(Corrupt, match="makes no sense"):
        agreeing.at_source(mine, "attempt:h1", cast(Any, line))


def test_other_pictures_are_not_compared(site: Site) -> None:
    assert agreeing.at_source(None, "", cast(Any, None)) == 0
    assert agreeing.at_source(pictures(site)[0], "golden:x", cast(Any, None)) == 0


def test_messages_in_a_wrong_order_or_form_are_refused(site: Site) -> None:
    mine, theirs = pictures(site)
    target = agreeing.TargetComparison(theirs)
    with pytest.raises(Corrupt, match="wrong order"):
        target.give_up(GiveUp(b""))
    target.compare(Compare(salvage.regions(mine)))
    with pytest.raises(Corrupt, match="wrong order"):
        target.give_up(GiveUp(b"x" * 99))
    with pytest.raises(Corrupt, match="form"):
        target.compare(Compare(b"12345678"))
