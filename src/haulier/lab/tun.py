"""The back end that works everywhere: a relay process of ours between two TUN interfaces."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from haulier.errors import UNDECODABLE, HaulierError, PeerError
from haulier.lab import processes
from haulier.lab.relay import Config, Reply, Request, Started

_MODULE: Final = "haulier.lab.relay"
_MAX_REPLY: Final = 65536


def launch(lab: str, link: str, instance: str, config: Config) -> Started:
    """Starts a relay, which outlives this process. `HaulierError` with what it said."""
    # -P: a file of the caller's directory must not stand in for a module.
    argv = [sys.executable, "-P", "-m", _MODULE, lab, link, instance]
    try:
        done = subprocess.run(argv, input=msgspec.json.encode(config), capture_output=True, timeout=30, check=False)
        if done.returncode:
            raise HaulierError(
                f"the relay of link {link} did not start: {done.stderr.decode(errors='replace').strip()}"
            )
        return msgspec.json.decode(done.stdout, type=Started)
    except (subprocess.TimeoutExpired, *UNDECODABLE) as error:
        raise HaulierError(f"the relay of link {link} did not start: {error}") from None


def find(lab: str, instance: str | None = None) -> list[tuple[int, int]]:
    """(id, start time) of every relay of a lab (of that `instance` only, if given), launching ones included."""
    found: list[tuple[int, int]] = []
    for pid, words in processes.commands():
        if _MODULE not in words:
            continue
        rest = words[words.index(_MODULE) + 1 :]
        if len(rest) == 3 and rest[0] == lab and instance in (None, rest[2]):
            start = processes.started(pid)
            if start is not None:
                found.append((pid, start))
    return found


def ask(path: Path, request: Request, timeout: float = 10) -> Reply:
    """One request to a relay. `PeerError` when it does not answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            client.connect(str(path))
            client.sendall(msgspec.json.encode(request) + b"\n")
            answer = bytearray()
            while not answer.endswith(b"\n") and len(answer) < _MAX_REPLY:
                data = client.recv(4096)
                if not data:
                    break
                answer += data
        reply = msgspec.json.decode(bytes(answer), type=Reply)
    except (OSError, *UNDECODABLE) as error:
        raise PeerError(f"the relay at {path} does not answer ({error}): bring the lab up again with --force") from None
    if reply.error:
        raise PeerError(f"the relay at {path} refused: {reply.error}")
    return reply
