"""Pages that come through pipes are those that were written, whatever was expected."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from haulier.containers.arriving import ArrivingPages, names_of
from haulier.errors import GuestError
from haulier.units import MIB, PAGE


def test_what_is_written_arrives_and_grows_beyond_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "pages-1.img").write_bytes(b"of an earlier dump")
    few, many = os.urandom(3 * PAGE), os.urandom(11 * MIB)
    with ArrivingPages(tmp_path, {"pages-1.img": PAGE, "pages-2.img": 0, "pages-3.img": 0, "pages-4.img": 0}) as pages:
        for name, data in (("pages-1.img", few), ("pages-2.img", many), ("pages-3.img", b"")):
            assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)
            (tmp_path / name).write_bytes(data)
        found = pages.result()
        assert pages.sizes() == {"pages-1.img": 3 * PAGE, "pages-2.img": 11 * MIB, "pages-3.img": 0}
    # They outlive the pipes. The fourth was never opened, which is not the same as empty.
    assert {name: contents.tobytes() for name, contents in found.items()} == {
        "pages-1.img": few,
        "pages-2.img": many,
        "pages-3.img": b"",
    }
    assert found["pages-1.img"].shape == (3, PAGE)


def test_pages_of_a_trial_are_only_counted(tmp_path: Path) -> None:
    with ArrivingPages(tmp_path, dict.fromkeys(names_of(2), 0), keep=False) as pages:
        (tmp_path / "pages-2.img").write_bytes(bytes(3 * MIB + PAGE))
        assert pages.sizes() == {"pages-2.img": 3 * MIB + PAGE}


def test_half_a_page_is_no_dump(tmp_path: Path) -> None:
    with ArrivingPages(tmp_path, {"pages-1.img": PAGE}) as pages:
        (tmp_path / "pages-1.img").write_bytes(bytes(PAGE + 1))
        with pytest.raises(GuestError, match="within a page"):
            pages.result()


def test_a_dump_that_never_came_leaves_no_pipe_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ArrivingPages(tmp_path, {"pages-1.img": PAGE}):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(OSError):
        os.open(tmp_path / "pages-1.img", os.O_WRONLY | os.O_NONBLOCK)
