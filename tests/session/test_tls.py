"""Sockets that TLS takes over."""

from __future__ import annotations

import gc
import os
import socket
import warnings
from pathlib import Path

import pytest

from tests.support.certs import TestCa
from tests.support.relay import reset
from tests.support.waiting import wait_for


def test_a_socket_whose_peer_is_gone_is_closed_and_not_lost(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = socket.create_connection(server.getsockname())
        sock, _ = server.accept()
    reset(peer)
    wait_for(lambda: not connected(sock), 10)
    descriptor = sock.fileno()
    context = TestCa(tmp_path).site("lisbon", peer="oslo").context(server=True)
    with warnings.catch_warnings(record=True) as lost:
        warnings.simplefilter("always")
        with pytest.raises(ConnectionResetError):
            context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        gc.collect()
    assert not lost
    with pytest.raises(OSError):
        os.fstat(descriptor)


def connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
