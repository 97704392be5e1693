"""The guest image and its golden snapshot, made once for all that need whole guests."""

from __future__ import annotations

import pytest

from haulier.lab.scenario import Template, template


@pytest.fixture(scope="session")
def made() -> Template:
    """A store with the image and the golden snapshot of 512 MiB."""
    return template(512)
