"""A connection that others have made and that becomes a session's first path."""

from __future__ import annotations

import ssl
from dataclasses import dataclass


@dataclass(frozen=True)
class Handed:
    """TLS stands, the peer is the site that is wanted, and both ends have agreed on the session's secret over it.

    `early`: what was read from it beyond that. From there on it carries frames, without a hello.
    """

    sock: ssl.SSLSocket
    early: bytes = b""
    clock_offset: float = 0.0
    """The peer's clock minus ours, in seconds, as both said over it."""

    def close(self) -> None:
        """Nobody wants it."""
        self.sock.close()
