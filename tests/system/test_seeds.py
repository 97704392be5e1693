"""The published experiments, in the least and the quick form: each ends, and its figures agree with each other."""

from __future__ import annotations

import json
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "run"

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=["--quick", pytest.param("--least", marks=pytest.mark.full)])
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    """The document and the page of one run; the quick form is CI's."""
    folder = tmp_path_factory.mktemp("seeds")
    found, page = folder / "seeds.json", folder / "seeds.html"
    command = [sys.executable, str(BENCH), "seeds", request.param, "--json", str(found), "--html", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    print(done.stdout[-4000:], done.stderr[-4000:])
    assert done.returncode == 0
    return json.loads(found.read_text()), page.read_text()


def test_each_experiment_ran_to_its_end_and_its_figures_agree(made: tuple[dict[str, Any], str]) -> None:
    document, _ = made
    experiments = {each["name"]: each for each in document["experiments"]}
    assert len(experiments) == 7
    for name, each in experiments.items():
        kinds = {row["kind"] for row in each["rows"] if row["figures"]}
        assert kinds & {"measured", "calculated"}, name
        print(name, round(each["seconds"]), "s", sum(check["ok"] for check in each["checks"]), "checks")
        assert [check for check in each["checks"] if not check["ok"]] == [], name
    # Handoffs of one guest, each checked for bytes (twice), phases, memory and disk.
    handoffs = len(experiments["live-migration"]["handoffs"])
    assert handoffs >= 2 and len(experiments["live-migration"]["checks"]) == 5 * handoffs + 1


def test_the_page_shows_what_was_found_and_needs_nothing_else(made: tuple[dict[str, Any], str]) -> None:
    document, page = made
    for each in document["experiments"]:
        assert f'<h2 id="{each["name"]}">' in page
        assert all(escape(row["way"]) in page for row in each["rows"])
    assert page.count("<svg") >= 8 and "(theirs)" in page and "not built yet" in page
    assert "http:" not in page and "https:" not in page and "<script" not in page
