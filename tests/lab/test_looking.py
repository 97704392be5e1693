"""The image with OpenCV: what it has more, and that the lab's plain image does not change by it."""

from __future__ import annotations

import ast

from haulier.lab import image, looking


def test_the_image_has_the_services_and_all_that_they_import() -> None:
    files = looking.application().files
    place = "usr/lib/haulier/vision/haulier"
    for name in ("services", "vision"):
        tree = ast.parse(files[f"{place}/lab/{name}.py"])
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        own = {name for name in imported if name.startswith("haulier")}
        assert all(f"{place}{module.removeprefix('haulier').replace('.', '/')}.py" in files for module in own), own
    unit = files["usr/lib/systemd/system/haulier-vision@.service"].decode()
    assert "/usr/lib/haulier/vision" in unit and "haulier.lab.vision %i" in unit


def test_only_an_application_changes_the_recipe() -> None:
    plain, with_it = image.recipe(), image.recipe(application=looking.application())
    assert {name: value for name, value in with_it.items() if name != "application"} == plain
    other = image.recipe(application=image.Application("x", ("redis-server",), {}))
    assert "application" not in plain and other["application"] != with_it["application"]
