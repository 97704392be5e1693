"""MPTCP sockets: whether there are any, and how many subflows a connection really has.

Setting a host up for it is not done here (haulier.network.mptcp).
"""

from __future__ import annotations

import socket
import struct
from typing import Final

IPPROTO_MPTCP: Final = 262
_SOL_MPTCP: Final = 284
_MPTCP_INFO: Final = 1
_INFO: Final = struct.Struct("=8BI")
"""struct mptcp_info of linux/mptcp.h up to mptcpi_flags; its first byte counts subflows beside the first."""
_FALLBACK: Final = 1
RECEIVE_BYTES: Final = 1 << 20
"""What a new socket may hold at least where a guest or its client receives, so that connections stay as fast as they
were before a move (the middle number of net.ipv4.tcp_rmem).

Linux lets the receive buffers of a connection's subflows grow only while the connection as a whole takes in more in a
round trip than ever before (mptcp_rcv_space_adjust, 6.1 to 6.18). A subflow that joins later stays at the default of
128 KiB, a window of 64: 52 Mbit/s over 10 ms, whatever the way allows.
"""


def available() -> bool:
    """This kernel has MPTCP, and it is on in this network namespace."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP):
            return True
    except OSError:
        return False


def protocol(wanted: bool) -> int:
    """For `socket.socket`: MPTCP where it is wanted and there, else TCP."""
    return IPPROTO_MPTCP if wanted and available() else socket.IPPROTO_TCP


def subflows(sock: socket.socket) -> int:
    """Subflows of a connection, the first one included; 0 if it is plain TCP, or has fallen back to that."""
    try:
        info = sock.getsockopt(_SOL_MPTCP, _MPTCP_INFO, 128)
    except OSError:
        return 0
    if len(info) < _INFO.size:
        return 0
    found = _INFO.unpack_from(info)
    return 0 if found[-1] & _FALLBACK else int(found[0]) + 1
