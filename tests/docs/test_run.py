"""The documents' commands are run, page by page, in the order in which they stand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from haulier.lab.lab import Lab
from haulier.lab.scenario import template
from tests.docs.pages import ROOT, Step, all_blocks, all_steps
from tests.docs.plan import BENCH, FLEET, LAB, README, exemption, runs
from tests.docs.stage import DocsStage, environment, fleet, machine

system = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(400)]


def of(pages: Sequence[str], kind: str) -> list[Step]:
    return [step for page in pages for step in all_steps() if step.page == page and runs(step) == kind]


def run_all(stage: DocsStage, steps: list[Step]) -> None:
    for step in steps:
        if not exemption(step):
            stage.run(step)
    print(stage.slowest())


@pytest.mark.parametrize("pages", [pytest.param(README, id="readme"), pytest.param(FLEET, id="pages", marks=[])])
class TestFleet:
    pytestmark = system

    def test_commands_between_sites(self, pages: tuple[str, ...]) -> None:
        # README leaves the bridge to docs/sites.md, which makes it.
        with fleet(
            f"docs-{pages[0][:1].lower()}", template(512), bridge=pages is README, seeded=pages is README
        ) as stage:
            run_all(stage, of(pages, "fleet"))


@pytest.mark.root
def test_the_labs_page(tmp_path: Path) -> None:
    (toml,) = [block for block in all_blocks() if block.page in LAB and block.language == "toml"]
    (python,) = [block for block in all_blocks() if block.page in LAB and block.language == "python"]
    name = "docs-lab"
    text = "\n".join(toml.lines)
    assert 'name = "demo"' in text
    (tmp_path / "demo.toml").write_text(text.replace('name = "demo"', f'name = "{name}"'))
    stage = machine(tmp_path, HAULIER_LAB=name)
    try:
        for step in of(LAB, "lab"):
            stage.run(Step(step.page, step.line, step.site, step.command.replace("down demo", f"down {name}")))
        assert name not in Lab.names()
        code = "\n".join(python.lines)
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, timeout=60)
        assert name not in Lab.names()
    finally:
        if name in Lab.names():
            Lab.load(name).down()


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted({found[1] for step in all_steps() if (found := BENCH.match(step.command))}))
def test_benchmarks_run(name: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    subprocess.run([sys.executable, "bench/run", name, "--quick", "--json", str(file)], cwd=ROOT, check=True)
    assert file.stat().st_size > 0
