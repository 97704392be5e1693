"""The relay's configuration, and HAProxy with it where there is one."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from haulier.errors import Unsupported, UsageError
from haulier.lab.lab import Lab
from haulier.network.relay import Relay, prepare_host, receive_buffers
from haulier.session.mptcp import available, protocol, subflows
from tests.docs.pages import ROOT
from tests.support.labs import lab
from tests.support.waiting import wait_for

HERE = Path("/run/haulier-relay")


def test_clients_get_plain_tcp_and_the_guest_one_server() -> None:
    text = Relay("web1", "0.0.0.0:443", "[fd78::20]:8443", HERE).config()
    assert "listen web1\n    bind 0.0.0.0:443\n    server guest [fd78::20]:8443\n" in text
    assert f"stats socket {HERE}/web1.sock mode 600 level admin" in text and "mode tcp" in text


@pytest.mark.parametrize(
    "wrong", ["10.78.1.20", "10.78.1.20:0", "gateway:443", "fd78::20:443", "10.78.1.20:443 backup"]
)
def test_what_is_no_address_with_a_port_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="--to"):
        Relay("web1", "0.0.0.0:443", wrong, HERE)
    with pytest.raises(UsageError, match="--listen"):
        Relay("web1", wrong, "10.78.1.20:443", HERE)


def test_a_directory_that_haproxy_could_not_read_is_refused() -> None:
    for directory in (Path("/run/two words"), Path("/" + "x" * 100)):
        with pytest.raises(UsageError, match="directory"):
            Relay("web1", "0.0.0.0:443", "10.78.1.20:443", directory)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None if name == "mptcpize" else "/usr/sbin/haproxy")
    with pytest.raises(Unsupported, match=r"^mptcpize not installed"):
        Relay("web1", "0.0.0.0:443", "10.78.1.20:443", HERE).command()


def test_small_receive_buffers_are_raised_and_large_ones_left() -> None:
    assert receive_buffers("4096\t131072\t33554432\n") == "4096 1048576 33554432"
    assert receive_buffers("4096 87380 524288") == "4096 1048576 1048576", "the most is no less than the usual"
    assert receive_buffers("4096 1048576 6291456") == ""


def listening(host: str, port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol(True))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(4)
    sock.settimeout(20)
    return sock


@pytest.mark.root
def test_haproxy_speaks_mptcp_to_the_guest_and_new_connections_follow_it(tmp_path: Path) -> None:
    if not (shutil.which("haproxy") and shutil.which("mptcpize")) or not available():
        pytest.skip("haproxy, mptcpize or MPTCP is not there")
    listen = ("127.0.0.1", 7443)
    with lab('name = "relay"\n[[site]]\nname = "gw"\n') as made, made.call("gw", lambda: listening("127.0.0.1")) as old:
        to = f"127.0.0.1:{old.getsockname()[1]}"
        command = [sys.executable, "-m", "haulier", "relay", "web1", "--listen", f"{listen[0]}:{listen[1]}", "--to", to]
        with made.popen("gw", [*command, "--directory", str(tmp_path)]) as process:
            try:
                first = wait_for(lambda: made.call("gw", lambda: connected(listen)), 20, "the relay")
                with first, old.accept()[0] as served:
                    assert subflows(served) == 1, "MPTCP, and not fallen back"
                    limits = made.exec("gw", ["ip", "mptcp", "limits"]).stdout
                    assert "add_addr_accepted 8" in limits, "what guests announce is accepted"
                    buffers = made.exec("gw", ["sysctl", "-n", "net.ipv4.tcp_rmem"]).stdout
                    assert receive_buffers(buffers) == "", "subflows that join late have room"
                    first.sendall(b"ping")
                    assert served.recv(4) == b"ping"
                    port = old.getsockname()[1]
                    with made.call("gw", lambda: listening("127.0.0.2", port)) as new:
                        tell(tmp_path)
                        second = made.call("gw", lambda: connected(listen))
                        assert second is not None
                        with second, new.accept()[0]:
                            pass
                    served.sendall(b"pong")
                    assert first.recv(4) == b"pong", "what is open stays where it is"
            finally:
                process.terminate()


@pytest.mark.root
def test_a_connection_that_has_moved_keeps_a_window_wider_than_what_sockets_begin_with() -> None:
    if not available():
        pytest.skip("MPTCP is not there")
    link = '[[link]]\nname = "way"\na = "client"\nb = "there"\nrate = "100mbit"\ndelay = "5ms"\n'
    with lab(f'name = "moved"\n[[site]]\nname = "client"\n[[site]]\nname = "there"\n{link}') as made:
        assert made.call("client", prepare_host) == []
        addresses = [f"10.78.1.{number}" for number in range(20, 27)]
        made.exec("client", ["ip", "route", "add", "10.78.1.0/24", "via", made.address("there", "way")])
        made.exec("there", ["ip", "mptcp", "limits", "set", "subflows", "8"])
        made.exec("there", ["ip", "addr", "add", f"{addresses[0]}/32", "dev", "lo"])
        listener = made.call("there", lambda: listening("0.0.0.0"))
        port = listener.getsockname()[1]
        with (
            listener,
            made.call("client", lambda: dialled(addresses[0], port)) as client,
            listener.accept()[0] as served,
        ):
            works = ((pour, served), (drain, client))
            threads = [threading.Thread(target=work, args=(sock,), daemon=True) for work, sock in works]
            for thread in threads:
                thread.start()
            wait_for(partial(wide, made, addresses[0]), 20, "a stream at its full rate")
            for number, (old, new) in enumerate(itertools.pairwise(addresses), 1):
                made.exec("there", ["ip", "addr", "add", f"{new}/32", "dev", "lo"])
                made.exec("there", ["ip", "mptcp", "endpoint", "add", new, "id", str(number), "dev", "lo", "signal"])
                wait_for(partial(window, made, new), 20, "the client's joining")
                gone = ["0", old] if number == 1 else [str(number - 1)]
                made.exec("there", ["ip", "mptcp", "endpoint", "delete", "id", *gone])
                made.exec("there", ["ip", "addr", "del", f"{old}/32", "dev", "lo"])
                wait_for(partial(wide, made, new), 20, f"a window of more than {WIDE} bytes at {new}")
            for sock in (served, client):
                sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


WIDE = 500_000
"""Bytes; sockets that begin with 128 KiB have windows of 64 KiB, and a few times that when packets were lost."""


def window(made: Lab, address: str) -> int:
    """Bytes that the client lets be on their way from `address`; 0 where no subflow goes by it."""
    shown = made.exec("client", ["ss", "-HtniO", "state", "established", "dst", address]).stdout
    return max((int(found) for found in re.findall(r"\brcv_ssthresh:(\d+)", shown)), default=0)


def wide(made: Lab, address: str) -> bool:
    return window(made, address) > WIDE


def dialled(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol(True))
    sock.settimeout(20)
    sock.connect((host, port))
    return sock


def pour(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(1 << 16))


def drain(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass


def connected(where: tuple[str, int]) -> socket.socket | None:
    try:
        return socket.create_connection(where, 5)
    except OSError:
        return None


def tell(directory: Path) -> None:
    """The shipped hook, with a stand-in for ssh and socat."""
    reach = directory / "reach"
    reach.write_text(
        f"#!{sys.executable}\nimport socket, sys\ns = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({str(directory / 'web1.sock')!r})\ns.sendall(sys.stdin.buffer.read())\nprint(s.recv(999))\n"
    )
    reach.chmod(0o755)
    environment = {**os.environ, "RELAY": str(reach), "HAULIER_SITE_ADDRESS": "127.0.0.2"}
    hook = ROOT / "packaging" / "hooks" / "haproxy"
    subprocess.run([str(hook), "web1", "10.77.0.10", "oslo", "lisbon"], env=environment, check=True)
