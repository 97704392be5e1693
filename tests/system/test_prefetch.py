"""Data sent ahead makes the handoff short, and what a guest leaves behind makes its way back short."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from haulier.lab.scenario import Template, wan
from tests.support.waiting import wait_for
from tests.system.stage import Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(600)]

QUIET = {"pages_per_s": 5, "hot_pages": 50, "files_per_s": 0.1}


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "ahead", [wan("20mbit", "20ms")]) as standing:
        standing.run_guest(**QUIET)
        yield standing


def bytes_of(report: dict[str, Any]) -> int:
    return int(report["wire"]["sent"] + report["wire"]["received"])


@pytest.fixture(scope="module")
def first(standing: Stage) -> dict[str, Any]:
    """The report of a handoff with nothing sent ahead."""
    return standing.begin().done()


def forget(standing: Stage) -> None:
    for site in standing.scenario.sites.values():
        site.haulier("gc", "--all", timeout=180)


def test_after_a_prefetch_the_handoff_sends_little_and_takes_seconds(standing: Stage, first: dict[str, Any]) -> None:
    forget(standing)
    source = standing.home()
    target = standing.scenario.other(source).name
    before = standing.answers["web1"].summary()["answers"]
    sent = standing.site(source).facts("prefetch", "web1", "--to", target, timeout=300)
    assert sent["outcome"] == "done" and sent["kind"] == "prefetch"
    ahead = sent["report"]
    assert standing.home() == source, "a prefetch moves nothing"
    assert standing.answers["web1"].summary()["answers"] > before
    for name in (source, target):
        kept = wait_for(lambda name=name: standing.site(name).facts("status")["kept"], 30, "what was sent ahead")
        assert [(one["guest"], one["kind"]) for one in kept] == [("web1", "prefetch")]
        wait_for(lambda name=name: not standing.of_handoff(name, sent["id"]), 30, "the end of the prefetch")
    handoff = standing.begin("web1", "--check")
    report = handoff.done()
    print(
        f"first {bytes_of(first)} in {first['total_s']} s; ahead {bytes_of(ahead)} in {ahead['total_s']} s; "
        f"then {bytes_of(report)} in {report['total_s']} s"
    )
    assert report["check"]["memory_equal"] is True
    assert report["memory_base"] == f"attempt:{sent['id']}"
    assert bytes_of(report) <= 0.25 * bytes_of(first)
    standing.assert_clean(handoff, target)
    standing.assert_right()


def test_there_and_back_within_minutes_sends_a_small_part(standing: Stage, first: dict[str, Any]) -> None:
    report = standing.begin("web1", "--check").done()
    print(f"back {bytes_of(report)} of {bytes_of(first)}: {bytes_of(report) / bytes_of(first):.3f}")
    assert report["check"]["memory_equal"] is True
    assert bytes_of(report) <= 0.15 * bytes_of(first)
    kept = standing.site(report["source"]).facts("status")["kept"]
    assert [(one["guest"], one["kind"]) for one in kept] == [("web1", "way back")]
    standing.assert_right()


@pytest.mark.full
def test_kept_fresh_until_the_handoff_begins(standing: Stage, first: dict[str, Any]) -> None:
    forget(standing)
    source = standing.home()
    target = standing.scenario.other(source).name
    site = standing.site(source)
    begun = site.facts("prefetch", "web1", "--to", target, "--keep-fresh", "2s", "--detach")

    def shown() -> dict[str, Any]:
        return dict(site.client.handoff(begun["id"]))

    wait_for(lambda: shown()["status"].get("phase") == "fresh", 120, "the first pass")
    wait_for(lambda: shown()["status"].get("phase") == "memory", 60, "another pass")
    refused = site.haulier("prefetch", "web1", "--to", source, check=False)
    assert refused.returncode == 2
    handoff = standing.begin("web1", "--check")
    report = handoff.done()
    ended = shown()
    print(f"kept fresh by {ended['report']['passes']}; then {bytes_of(report)} in {report['total_s']} s")
    assert ended["outcome"] == "done" and len(ended["report"]["passes"]) >= 2
    assert ended["report"]["passes"][1]["wire_bytes"] < ended["report"]["passes"][0]["wire_bytes"] / 2
    assert report["memory_base"] == f"attempt:{begun['id']}" and report["check"]["memory_equal"] is True
    assert bytes_of(report) <= 0.25 * bytes_of(first)
    standing.assert_clean(handoff, target)
    standing.assert_right()


@pytest.mark.full
@pytest.mark.parametrize("how", ["cancelled", "worker at the source killed", "worker at the target killed"])
def test_a_prefetch_that_is_cut_serves_the_handoff_as_well(standing: Stage, first: dict[str, Any], how: str) -> None:
    forget(standing)
    source = standing.home()
    target = standing.scenario.other(source).name
    site = standing.site(source)
    begun = site.facts("prefetch", "web1", "--to", target, "--detach")
    half = bytes_of(first) / 2
    wait_for(lambda: site.client.handoff(begun["id"])["status"].get("wire_bytes", 0) > half, 60, "half of it")
    if how == "cancelled":
        site.haulier("cancel", "web1")
    else:
        import os
        import signal

        name = source if "source" in how else target
        with standing.journal(name) as journal:
            os.kill(journal.handoff(begun["id"]).pid, signal.SIGKILL)
    for name in (source, target):
        wait_for(lambda name=name: standing.site(name).client.handoff(begun["id"])["state"] == "ended", 180, name)
        wait_for(lambda name=name: not standing.of_handoff(name, begun["id"]), 30, "the end of the prefetch")
    assert standing.home() == source
    report = standing.begin("web1", "--check").done()
    print(f"{how}: then {bytes_of(report)} of {bytes_of(first)}")
    assert report["check"]["memory_equal"] is True
    assert report["memory_base"] == f"attempt:{begun['id']}"
    assert bytes_of(report) <= 0.7 * bytes_of(first)
    standing.assert_right()
