"""Every bound and time of a session in one place."""

from __future__ import annotations

from dataclasses import dataclass

from haulier.units import MIB


@dataclass(frozen=True)
class Settings:
    """Bounds in bytes, times in seconds. The defaults suit links of 1 Mbps to 1 Gbps and 1 to 300 ms."""

    max_message: int = 16 * MIB
    """Largest message; a larger one is the sender's UsageError and the receiver's Corrupt."""
    max_unsent: int = 16 * MIB
    """`send` blocks while this much of its channel has not been put on a path yet."""
    receive_window: int = 8 * MIB
    """Bytes that may wait for a channel's callback, besides the message being put together."""

    outage_limit_s: float = 120.0
    """Without any path for longer than this, the session is lost."""
    refused_limit_s: float = 10.0
    """Every path answered "connection refused" for this long: the peer's process is gone, not the network."""
    ping_s: float = 1.0
    stall_s: float = 1.0
    stall_rtts: float = 4.0
    """No acknowledged progress for max(stall_s, stall_rtts * RTT): what is outstanding goes another way."""
    dead_s: float = 4.0
    dead_rtts: float = 8.0
    """Nothing heard for max(dead_s, dead_rtts * RTT): the connection is given up and dialled again."""
    redial_first_s: float = 0.2
    redial_most_s: float = 1.0
    """A path that returns is to carry again within two seconds, TLS and hello included."""
    dial_s: float = 2.0
    """One TCP connect; short, since a lost SYN is repeated only after 1 and 3 s."""
    first_cheap_s: float = 2.0
    """At its start a session waits so long for a path that costs nothing before it uses one that does."""
    subflows_s: float = 3.0
    """MPTCP has so long to show all its subflows; then there are several connections instead."""
    handshake_s: float = 10.0
    """TCP, TLS and hello together."""
    handed_bytes: int = 64 * 1024
    """A session that has said so much, both ways, dials paths of its own beside a connection that was handed over:
    each costs some 3 KB, but what goes over the other is passed on by the agent there."""

    ack_s: float = 0.010
    """What is acknowledged alone waits so long for more to come or for something to go the other way, unless ..."""
    ack_bytes: int = 2048
    """... so much has come."""
    quiet_ack_s: float = 0.25
    """Where so much has not come for `quiet_after_s`, nothing is estimated from acks: they wait for company so long."""
    quiet_after_s: float = 0.2
    first_window: int = 64 * 1024
    min_window: int = 16 * 1024
    max_window: int = 48 * MIB
    window_rtts: float = 1.5
    """Bytes in flight on a path: this many bandwidth-delay products ..."""
    slack_s: float = 0.004
    """... and what the path carries in this time, for acks that wait for a thread."""
    frame_s: float = 0.010
    """A frame takes about this long on its path (within 4 KiB and 64 KiB), so that others need not wait longer."""
