"""The guest agent's client, against an agent of our own that is not always well-behaved."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from haulier.errors import GuestError
from haulier.guests import agent as module
from haulier.guests.agent import GuestAgent, wait_for_agent


class FakeAgent:
    """Answers sync and whatever `replies` says; `stale` bytes lie in the channel from before."""

    def __init__(self, path: Path, replies: dict[str, Any], stale: bytes = b"", sync: bool = True) -> None:
        self.path = path
        self.requests: list[dict[str, Any]] = []
        self._replies = replies
        self._stale = stale
        self._sync = sync
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._listener.settimeout(20)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                try:
                    self._talk(client)
                except OSError:
                    pass  # the client had heard enough

    def _talk(self, client: socket.socket) -> None:
        client.sendall(self._stale)
        buffer = b""
        while data := client.recv(65536):
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                self._answer(client, json.loads(line.lstrip(b"\xff")))

    def _answer(self, client: socket.socket, request: dict[str, Any]) -> None:
        self.requests.append(request)
        if request["execute"] == "guest-sync-delimited":
            if self._sync:
                client.sendall(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
            return
        reply = self._replies.get(request["execute"], {"return": {}})
        if isinstance(reply, list):
            reply = reply.pop(0)
        if reply is not None:
            client.sendall(reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\n")

    def close(self) -> None:
        # close() alone does not wake a thread that waits in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[FakeAgent] = []

    def build(replies: dict[str, Any] | None = None, **more: Any) -> FakeAgent:
        made.append(FakeAgent(tmp_path / f"{len(made)}.sock", replies or {}, **more))
        return made[-1]

    yield build
    for fake in made:
        fake.close()


def exited(code: int = 0, out: bytes = b"", err: bytes = b"") -> dict[str, Any]:
    text = {"out-data": base64.b64encode(out).decode(), "err-data": base64.b64encode(err).decode()}
    return {"return": {"exited": True, "exitcode": code, **text}}


def test_leftovers_of_an_earlier_caller_are_skipped(make: Any) -> None:
    stale = b'{"return": {"pid": 99}}\n\xff{"return": 12345}\n\xff[1]\n\xff' + b"[" * 200_000 + b'\n{"ret'
    fake = make({"guest-ping": {"return": {}}}, stale=stale)
    with GuestAgent(fake.path) as agent:
        agent.ping()


def test_running_a_program(make: Any) -> None:
    fake = make(
        {
            "guest-exec": {"return": {"pid": 7}},
            "guest-exec-status": [{"return": {"exited": False}}, exited(3, b"out\n", b"err\n")],
        }
    )
    with GuestAgent(fake.path) as agent:
        done = agent.run(["/bin/prog", "a", "b"], b"in")
    assert (done.code, done.out, done.err) == (3, b"out\n", b"err\n")
    arguments = next(r for r in fake.requests if r["execute"] == "guest-exec")["arguments"]
    assert arguments == {
        "path": "/bin/prog",
        "arg": ["a", "b"],
        "capture-output": True,
        "input-data": base64.b64encode(b"in").decode(),
    }


def test_check_says_what_the_program_said(make: Any) -> None:
    fake = make({"guest-exec": {"return": {"pid": 7}}, "guest-exec-status": exited(1, err=b"disk on fire\n")})
    with GuestAgent(fake.path, name="web1") as agent:
        with pytest.raises(GuestError, match=r"guest agent of web1: /bin/x failed with 1: disk on fire"):
            agent.check(["/bin/x"])


def test_a_killed_program_has_a_code_like_in_a_shell(make: Any) -> None:
    fake = make({"guest-exec": {"return": {"pid": 7}}, "guest-exec-status": {"return": {"exited": True, "signal": 9}}})
    with GuestAgent(fake.path) as agent:
        assert agent.run(["/bin/x"]).code == 137


@pytest.mark.parametrize(
    "reply",
    [
        b"nonsense\n",
        {"return": 5},
        {"return": {}},
        {"return": {"exited": True, "exitcode": "x"}},
        b'{"return": {"exited": true, "exitcode": 1e999}}\n',
        b'{"return": {"exited": true, "signal": 1e999}}\n',
        b'{"return": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
        {"error": 5},
        {"error": {"desc": [1]}},
        [1],
        b"[]\n",
    ],
)
def test_nonsense_is_an_error_that_names_the_agent(make: Any, reply: Any) -> None:
    answer = json.dumps(reply).encode() + b"\n" if not isinstance(reply, bytes) else reply
    fake = make({"guest-exec": {"return": {"pid": 7}}, "guest-exec-status": answer})
    with GuestAgent(fake.path, name="web1") as agent:
        with pytest.raises(GuestError, match="guest agent of web1"):
            agent.run(["/bin/x"])


@pytest.mark.parametrize("reply", [{"return": {}}, {"return": {"pid": [1]}}, {"return": [1]}])
def test_a_program_without_a_number_is_an_error(make: Any, reply: Any) -> None:
    with GuestAgent(make({"guest-exec": reply}).path, name="web1") as agent, pytest.raises(GuestError, match="web1"):
        agent.run(["/bin/x"])


@pytest.mark.parametrize("reply", [{"return": {"paths": []}}, {"return": None}, {"return": 1e999}])
def test_a_number_of_file_systems_is_a_number(make: Any, reply: Any) -> None:
    fake = make({"guest-fsfreeze-freeze": reply, "guest-fsfreeze-thaw": reply})
    with GuestAgent(fake.path, name="web1") as agent:
        for ask in (agent.fsfreeze, agent.fsthaw):
            with pytest.raises(GuestError, match=r"web1 answered guest-fsfreeze-.* with no number"):
                ask()


def test_a_refusal_is_passed_on(make: Any) -> None:
    fake = make({"guest-fstrim": {"error": {"class": "GenericError", "desc": "not on this file system"}}})
    with GuestAgent(fake.path) as agent:
        with pytest.raises(GuestError, match="refused guest-fstrim: not on this file system"):
            agent.fstrim()


def test_an_endless_answer_is_cut_off(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REPLY", 1 << 16)
    fake = make({"guest-ping": b"x" * (1 << 18)})
    with GuestAgent(fake.path) as agent:
        with pytest.raises(GuestError, match="not listening any longer"):
            agent.ping()


def test_a_guest_without_an_agent(make: Any, tmp_path: Path) -> None:
    fake = make(sync=False)
    with pytest.raises(GuestError, match="does qemu-guest-agent run"):
        GuestAgent(fake.path, timeout=0.2)
    with pytest.raises(GuestError, match="is it in the image"):
        wait_for_agent(fake.path, name="web1", timeout=0.5)
    with pytest.raises(GuestError, match="cannot be reached"):
        GuestAgent(tmp_path / "none.sock")
    with pytest.raises(GuestError, match="ended while its agent was awaited"):
        wait_for_agent(tmp_path / "none.sock", name="web1", alive=lambda: False)


def test_power_off_needs_no_answer(make: Any) -> None:
    fake = make({"guest-shutdown": None})
    with GuestAgent(fake.path) as agent:
        agent.shutdown(patience=0.1)
    assert [r["execute"] for r in fake.requests] == ["guest-sync-delimited", "guest-shutdown"]


def test_power_off_without_a_login_manager(make: Any) -> None:
    fake = make(
        {"guest-shutdown": {"error": {"desc": "child process has failed"}}, "guest-exec": {"return": {"pid": 1}}}
    )
    with GuestAgent(fake.path) as agent:
        agent.shutdown()
    assert fake.requests[-1]["arguments"] == {"path": "/sbin/poweroff"}
