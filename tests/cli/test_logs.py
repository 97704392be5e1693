"""Where a daemon's log goes, in a process of its own: logging is set up once in each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging, sys
from pathlib import Path
from haulier.cli import agent
agent.LOG_BYTES = 2000
agent.set_up_log(Path(sys.argv[1]))
for n in range(int(sys.argv[2])):
    logging.getLogger("haulier.test").info("line %d", n)
"""


@pytest.mark.parametrize("own", [True, False], ids=["stderr-elsewhere", "stderr-is-the-log"])
def test_a_log_does_not_grow_for_ever(tmp_path: Path, own: bool) -> None:
    path, elsewhere = tmp_path / "agent.log", tmp_path / "stderr"
    path.write_text("of an earlier run\n")
    for count in (5, 500):
        with (elsewhere if own else path).open("ab") as stderr:
            subprocess.run([sys.executable, "-c", SCRIPT, path, str(count)], stderr=stderr, check=True, timeout=60)
        if count == 5:
            said = path.read_text().splitlines()
            assert said[0] == "of an earlier run" and len(said) == 6
            assert said[1].endswith(" INFO haulier.test: line 0")
    files = sorted(tmp_path.glob("agent.log*"))
    assert [file.name for file in files] == ["agent.log", "agent.log.1", "agent.log.2"]
    assert all(0 < file.stat().st_size <= 2000 for file in files)
    assert path.read_text().endswith("line 499\n")
    assert (len(elsewhere.read_text().splitlines()) == 505) if own else not elsewhere.exists()
