"""The kernel's back end: a veth pair with netem (delay, jitter, loss) and tbf (rate, queue) at each end.

Each end's egress is one direction. netem is the root and tbf its child, so that tbf's limit is a queue in bytes;
tbf as the root would ask netem for packets that are not due yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from haulier.errors import HaulierError
from haulier.lab import namespaces
from haulier.lab.shaper import Shape

HEADER = 14
"""veth counts Ethernet headers, a TUN interface does not."""
_ORDER_RATE = "100gbit"
"""With a rate netem lets no packet overtake another, whatever the jitter; this one never limits anything."""
_IN_FLIGHT = 200_000
"""netem's own limit counts the packets under way: it must never be what drops them."""

_available: bool | None = None


def available() -> bool:
    """Has this kernel netem and tbf? Tried once per process, in a namespace made for it."""
    global _available
    if _available is None:
        scratch = f"haulier-netem-probe-{os.getpid()}"
        try:
            namespaces.run(["ip", "netns", "add", scratch])
            shape = Shape(rate_bps=1e6, delay_s=0.001)
            for command in commands("lo", shape, 1500):
                namespaces.run(namespaces.inside(scratch, ["tc", *command]))
            _available = True
        except HaulierError:
            _available = False
        finally:
            namespaces.delete(scratch)
    return _available


def commands(interface: str, shape: Shape, mtu: int) -> list[list[str]]:
    """The words of `tc` that give an interface's egress that shape, from any shape before."""
    netem = f"netem limit {_IN_FLIGHT} delay {shape.delay_s * 1e6:.0f}us"
    if shape.jitter_s:
        netem += f" {shape.jitter_s * 1e6:.0f}us"
    loss = 1.0 if not shape.up else shape.loss
    # `replace` keeps options that are not named, so the loss is always named.
    netem += f" loss random {loss * 100:.6f}% rate {_ORDER_RATE}"
    root = f"qdisc replace dev {interface} root handle 1: {netem}"
    if shape.rate_bps:
        # The bucket holds a few packets, or 1 ms of a fast link: the kernel's timer cannot do much better.
        burst = max(2 * (mtu + HEADER), int(shape.rate_bps / 8 / 1000))
        # tbf takes headers off the rate too; so much more is what keeps the rate of full IP packets right.
        rate = shape.rate_bps * (mtu + HEADER) / mtu
        # A handle of its own for each kind: the kernel refuses to change a qdisc's kind under the same handle.
        handle, child = "10:", f"tbf rate {rate:.0f}bit burst {burst}b limit {max(shape.limit_bytes, burst)}b"
    else:
        handle, child = "20:", f"pfifo limit {_IN_FLIGHT}"
    return [root.split(), f"qdisc replace dev {interface} parent 1:1 handle {handle} {child}".split()]


def create(namespace_a: str, namespace_b: str, interface: str, mtu: int) -> None:
    """Makes the pair, both ends down. Packets are segmented by the sender as they are on a real link."""
    namespaces.ip(
        namespace_a,
        [f"link add {interface} mtu {mtu} type veth peer name {interface} mtu {mtu} netns {namespace_b}"],
    )
    for namespace in (namespace_a, namespace_b):
        # Otherwise one loss or one place in the queue takes 64 KiB at once.
        namespaces.ip(namespace, [f"link set {interface} gso_max_segs 1"])


def apply(namespace: str, interface: str, shape: Shape, mtu: int) -> None:
    """Gives an end's egress a shape; live."""
    _run(namespace, commands(interface, shape, mtu))


def _run(namespace: str, lines: Sequence[Sequence[str]]) -> None:
    batch = "\n".join(" ".join(line) for line in lines) + "\n"
    namespaces.run(namespaces.inside(namespace, ["tc", "-batch", "-"]), batch)
