"""What a guest says on its serial port is kept within bounds."""

from __future__ import annotations

from pathlib import Path

from haulier.guests.console import KEPT, MOST, shorten


def test_a_long_log_keeps_its_end_beside_it(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    shorten(log)
    assert not log.exists()
    with log.open("ab", buffering=0) as qemu:
        qemu.write(b"a" * MOST)
        shorten(log)
        assert log.stat().st_size == MOST
        qemu.write(b"b" * 1000)
        shorten(log)
        assert log.stat().st_size == 0
        qemu.write(b"c")
    assert log.read_bytes() == b"c"
    assert (tmp_path / "serial.log.old").read_bytes() == b"a" * (KEPT - 1000) + b"b" * 1000
