"""The plan of all sites' caches: the pure part, and what a coordinator makes of what sites report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from haulier.coordinator import bitmaps
from haulier.coordinator import messages as m
from haulier.coordinator import planner as planner_module
from haulier.coordinator.bitmaps import Bits
from haulier.coordinator.index import Link
from haulier.coordinator.planning import Layer, Place, layers_of, make_plan
from haulier.coordinator.service import Coordinator
from haulier.units import CHUNK
from tests.coordinator.samples import Clock, Site, fps, sqlite_coordinator

NEAR = {"oslo": {"bergen": Link(1e9)}}


def bits(numbers: range) -> Bits:
    made = bitmaps.empty()
    made.update(numbers)
    return made


def layer(name: str, numbers: range, **wanted: float) -> Layer:
    return Layer(name.encode() * 32, (f"image/{name}",), "base", bits(numbers), wanted)


def test_layers_share_no_chunk_and_bases_come_first() -> None:
    web, debian = bits(range(20)), bits(range(15))
    found = layers_of([(b"w", ("image/web",), "application", web), (b"d", ("image/debian",), "base", debian)])
    assert [(each.names, each.size) for each in found] == [(("image/debian",), 15 * CHUNK), (("image/web",), 5 * CHUNK)]
    assert layers_of([(b"a", (), "base", debian), (b"b", (), "application", debian)])[1:] == []


def test_neighbours_keep_one_copy_each_of_two_layers_and_not_two_of_one() -> None:
    layers = [layer("a", range(10), oslo=6, bergen=5), layer("b", range(10, 20), oslo=3, bergen=4)]
    both = bits(range(10))
    places = [Place("oslo", 10 * CHUNK, both), Place("bergen", 10 * CHUNK, bits(range(20)))]
    plan = make_plan(layers, places, NEAR, 5.0)
    assert sorted([plan.keep["oslo"], plan.keep["bergen"]], key=min) == [bits(range(10)), bits(range(10, 20))]
    facts = {each["site"]: each for each in plan.facts["sites"]}
    # what bergen has of a is too much, as oslo keeps it: oslo's copy is not, though bergen has one too
    assert plan.over["bergen"] == both and not len(plan.over["oslo"])
    assert [each["names"] for each in facts["bergen"]["over"]] == [["image/a"]]
    assert plan.facts["fetch_s_saved"] < 0, "bergen has twice what it has room for, and must lose something"


def test_what_is_missing_would_save_fetches_and_what_is_pinned_takes_no_room() -> None:
    layers = [layer("a", range(10), rome=9), layer("b", range(10, 20), rome=5), layer("c", range(20, 30), rome=1)]
    places = [
        Place("oslo", 0, bits(range(30)), frozenset(each.digest for each in layers)),
        Place("rome", 15 * CHUNK, bits(range(20, 30)), frozenset({layers[2].digest})),
    ]
    plan = make_plan(layers, places, {}, 5.0)
    assert plan.keep["rome"] == bits(range(10)) | bits(range(20, 30))
    rome = plan.facts["sites"][1]
    assert [each["names"] for each in rome["missing"]] == [["image/a"]]
    assert [(each["names"], each["pinned"]) for each in rome["keep"]] == [(["image/c"], True)]
    # nine uses (less the first, which says little), from afar at 10 Mbps
    assert plan.facts["fetch_s_saved"] > 8 * 10 * CHUNK * 8 / 10e6


def test_no_site_relies_on_a_copy_that_the_plan_does_not_keep() -> None:
    held = bits(range(10))
    plan = make_plan([layer("a", range(10))], [Place(name, 10 * CHUNK, held) for name in ("oslo", "bergen")], NEAR, 5.0)
    assert not any(map(len, [*plan.keep.values(), *plan.over.values()])), "nobody wants it, and neither goes first"
    assert [each["elsewhere"] for site in plan.facts["sites"] for each in site["over"]] == [False, False]


def test_a_plan_is_bounded() -> None:
    layers = [layer(chr(97 + n), range(n, n + 1), s00=26 - n) for n in range(20)]
    places = [Place(f"s{n:02}", CHUNK, bitmaps.empty()) for n in range(80)]
    plan = make_plan(layers, places, {}, 0.0)
    assert plan.facts["left_out"]["sites"] == 16 and "s79" not in plan.keep


# -- from what sites report ----------------------------------------------------------------------------------------


def says(coordinator: Coordinator, site: str, room: int, *unpinned: str) -> None:
    coordinator.hello(site, m.HelloReport(control="127.0.0.1:1", budget=room, room=room, unpinned=list(unpinned)))


def facts(coordinator: Coordinator, site: str, numbers: range) -> list[int]:
    return coordinator.facts(m.FactsQuery(fingerprints=m.join(fps(numbers)), site=site)).plan


def wants(coordinator: Coordinator, site: str, numbers: range, times: int) -> None:
    for _ in range(times):
        coordinator.holders(m.HoldersQuery(fingerprints=m.join(fps(numbers)), site=site))
        coordinator.plan()


def two_images(coordinator: Coordinator) -> None:
    oslo, rome = Site(coordinator, "oslo"), Site(coordinator, "rome")
    for name, numbers in (("image/web", range(5)), ("image/db", range(5, 10))):
        oslo.has_manifest(name, numbers)
    oslo.report(range(10))
    rome.report(range(10))
    says(coordinator, "oslo", 0)
    says(coordinator, "rome", 7 * CHUNK)


def test_a_site_is_told_what_the_plan_keeps_there(tmp_path: Path) -> None:
    clock = Clock()
    coordinator = sqlite_coordinator(tmp_path, clock)
    two_images(coordinator)
    wants(coordinator, "rome", range(5, 10), 4)
    wants(coordinator, "rome", range(5), 2)
    # oslo, where both are pinned, keeps the image that rome has no room for
    assert facts(coordinator, "rome", range(12)) == [-1] * 5 + [1] * 5 + [0] * 2
    assert facts(coordinator, "oslo", range(10)) == [1] * 10
    assert facts(coordinator, "nobody", range(10)) == []
    clock.now += planner_module.PLAN_FOR_S + 1
    assert facts(coordinator, "rome", range(12)) == [], "an old plan is not followed"
    # nor is one made for sites that are silent, or have not said what room they have since the coordinator started
    says(coordinator, "oslo", 0)
    assert [each["site"] for each in coordinator.plan()["sites"]] == ["oslo"]
    again = Coordinator(coordinator.backend, clock)
    assert again.plan()["sites"] == [] and facts(again, "rome", range(10)) == []


def test_what_is_unpinned_counts_as_cache(tmp_path: Path) -> None:
    coordinator = sqlite_coordinator(tmp_path)
    two_images(coordinator)
    says(coordinator, "oslo", 5 * CHUNK, "image/web", "image/db")
    wants(coordinator, "oslo", range(5), 5)
    (oslo, _) = coordinator.plan()["sites"]
    assert [(each["names"], each["pinned"]) for each in oslo["keep"]] == [(["image/web"], False)]


def test_a_guest_on_its_way_is_expected(tmp_path: Path) -> None:
    coordinator = sqlite_coordinator(tmp_path)
    two_images(coordinator)
    Site(coordinator, "oslo").has_manifest("guest/vm1", range(3, 10))

    def demand() -> Any:
        coordinator.plan()
        layers, _, _ = coordinator.planner._gather(
            coordinator.index, coordinator.fleet, coordinator.popularity, coordinator._clock()
        )
        return {each.names[-1]: dict(each.wanted) for each in layers}

    assert demand() == {"image/db": {}, "image/web": {}}
    entry = m.GuestEntry(name="vm1", state="receiving", owner="oslo", epoch=1)
    coordinator.guest_report("rome", m.GuestsReport(guests=[entry]))
    assert demand() == {"image/db": {"rome": 1.0}, "image/web": {"rome": 0.4}}


def test_a_plan_is_made_now_and_then(tmp_path: Path) -> None:
    clock = Clock()
    coordinator = sqlite_coordinator(tmp_path, clock)
    two_images(coordinator)
    first = coordinator.planner.current()
    assert first is not None and len(first.facts["sites"]) < 2
    clock.now += planner_module.PLAN_EVERY_S + 1
    says(coordinator, "oslo", 0)
    now = coordinator.planner.current()
    assert now is not None and now.made == clock.now and len(now.facts["sites"]) == 2
