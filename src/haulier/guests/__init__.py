"""Guests under QEMU: their description, processes, golden snapshots, network taps and what is said to the agent inside.

Owns the QEMU command line, both QMP sockets, the files of a running guest and `golden/<id>` directories.
Never touches the network between sites, the journal or who owns a guest: callers decide when a guest may run.
"""

from haulier.guests.accel import Accelerator, QemuInfo, probe, qemu_info, qemu_version
from haulier.guests.model import GuestSpec, new_spec
from haulier.guests.paths import GuestPaths
from haulier.guests.qemu import Qemu, refuse_reasons
from haulier.guests.qmp import Event, Qmp

__all__ = [
    "Accelerator",
    "Event",
    "GuestPaths",
    "GuestSpec",
    "Qemu",
    "QemuInfo",
    "Qmp",
    "new_spec",
    "probe",
    "qemu_info",
    "qemu_version",
    "refuse_reasons",
]
