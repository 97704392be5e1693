"""A restore that is held waits for its inventory, and ends with all that it started when it is given up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from haulier.containers.restoring import HELD, INVENTORY, Restoring, end_helper, prepare
from haulier.process import ProcessId
from tests.support.waiting import wait_for


@pytest.fixture
def images(tmp_path: Path) -> Path:
    prepare(tmp_path / "images")
    return tmp_path / "images"


def restoring(images: Path, script: str) -> Restoring:
    return Restoring(["sh", "-c", script], dict(os.environ), images, images.parent / "said")


def test_it_reads_the_inventory_when_it_may(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun = restoring(images, f"cat {images}/{INVENTORY} >{out}; cat {images}/{INVENTORY} >>{out}")
    wait_for(out.exists, 10)
    assert out.read_bytes() == b""
    (images / HELD).write_bytes(b"inventory")
    assert begun.finish() == ""
    # Whoever opens it again finds the file itself.
    assert out.read_bytes() == b"inventoryinventory"


def test_one_that_is_there_already_is_held_back(images: Path, tmp_path: Path) -> None:
    (images / INVENTORY).write_bytes(b"early")
    begun = restoring(images, f"cat {images}/{INVENTORY} >{tmp_path}/out")
    assert begun.finish() == "" and (tmp_path / "out").read_bytes() == b"early"


def test_what_it_says_when_it_fails(images: Path) -> None:
    (images / HELD).write_bytes(b"x")
    assert "no such luck" in restoring(images, f"cat {images}/{INVENTORY}; echo no such luck >&2; exit 3").finish()
    (images / INVENTORY).unlink()
    (images / HELD).write_bytes(b"x")
    # It need not even begin to read.
    assert "ended with 4" in restoring(images, "exit 4").finish()


def test_given_up_it_ends_with_what_it_started(images: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    begun = restoring(images, f"(echo $$ >{pid}.parent; sleep 1000 & echo $! >{pid}; wait); cat {images}/{INVENTORY}")
    wait_for(lambda: pid.exists() and pid.read_text().strip(), 10)
    child = ProcessId.of(int(pid.read_text()))
    assert child is not None
    begun.abort()
    assert child.wait_gone(10)
    end_helper(begun.process, begun.pipe)
    end_helper(None, None)


def test_given_up_what_left_it_gives_up_too(images: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    # As LXC's restore does: what waits is in a session of its own by then.
    begun = restoring(images, f"setsid sh -c 'echo $$ >{pid}; cat {images}/{INVENTORY}' & sleep 1000")
    wait_for(lambda: pid.exists() and pid.read_text().strip(), 10)
    child = ProcessId.of(int(pid.read_text()))
    assert child is not None
    begun.abort()
    assert child.wait_gone(10)
