"""The guest's clients in a lab: one that steers its workload, and one that asks it all the time."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from haulier.errors import GuestError
from haulier.lab import probe
from haulier.lab.lab import Lab
from haulier.lab.workload import PORT

ANSWER_S = 300.0
"""Filling 100 MiB or checking it takes a minute under emulation."""


class Workload:
    """Steers the guest's service at `address` ("10.77.0.10/24" or "10.77.0.10") from the lab's site `site`."""

    def __init__(self, lab: Lab, site: str, address: str) -> None:
        self._lab, self._site = lab, site
        self._host = address.partition("/")[0]

    def call(self, timeout: float = ANSWER_S, **request: Any) -> dict[str, Any]:
        """One request, one answer. GuestError when none comes or it says that something is wrong."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                with self._lab.call(self._site, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
                    sock.settimeout(5)
                    sock.connect((self._host, PORT))
                    sock.settimeout(timeout)
                    sock.sendall(json.dumps(request).encode() + b"\n")
                    line = sock.makefile("rb").readline(1 << 20)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise GuestError(
                        f"the guest at {self._host} does not answer {request.get('cmd')}: {error}"
                    ) from error
                time.sleep(0.1)
        answer: dict[str, Any] = json.loads(line or b'{"ok": false, "error": "hung up"}')
        if not answer.get("ok"):
            raise GuestError(f"the guest at {self._host} answers {request.get('cmd')} with: {answer.get('error')}")
        return answer

    def start(self, memory_mib: int, **settings: Any) -> dict[str, Any]:
        """Fills the working set and begins to change it and to write files; returns when it is full."""
        return self.call(cmd="start", memory_mib=memory_mib, **settings)

    def check(self, *, drop_caches: bool = True) -> bool:
        """The guest looks at every page and file that it wrote. True when all are right."""
        return bool(self.examine(drop_caches=drop_caches)["good"])

    def examine(self, *, drop_caches: bool = True) -> dict[str, Any]:
        """What `check` found: pages, bad_pages, files, bad_files, good."""
        return self.call(cmd="check", drop_caches=drop_caches)

    def stats(self) -> dict[str, Any]:
        return self.call(cmd="stats")


class Answers:
    """A client that asks all the time, as a process in the lab's site `site`; its answers lie in `out`."""

    def __init__(self, lab: Lab, site: str, address: str, out: Path) -> None:
        self._lab, self._site, self._out = lab, site, out
        self._host = address.partition("/")[0]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begins to ask; returns when the first right answer is there."""
        command = [sys.executable, "-m", "haulier.lab.probe", self._host, "--out", str(self._out)]
        self._process = self._lab.popen(
            self._site, command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._await(lambda: self._out.exists() and probe.first_after(probe.read(self._out), 0.0) is not None)

    def first_after(self, moment: float, timeout: float = 60.0) -> float | None:
        """When the first right answer came to a question asked after `moment`; waits for one."""
        with contextlib.suppress(GuestError):
            self._await(lambda: probe.first_after(probe.read(self._out), moment) is not None, timeout)
        return probe.first_after(probe.read(self._out), moment)

    def stop(self) -> None:
        """Ends the client."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(20)
        self._process = None

    def summary(self) -> dict[str, Any]:
        """Answers, wrong ones, the longest gap (`haulier.lab.probe.Summary`)."""
        return probe.summary_dict(self._out)

    def _await(self, condition: Any, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise GuestError(f"no right answer from the guest at {self._host} within {timeout:g} s")
            time.sleep(0.05)
