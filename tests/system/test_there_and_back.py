"""A guest goes there and back under load: memory, disk, files and answers are right all the way."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from haulier.handoff.residence import guest_paths
from haulier.lab.scenario import Template
from tests.system.stage import Stage, check_file_system, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "back") as standing:
        standing.run_guest()
        yield standing


@pytest.fixture(scope="module")
def trips(standing: Stage) -> list[dict[str, Any]]:
    """Reports of the way there and the way back, with the workload's own figures around each."""
    found = []
    for _ in range(2):
        before = standing.workload("web1").stats()
        handoff = standing.begin("web1", "--check")
        report = handoff.done()
        print(json.dumps({key: value for key, value in report.items() if key != "wire"}))
        found.append({**report, "before": before, "after": standing.workload("web1").stats()})
        standing.assert_clean(handoff, report["target"])
        found[-1]["verify"] = standing.site(report["target"]).facts("verify", "web1", timeout=300)
        found[-1]["right"] = standing.assert_right()
    return found


def test_both_trips_end_where_they_should(standing: Stage, trips: list[dict[str, Any]]) -> None:
    assert [(trip["source"], trip["target"]) for trip in trips] == [("oslo", "lisbon"), ("lisbon", "oslo")]
    assert [trip["epoch"] for trip in trips] == [2, 3]
    assert standing.home() == "oslo"


@pytest.mark.parametrize("trip", [0, 1], ids=["there", "back"])
def test_memory_and_disk_are_the_same_there(trips: list[dict[str, Any]], trip: int) -> None:
    assert trips[trip]["check"]["memory_equal"] is True
    assert trips[trip]["check"]["regions"] == 512
    verify = trips[trip]["verify"]
    assert verify["ok"] is True and verify["chunks"] > 1000 and verify["chunks_bad"] == 0


@pytest.mark.parametrize("trip", [0, 1], ids=["there", "back"])
def test_every_round_that_claims_so_really_had_something_to_send(trips: list[dict[str, Any]], trip: int) -> None:
    report = trips[trip]
    rounds = report["disk"]["rounds"]
    assert [entry["last"] for entry in rounds] == [False] * (len(rounds) - 1) + [True]
    assert len(rounds) >= 2
    wrote = report["after"]["files_written"] - report["before"]["files_written"]
    assert wrote > 0, "the workload wrote nothing meanwhile: this would prove nothing"
    assert sum(entry["dirty"] for entry in rounds) > 0
    dirty = 0
    for entry in rounds:
        dirty += entry["dirty"]
        # What was held back in one round may go in a later one.
        sent = sum(other["chunks"] for other in rounds[: rounds.index(entry) + 1])
        assert sent <= dirty, rounds
        assert entry["wire_bytes"] > 0 or not entry["chunks"], rounds
    assert sum(entry["chunks"] for entry in rounds) > 0, "dirty chunks that were all as before are no proof"
    assert report["memory"]["raw_bytes"] > 0 and report["memory"]["rounds"] >= 2


def test_the_way_back_sends_a_small_part(trips: list[dict[str, Any]]) -> None:
    there, back = (trip["wire"]["sent"] + trip["wire"]["received"] for trip in trips)
    assert back < there / 3, f"{back} bytes back, {there} bytes there"


@pytest.mark.parametrize("trip", [0, 1], ids=["there", "back"])
def test_downtime_is_by_events_and_in_order(trips: list[dict[str, Any]], trip: int) -> None:
    report = trips[trip]
    assert 0 < report["downtime_ms"] < 60_000
    assert report["stopped_at"] < report["running_at"]
    assert report["total_s"] > 0 and report["outcome"] == "done"
    names = [phase["name"] for phase in report["phases"]]
    assert names[:4] == ["offer", "connect", "disk", "memory"] and "switchover" in names


def test_clients_never_got_a_wrong_answer(standing: Stage, trips: list[dict[str, Any]]) -> None:
    summary = standing.answers["web1"].summary()
    assert summary["answers"] > 50 and summary["wrong"] == 0
    assert summary["kept_lost"] == 0, "the connection that was kept survives the move"


def test_the_stopped_source_and_the_copy_that_never_ran_are_equal_page_by_page(
    standing: Stage, trips: list[dict[str, Any]]
) -> None:
    source = standing.home()
    target = standing.scenario.other(source)
    other_ram = guest_paths(target.site, "web1").ram
    done = standing.scenario.lab.exec(
        source,
        [
            sys.executable,
            "-m",
            "tests.system.comparing",
            str(standing.site(source).root),
            "web1",
            target.name,
            str(other_ram),
        ],
        timeout=300,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    compared = found["compared"]
    assert compared["status"] == "postmigrate"
    assert compared["pages"] == 512 * 256
    assert compared["bytes"] > 100 << 20, "an empty memory would be equal to anything"
    assert compared["differing"] == []
    assert standing.home() == target.name
    standing.assert_right()


def test_the_file_system_is_clean_in_the_end(standing: Stage, trips: list[dict[str, Any]]) -> None:
    standing.assert_right()
    site = standing.site(standing.home())
    standing.answers["web1"].stop()
    site.haulier("guest", "stop", "web1", timeout=180)
    said = check_file_system(site, "web1", standing.scenario.work)
    assert "clean" in said or "Pass 5" in said
