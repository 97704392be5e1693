"""What a scenario does before it has a lab."""

from __future__ import annotations

from pathlib import Path

from haulier.agent.site import Site
from haulier.lab.scenario import clear_killed


def test_what_a_killed_run_left_is_no_obstacle_to_the_next(tmp_path: Path) -> None:
    """Its sites, one of them half made, and the hook, which is a file beside them."""
    work = tmp_path / "bench"
    ram = tmp_path / "ram"
    ram.mkdir()
    Site(work / "oslo", "oslo", "10.0.0.1:7447", ram=str(ram)).save()
    (work / "lisbon").mkdir()
    (work / "moved-hook").touch()
    clear_killed(work)
    assert not work.exists()
    assert not ram.exists()
