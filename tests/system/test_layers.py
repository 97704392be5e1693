"""Layers between two sites: committed, pushed, run, handed over; images that were built independently."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.lab.scenario import LabSite, Template
from tests.system.stage import Stage, stage

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(300)]

FILES = Path("/usr/lib/python3")
MOST = 24 << 20


@pytest.fixture(scope="module")
def standing(made: Template) -> Iterator[Stage]:
    with stage(made, "layers") as standing:
        standing.run_guest()
        yield standing


def test_a_layer_is_committed_pushed_run_there_and_handed_back(standing: Stage) -> None:
    oslo, lisbon = standing.site("oslo"), standing.site("lisbon")
    committed = oslo.facts("image", "commit", "web1", "shop")
    assert committed["quiesced"] and committed["still_ms"] < 5000 and committed["parent"] == "debian"
    assert 0 < committed["own_bytes"] < committed["bytes"] / 10
    standing.assert_right()
    warmed = oslo.facts("image", "warm", "shop", "--memory", "512M", timeout=200)
    (golden,) = warmed["golden"]
    pushed = oslo.facts("image", "push", "shop", "--to", "lisbon", timeout=200)
    # The base was there: only what the layer and its snapshot have of their own travels.
    items = {item["kind"]: item for item in pushed["items"]}
    assert list(items) == ["image", "golden", "memory"] and items["image"]["name"] == "shop"
    assert items["image"]["lacking"] * 65536 <= committed["own_bytes"]
    assert items["image"]["wire_bytes"] < committed["own_bytes"] + 400_000
    # Much of what an idle guest has in its memory lies in blocks of its disk.
    assert items["memory"]["recipes"] > items["memory"]["lacking"] / 4
    assert items["memory"]["wire_bytes"] < items["memory"]["lacking"] * 65536 / 3
    there = lisbon.facts("image", "show", "shop")
    assert there["digest"] == committed["digest"] and [each["id"] for each in there["golden"]] == [golden["id"]]
    print(
        f"pushed {pushed['wire_bytes'] / 1e6:.1f} MB, of it for the snapshot {items['memory']['wire_bytes'] / 1e6:.1f}"
    )

    ran = lisbon.facts("guest", "run", "web2", "--image", "shop", "--memory", "512M", timeout=200)
    assert ran["golden"] == golden["id"]
    plan = lisbon.facts("plan", "web2", "--to", "oslo")["layers"]
    assert plan["base"]["missing"] == plan["application"]["missing"] == 0
    assert plan["application"]["bytes"] > 0 and plan["instance"]["wire"] > 0
    report = standing.scenario.hand_over("web2", "lisbon", "oslo", "--check")["report"]
    assert report["check"]["memory_equal"]
    told = report["layers"]
    assert told["base"]["wire_bytes"] == told["application"]["wire_bytes"] == 0
    assert told["base"]["bytes"] + told["application"]["bytes"] > 300e6
    assert told["instance"]["wire_bytes"] > 0 and told["instance"]["memory_wire_bytes"] > 0
    print(f"handed over {report['wire']['sent'] / 1e6:.1f} MB in {report['total_s']:.1f} s: {told}")
    assert lisbon.facts("status", "web2")["report"]["layers"] == told
    assert oslo.facts("verify", "web2")["ok"]
    tree = {image["name"]: image for image in oslo.facts("image", "tree")["images"]}
    (shop,) = tree["debian"]["children"]
    assert [guest["name"] for guest in shop["guests"]] == ["web2"]
    assert oslo.haulier("image", "remove", "debian", check=False).returncode == 4
    oslo.haulier("guest", "remove", "web2", "--force")


def build(path: Path, tree: Path, *options: str) -> Path:
    """An ext4 image of the files in `tree`, laid out as `options` say."""
    with path.open("wb") as file:
        file.truncate(64 << 20)
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", *options, "-d", str(tree), str(path)]
    subprocess.run(command, check=True, env=environment)
    return path


def push(site: LabSite, file: Path, name: str) -> dict[str, Any]:
    site.facts("image", "import", str(file), "--name", name, "--no-warm")
    (item,) = site.facts("image", "push", name, "--to", "lisbon")["items"]
    return dict(item)


def test_an_image_that_was_built_independently_travels_as_recipes(standing: Stage, tmp_path: Path) -> None:
    oslo, lisbon = standing.site("oslo"), standing.site("lisbon")
    tree = tmp_path / "tree"
    taken = 0
    for number, path in enumerate(sorted(path for path in FILES.rglob("*") if path.is_file())):
        taken += path.stat().st_size
        if taken > MOST:
            break
        (tree / str(number % 7)).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tree / str(number % 7) / f"{number}-{path.name}")
    first = push(oslo, build(tmp_path / "a.raw", tree), "first")
    second = push(oslo, build(tmp_path / "b.raw", tree, "-N", "30000", "-J", "size=4", "-m", "0"), "second")
    assert first["lacking"] > 200 and second["lacking"] > first["lacking"] / 2, "they share few chunks"
    ratio = first["wire_bytes"] / second["wire_bytes"]
    print(f"independent image: {ratio:.1f} times fewer bytes ({first['wire_bytes']} and {second['wire_bytes']})")
    assert ratio >= 5
    digests = [site.facts("image", "show", "second")["digest"] for site in (oslo, lisbon)]
    assert digests[0] == digests[1]
