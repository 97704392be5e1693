"""How long a migration that was given up would have taken at least: what was left, at the rate it went. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.model import Kind


@dataclass(frozen=True)
class Stopped:
    """A migration at the moment it was given up (or was done).

    `ran_s`: seconds so far. `sent`: bytes on the wire so far. `memory_left`: bytes of pages that are not zero and have
    not been sent once. `disk_left`: bytes of disk not sent once. `per_page`: wire bytes for a byte of page so far.
    """

    ran_s: float
    sent: int
    memory_left: int
    disk_left: int
    per_page: float = 1.0
    done: bool = False


def total(stopped: Stopped, settle_s: float = 0.0) -> tuple[float, float, Kind]:
    """(seconds, bytes on the wire, kind) of the whole.

    A lower bound: each byte that is left is counted once, though the guest goes on writing. `settle_s` at the
    beginning sent nothing and is not part of the rate.
    """
    if stopped.done:
        return stopped.ran_s, float(stopped.sent), Kind.MEASURED
    moving = stopped.ran_s - settle_s
    if moving <= 0 or stopped.sent <= 0:
        raise ValueError(f"nothing was sent in {stopped.ran_s:.1f} s: there is no rate to go by")
    left = stopped.memory_left * stopped.per_page + stopped.disk_left
    return stopped.ran_s + left / (stopped.sent / moving), stopped.sent + left, Kind.EXTRAPOLATED


def whole_disk(disk_bytes: int, rate: float, memory_s: float) -> float:
    """Seconds to mirror `disk_bytes` at `rate` bytes a second, and then move memory in `memory_s`."""
    if rate <= 0:
        raise ValueError("no rate was measured")
    return disk_bytes / rate + memory_s
