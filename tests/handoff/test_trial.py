"""The trial dump of a container at its source."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from haulier.errors import GuestError, Unsupported
from haulier.handoff import container_source
from haulier.handoff.container_source import TRIALS, ContainerSource

BUSY = "Error (soccr/soccr.c:371): recv failed (0, want 5): Resource temporarily unavailable"


class Trying(ContainerSource):
    def __init__(self, folder: Path, errors: list[str]) -> None:
        self.errors, self.tried = errors, 0
        self.progress = SimpleNamespace(phase=lambda *_: None)  # type: ignore[assignment]
        self.job = SimpleNamespace(guest="web1", options=SimpleNamespace(disk="full"))  # type: ignore[assignment]
        self.container = SimpleNamespace(status=lambda: "running", pids=list)  # type: ignore[assignment]
        self._trial = folder

    def _try_dump(self) -> None:
        self.tried += 1
        self._trial.mkdir()  # the last attempt's has gone
        if self.errors:
            raise GuestError(self.errors.pop(0))


@pytest.mark.parametrize(
    ("errors", "tried", "fails"),
    [([BUSY] * (TRIALS - 1), TRIALS, False), ([BUSY] * TRIALS, TRIALS, True), (["no such device"], 1, True)],
)
def test_a_dump_that_a_busy_connection_spoils_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[str], tried: int, fails: bool
) -> None:
    monkeypatch.setattr(container_source, "scan", lambda pids: [])
    trying = Trying(tmp_path / "trial", errors)
    if fails:
        with pytest.raises(Unsupported, match="'web1' cannot be handed over"):
            trying._preflight()
    else:
        trying._preflight()
    assert trying.tried == tried
