"""A guest that writes memory or disk faster than the link carries it: refused and unharmed, or slowed and moved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from haulier.errors import HandoffFailed, UsageError
from haulier.lab.scenario import Template, wan
from tests.system.stage import Stage, sh, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.full, pytest.mark.timeout(600)]

WILD = {"pages_per_s": 1500, "hot_pages": 5000, "files_per_s": 0.2}


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "outrun", [wan("10mbit", "20ms")]) as standing:
        standing.run_guest(**WILD)
        yield standing


def test_refused_when_nothing_is_allowed_and_the_guest_is_unharmed(standing: Stage) -> None:
    handoff = standing.begin("web1", "--downtime", "100ms")
    code, result, err = handoff.result()
    print(err)
    assert code == HandoffFailed.exit_code and result["outcome"] == "failed"
    assert "faster than the link" in err and "--allow auto-converge" in err and "runs on at" in err
    handoff.settled()
    assert standing.home() == handoff.source
    standing.assert_clean(handoff, handoff.source)
    standing.assert_right()


def test_slowed_when_that_is_allowed_and_it_arrives(standing: Stage) -> None:
    handoff = standing.begin("web1", "--downtime", "100ms", "--allow", "auto-converge", "--check")
    report = handoff.done()
    print(report["total_s"], report["downtime_ms"], report["measures"])
    assert report["check"]["memory_equal"] is True
    assert report["measures"] and all(taken["what"] == "slow the guest" for taken in report["measures"])
    standing.assert_clean(handoff, handoff.target)
    standing.assert_right()


RECORDING = (
    "(while :; do for n in $(seq 0 16 1008); do dd if=/dev/urandom of=/var/tmp/film bs=64k count=16 seek=$n "
    "conv=notrunc oflag=direct; sleep 0.3; done; done) > /dev/null 2>&1 < /dev/null &"
)
"""As a camera's recorder does, round and round: more than the link carries, past the page cache."""


def test_refused_when_its_disk_never_comes_to_rest(made: Template) -> None:
    with stage(made, "restless", [wan("10mbit", "25ms")]) as standing:
        standing.run_guest(pages_per_s=50, hot_pages=500, files_per_s=0.5)
        source = standing.home()
        sh(standing.site(source), "web1", RECORDING)
        handoff = standing.begin("web1")
        code, result, err = handoff.result()
        print(err)
        assert code == HandoffFailed.exit_code and result["outcome"] == "failed"
        assert "disk has not come to rest" in err and "runs on at" in err
        handoff.settled()
        standing.assert_clean(handoff, source)
        standing.assert_right()


def test_what_cannot_be_had_is_refused_at_once(standing: Stage) -> None:
    source = standing.home()
    site, target = standing.site(source), standing.scenario.other(source).name
    refused = site.haulier("handoff", "web1", "--to", target, "--allow", "post-copy", "--check", check=False)
    assert refused.returncode == UsageError.exit_code and "leave out --check" in refused.stderr
