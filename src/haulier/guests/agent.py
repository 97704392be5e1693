"""Client of qemu-guest-agent, over the socket of its virtio-serial port.

The channel has no connections of its own: bytes of a caller that died may still be in it, and a guest that has no
agent swallows everything. So each client first resynchronises (a 0xff byte, then `guest-sync-delimited` with a
fresh number), and every wait has a deadline. What comes back is the guest's word: bounded, and never trusted.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from haulier.errors import GuestError

MAX_REPLY: Final = 64 << 20
_SENTINEL: Final = b"\xff"
_POLL_S: Final = 0.02
_POLL_MAX_S: Final = 0.2
"""Each question costs the guest some of the CPU that the program needs."""


class AgentRefused(GuestError):
    """The agent inside answered that it does not do what it was asked for."""


@dataclass(frozen=True)
class Finished:
    """What a command inside the guest left: its exit code and output."""

    code: int
    out: bytes
    err: bytes


class GuestAgent:
    """One conversation with the agent of guest `name`. Raises `GuestError` if it does not answer in `timeout` s."""

    def __init__(self, path: Path | str, *, name: str = "", timeout: float = 10) -> None:
        self._who = f"guest agent of {name}" if name else f"guest agent at {path}"
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            self._sync(time.monotonic() + timeout)
        except OSError as err:
            self._socket.close()
            raise GuestError(f"{self._who} cannot be reached: {err}") from err
        except GuestError:
            self._socket.close()
            raise

    def __enter__(self) -> GuestAgent:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(self, command: str, args: dict[str, Any] | None = None, timeout: float = 30) -> Any:
        """The agent's answer to one command. Raises `AgentRefused` with its own words.

        After any other `GuestError` the answer may still come: go on with a conversation of its own.
        """
        self._send(command, args, timeout)
        return self._result(command, self._line(time.monotonic() + timeout))

    def ping(self, timeout: float = 5) -> None:
        self.execute("guest-ping", timeout=timeout)

    def run(self, command: list[str], input: bytes = b"", timeout: float = 60) -> Finished:
        """Run a program inside the guest and wait for it. A non-zero exit code is the caller's business."""
        args: dict[str, Any] = {"path": command[0], "arg": command[1:], "capture-output": True}
        if input:
            args["input-data"] = base64.b64encode(input).decode()
        deadline = time.monotonic() + timeout
        wait = _POLL_S
        pid = self._number("guest-exec", self._field("guest-exec", self.execute("guest-exec", args), "pid"))
        while True:
            state = self.execute("guest-exec-status", {"pid": pid})
            if self._field("guest-exec-status", state, "exited"):
                break
            if time.monotonic() > deadline:
                raise GuestError(f"{self._who}: {command[0]} did not end within {timeout:g} s")
            time.sleep(wait)
            wait = min(_POLL_MAX_S, wait * 1.5)
        try:
            out, err = (base64.b64decode(state.get(k, ""), validate=True) for k in ("out-data", "err-data"))
        except (ValueError, TypeError) as err_:
            raise GuestError(f"{self._who} answered guest-exec-status with nonsense: {err_}") from err_
        code = self._number("guest-exec-status", state.get("exitcode", state.get("signal", 0)))
        # Killed by a signal: like a shell, 128 + its number.
        return Finished(code if "exitcode" in state else 128 + code, out, err)

    def check(self, command: list[str], input: bytes = b"", timeout: float = 60) -> bytes:
        """Like `run`, and gives the output; raises `GuestError` with what it said if it failed."""
        done = self.run(command, input, timeout)
        if done.code:
            said = done.err.decode(errors="replace").strip()[-300:]
            raise GuestError(f"{self._who}: {command[0]} failed with {done.code}: {said}")
        return done.out

    def fstrim(self, minimum: int = 0, timeout: float = 120) -> None:
        """Give blocks that no file uses back, on all mounted file systems."""
        self.execute("guest-fstrim", {"minimum": minimum}, timeout)

    def fsfreeze(self, timeout: float = 30) -> int:
        """Freeze all file systems; the number of those frozen. Thaw soon: the guest's writers wait."""
        return self._number("guest-fsfreeze-freeze", self.execute("guest-fsfreeze-freeze", timeout=timeout))

    def fsthaw(self, timeout: float = 30) -> int:
        return self._number("guest-fsfreeze-thaw", self.execute("guest-fsfreeze-thaw", timeout=timeout))

    def set_time(self, timeout: float = 10) -> None:
        """Set the guest's clock to this host's."""
        self.execute("guest-set-time", {"time": time.time_ns()}, timeout)

    def shutdown(self, patience: float = 2) -> None:
        """Start powering off. Keep this open until the guest is gone: what the agent has not read is lost on close.

        The agent answers `guest-shutdown` only if it fails, as in guests without a login manager; those get a plain
        `poweroff`. Raises `GuestError` if that fails as well.
        """
        self._send("guest-shutdown", {"mode": "powerdown"}, 5)
        try:
            line = self._line(time.monotonic() + patience)
        except GuestError:
            return
        try:
            self._result("guest-shutdown", line)
        except GuestError:
            self.execute("guest-exec", {"path": "/sbin/poweroff"}, 5)

    # -- wire ----------------------------------------------------------------------------------------------------

    def _sync(self, deadline: float) -> None:
        number = secrets.randbelow(1 << 53)
        request = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode()
        self._write(_SENTINEL + request + b"\n")
        while True:
            self._until(_SENTINEL, deadline)
            line = self._line(deadline)
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(line)
                if isinstance(answer, dict) and answer.get("return") == number:
                    return

    def _send(self, command: str, args: dict[str, Any] | None, timeout: float) -> None:
        message: dict[str, Any] = {"execute": command}
        if args is not None:
            message["arguments"] = args
        self._socket.settimeout(timeout)
        self._write(json.dumps(message).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as err:
            raise GuestError(f"{self._who} went away: {err}") from err

    def _line(self, deadline: float) -> bytes:
        return self._until(b"\n", deadline)

    def _until(self, end: bytes, deadline: float) -> bytes:
        while True:
            head, found, tail = self._buffer.partition(end)
            if found:
                self._buffer = tail
                return head
            if len(self._buffer) > MAX_REPLY:
                raise GuestError(f"{self._who} answers more than {MAX_REPLY >> 20} MiB: not listening any longer")
            left = deadline - time.monotonic()
            if left <= 0:
                raise GuestError(f"{self._who} did not answer in time: does qemu-guest-agent run inside the guest?")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as err:
                raise GuestError(f"{self._who} went away: {err}") from err
            if not data:
                raise GuestError(f"{self._who} went away")
            self._buffer += data

    def _result(self, command: str, line: bytes) -> Any:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise GuestError(f"{self._who} answered {command} with nonsense: {line[:80]!r}") from err
        if isinstance(message, dict) and "return" in message:
            return message["return"]
        error = message.get("error") if isinstance(message, dict) else None
        if not isinstance(error, dict):
            raise GuestError(f"{self._who} answered {command} with nonsense: {line[:80]!r}")
        said = error.get("desc")
        raise AgentRefused(f"{self._who} refused {command}: {said[:300] if isinstance(said, str) else repr(line[:80])}")

    def _field(self, command: str, reply: Any, key: str) -> Any:
        if not isinstance(reply, dict) or key not in reply:
            raise GuestError(f"{self._who} answered {command} without {key!r}")
        return reply[key]

    def _number(self, command: str, reply: Any) -> int:
        if not isinstance(reply, int):
            raise GuestError(f"{self._who} answered {command} with no number")
        return reply


def wait_for_agent(
    path: Path | str, *, name: str = "", timeout: float = 120, alive: Callable[[], bool] | None = None
) -> GuestAgent:
    """A client as soon as the agent answers. `alive` (a callable) ends the wait early when it gives False."""
    deadline = time.monotonic() + timeout
    patience = 1.0
    while True:
        left = deadline - time.monotonic()
        try:
            return GuestAgent(path, name=name, timeout=max(0.2, min(patience, left)))
        except GuestError as err:
            if alive is not None and not alive():
                raise GuestError(f"guest {name} ended while its agent was awaited") from err
            if time.monotonic() > deadline:
                raise GuestError(
                    f"guest agent of {name} did not answer within {timeout:g} s: is it in the image?"
                ) from err
        # A guest on a busy host may take seconds for one answer: asking anew each second would never hear it.
        patience = min(15.0, patience * 1.5)
        time.sleep(0.05)
