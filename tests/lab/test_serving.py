"""The image with the containers' services: what it has more than the lab's Debian."""

from __future__ import annotations

import ast
import subprocess

import pytest

from haulier.lab import image, serving


def test_every_service_is_there_and_nothing_of_haulier_is_needed() -> None:
    files = serving.application().files
    tree = ast.parse(files["usr/lib/haulier/services/services.py"])
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "haulier" in (node.module or "")
    ]
    unit = files["usr/lib/systemd/system/haulier-service@.service"].decode()
    assert "/usr/lib/haulier/services/serve.sh %i" in unit
    script = files["usr/lib/haulier/services/serve.sh"]
    assert subprocess.run(["sh", "-n"], input=script, check=False).returncode == 0
    assert all(name in script for name in (b"video)", b"memory 110 160", b"nginx -c /etc/nginx/lab.conf"))
    assert "etc/nginx/lab.conf" in files


def test_the_commands_of_the_image_are_in_its_recipe() -> None:
    recipe = image.recipe(application=serving.application())
    assert recipe["commands"] == list(serving.application().commands)


@pytest.mark.parametrize(
    ("service", "name", "packages", "commands"),
    [
        ("game", "services-python", (), 0),
        ("memory", "services-python", (), 0),
        ("faces", "services-faces", ("python3-opencv", "opencv-data"), 0),
        ("video", "services-video", ("nginx-light",), 2),
    ],
)
def test_an_image_of_one_service_has_what_that_one_needs(
    service: str, name: str, packages: tuple[str, ...], commands: int
) -> None:
    alone, every = serving.application(service), serving.application()
    assert (alone.name, alone.packages, len(alone.commands)) == (name, packages, commands)
    assert alone.files == every.files and every.name == "services"
    assert set(alone.packages) <= set(every.packages) and set(alone.commands) <= set(every.commands)
