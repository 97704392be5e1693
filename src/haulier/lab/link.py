"""A link of a lab that is up: its shape, changed live, and its counters; the same whatever the back end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from haulier.errors import UsageError
from haulier.lab import namespaces, netem, processes, state, tun
from haulier.lab.relay import Request
from haulier.lab.shaper import Counts, Shape


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the relay knows of a link: packets of both directions, and its own CPU seconds."""

    a_to_b: Counts
    b_to_a: Counts
    cpu_s: float


class Link:
    """One link. The shapes kept in the state file are what was last set; any process may set them."""

    def __init__(self, lab: str, name: str) -> None:
        self.lab = lab
        self.name = name
        self._load()

    def _load(self) -> tuple[state.LabState, state.LinkState]:
        whole = state.load(self.lab)
        if self.name not in whole.links:
            there = ", ".join(whole.links) or "none"
            raise UsageError(f"lab {self.lab} has no link {self.name!r}: it has {there}")
        return whole, whole.links[self.name]

    @property
    def ends(self) -> tuple[str, str]:
        """The sites a and b."""
        mine = self._load()[1]
        return mine.a, mine.b

    def shapes(self) -> tuple[Shape, Shape]:
        """(a to b, b to a) as last set."""
        mine = self._load()[1]
        return mine.a_to_b, mine.b_to_a

    def set(
        self,
        *,
        source: str | None = None,
        rate_bps: float | None = None,
        delay_s: float | None = None,
        jitter_s: float | None = None,
        loss: float | None = None,
        queue_bytes: int | None = None,
        up: bool | None = None,
    ) -> tuple[Shape, Shape]:
        """Changes what is given, at once, for what site `source` sends (None: both directions).

        Values as in `Shape`. Returns both shapes as they are now. `UsageError` for a value or site that makes no
        sense (nothing is changed then), `PeerError` when the link's relay is gone.
        """
        given: dict[str, Any] = {
            "rate_bps": rate_bps,
            "delay_s": delay_s,
            "jitter_s": jitter_s,
            "loss": loss,
            "queue_bytes": queue_bytes,
            "up": up,
        }
        changes = {key: value for key, value in given.items() if value is not None}
        with state.lock(self.lab):
            whole, mine = self._load()
            if source not in (None, mine.a, mine.b):
                raise UsageError(f"link {self.name} joins {mine.a} and {mine.b}, not {source}")
            ab = mine.a_to_b.changed(**changes) if source in (None, mine.a) else mine.a_to_b
            ba = mine.b_to_a.changed(**changes) if source in (None, mine.b) else mine.b_to_a
            if whole.backend == "tun":
                tun.ask(Path(mine.socket), Request(a_to_b=ab, b_to_a=ba))
            else:
                netem.apply(whole.sites[mine.a].namespace, mine.interface, ab, mine.mtu)
                netem.apply(whole.sites[mine.b].namespace, mine.interface, ba, mine.mtu)
            mine.a_to_b, mine.b_to_a = ab, ba
            state.save(whole)
        return ab, ba

    def stats(self) -> LinkStats | None:
        """The relay's packet counts; None for a back end without a relay."""
        whole, mine = self._load()
        if whole.backend != "tun":
            return None
        reply = tun.ask(Path(mine.socket), Request())
        assert reply.a_to_b is not None and reply.b_to_a is not None
        return LinkStats(a_to_b=reply.a_to_b.counts, b_to_a=reply.b_to_a.counts, cpu_s=reply.cpu_s)

    def wire_bytes(self) -> tuple[int, int]:
        """Bytes of IP packets that crossed the link, (a to b, b to a), by the receiving interface's counter."""
        whole, mine = self._load()
        found: list[int] = []
        for receiver in (mine.b, mine.a):
            seen = namespaces.counters(whole.sites[receiver].namespace, mine.interface)
            header = netem.HEADER if whole.backend == "netem" else 0
            found.append(seen.rx_bytes - header * seen.rx_packets)
        return found[0], found[1]

    def packets(self) -> int:
        """IP packets that crossed the link, both ways together, by the same counters."""
        whole, mine = self._load()
        return sum(
            namespaces.counters(whole.sites[receiver].namespace, mine.interface).rx_packets
            for receiver in (mine.b, mine.a)
        )

    def alive(self) -> bool:
        """Does the link carry packets at all? (False: its relay is gone.)"""
        whole, mine = self._load()
        return whole.backend != "tun" or processes.alive(mine.pid, mine.started)
