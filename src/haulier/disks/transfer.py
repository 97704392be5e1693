"""Moving a disk from one site to another: what the handoff engine uses."""

from haulier.disks.receiving import DiskReceiver, ReceiverCounters
from haulier.disks.sending import DiskCounters, DiskSender, RoundReport

__all__ = ["DiskCounters", "DiskReceiver", "DiskSender", "ReceiverCounters", "RoundReport"]
