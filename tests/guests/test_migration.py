"""Running on after a migration that came to nothing, as QEMU's own states tell it; no QEMU runs here."""

from __future__ import annotations

from typing import Any

import pytest

from haulier.errors import GuestError
from haulier.guests.migration import Migration
from haulier.guests.model import new_spec


class Stopped(Migration):
    """A QEMU whose guest is in `state`, and stays there if `held`."""

    def __init__(self, state: str, held: bool) -> None:
        self.spec = new_spec("web1", "debian", memory_mib=64, disk_size=1 << 20)
        self.state, self.held, self.conts = state, held, 0

    def query_migrate(self) -> dict[str, Any]:
        return {"status": "cancelled"}

    def status(self) -> str:
        return self.state

    def cont(self) -> None:
        self.conts += 1
        if not self.held:
            self.state = "running"


@pytest.mark.parametrize("held", [True, False])
def test_a_guest_that_stands_at_an_io_error_of_its_own_is_let_go_on_once(held: bool) -> None:
    """It may stop there again: whoever gives up a handoff must not wait for its disk to be mended."""
    qemu = Stopped("io-error", held)
    qemu.resume_source(0.2)
    assert qemu.conts == 1


def test_a_guest_that_does_not_run_again_is_an_error() -> None:
    assert Stopped("paused", False).resume_source(5) is None
    with pytest.raises(GuestError, match="does not run again: it is paused"):
        Stopped("paused", True).resume_source(0.05)
