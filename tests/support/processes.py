"""Processes of tests, as the project tells them apart."""

from __future__ import annotations

import subprocess
import time

import psutil
import pytest

from haulier.process import ProcessId


def process_of(process: subprocess.Popen[bytes]) -> ProcessId:
    """That process, which lives."""
    found = ProcessId.of(process.pid)
    assert found is not None
    return found


def set_clock(monkeypatch: pytest.MonkeyPatch, by_s: float) -> None:
    """The time of day, and with it that of the boot, as whoever asks from now on is told."""
    now, boot = time.time, psutil.boot_time
    monkeypatch.setattr(time, "time", lambda: now() + by_s)
    for module in (psutil, psutil._psplatform):
        monkeypatch.setattr(module, "boot_time", lambda: boot() + by_s)
