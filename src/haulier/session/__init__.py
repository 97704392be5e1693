"""Owns the bulk plane between two sites: numbered messages over several TLS paths, acknowledged, paced, sent again.

It knows bytes and channels only; what a message means, the control API and certificates' making are others' business.
Reading order: frames, channel, flow, core (no I/O in these); handshake, tls; handed, connection, transport; session.
"""

from haulier.session.connection import PathAddress
from haulier.session.handed import Handed
from haulier.session.session import PathStats, Session
from haulier.session.settings import Settings
from haulier.session.tls import TlsConfig

__all__ = ["Handed", "PathAddress", "PathStats", "Session", "Settings", "TlsConfig"]
