"""A handoff over a link that changes follows it, says why, and arrives whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from haulier.lab.scenario import Template, wan
from tests.system.stage import Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "adapt", [wan("5mbit", "20ms")]) as standing:
        standing.run_guest()
        yield standing


def test_the_level_follows_the_link_and_the_memory_is_right(standing: Stage) -> None:
    source = standing.home()
    site = standing.site(source)
    measured = site.facts("calibrate", timeout=60)
    assert len(measured["levels"]) >= 4
    handoff = standing.begin("web1", "--check")
    handoff.wait_phase(source, {"memory", "disk"})
    handoff.wait_sent(3.0)
    now = handoff.status(source)
    assert now["mode"].startswith(("xz level", "zstd level")) and "Mbit/s" in now["why"]
    said = site.haulier("status", handoff.id, "--explain").stdout
    # It may be another one by now.
    assert re.search(r"(xz|zstd) level -?\d", said), said
    standing.set_link(rate_bps=2e9, delay_s=0.001)
    report = handoff.done()
    told = report["adapting"]
    print(json.dumps(told, indent=1))
    assert report["check"]["memory_equal"] is True
    levels = [change["level"] for change in told["changes"]]
    assert levels[0] >= 5 and min(levels) < levels[0], told
    # Between xz's levels it may change as the guest's pages do, for nothing is lost by that.
    assert len(levels) <= 30, "it does not settle"
    assert told["calibrated"] > 0 and told["learnt"]
    said = site.haulier("status", handoff.id, "--explain").stdout
    assert "of this guest" in said and "measured here" in said
    standing.assert_right()
