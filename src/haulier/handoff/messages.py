"""What the two workers of a handoff say to each other, and the files that the agent and its worker share.

Channels of the session are numbered by `Channel`. Control messages are MessagePack arrays, the tag first; anything
that does not decode is Corrupt and ends the handoff.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from haulier.errors import UNDECODABLE, Corrupt

LEAVE_BYTES = 16 << 20
"""An overlay of fewer bytes than this travels whole, also on demand."""


class Channel(enum.IntEnum):
    """Channels of the session between the two workers."""

    CONTROL = 0
    DISK = 1
    MEMORY = 2
    RETURN_PATH = 3
    """What the target QEMU says back to the source QEMU, verbatim."""
    PROBE = 5
    """Random bytes that measure the link when the disk gave no occasion to."""
    CHECKPOINT = 6
    """Of a container: the files of its final dump (docs/formats/checkpoints.md)."""
    URGENT = 7
    """Pages that the guest waits for at the target (`haulier.handoff.urgent`)."""
    DELIVERED = 4
    """Raw bytes that the target QEMU has taken so far (8 bytes, big endian)."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator may ask of a handoff. Milliseconds and seconds."""

    downtime_ms: int = 300
    """Downtime to aim for: decides when memory is small enough to switch over."""
    check: bool = False
    """Compare the whole memory of the stopped source with the never-run target before the token moves."""
    deadline_s: float = 0.0
    """Give up (the guest stays) when it takes longer than this; 0 = no limit."""
    level: int = 0
    """zstd level for memory; 0 = by the link's rate."""
    stall_s: float = 60.0
    """Give up when nothing was acknowledged for this long although the link is up."""
    allow: tuple[str, ...] = ()
    """What may be done to a guest that outruns the link, of `haulier.handoff.measures.ALLOWABLE`."""
    keep_fresh_s: float = 0.0
    """Of a prefetch: send what has changed again every so many seconds, until it is cancelled; 0 = once."""
    disk: str = "full"
    """"full", or "on-demand": data at rest stays at the source, and follows when it is read, or little by little."""
    transport: str = ""
    """"striping" over a connection for each path, or "mptcp"; "" = as the source's site.toml says."""
    join: str = "ahead"
    """Of a guest with the policy mptcp: clients join its address at the target "ahead", or "after" it has moved."""
    paths: str = "deadline"
    """Of paths that cost something: "cheap" = none while another works, "all", or "deadline" = if it is missed else."""
    through: tuple[str, ...] = ()
    """Sites that carry a part of it, each on a path of its own beside those that lead there."""


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """Source site to target agent, before anything is sent. Digests and ids are hexadecimal."""

    handoff: str
    source: str
    spec: dict[str, Any]
    """A `haulier.guests.model.GuestSpec`."""
    epoch: int
    secret: str
    """Shared by the two workers' session; 64 hexadecimal digits."""
    manifest: str
    """Digest of the manifest that the guest's overlay lies on at the source."""
    disk_bytes: int = 0
    """Bytes of distinct chunks in that manifest."""
    memory_bases: tuple[str, ...] = ()
    """Pictures of memory that the source could start its mirror from, best first."""
    images: tuple[str, ...] = ()
    """Images that the source holds (`haulier.handoff.shared.short`), those that the guest was made from first."""
    golden: bool = True
    """The source has the disk of the golden snapshot that the guest was born from: both start from it, or neither."""
    qemu: str = ""
    accelerator: str = ""
    host: dict[str, str] = {}
    """Of a container: what its processes rely on ("kernel", "criu", "cpu": its flags), and a digest of what the kernel
    puts into each ("vdso")."""
    options: Options = Options()


class Accept(msgspec.Struct, frozen=True, kw_only=True):
    """Target agent's answer to an offer."""

    port: int
    bulk: tuple[str, ...]
    manifest: bool
    """The target has the manifest (by digest), if not all of its chunks."""
    golden: bool
    """The target has the disk of the golden snapshot that the guest was born from."""
    memory_base: str
    """The best of the offered pictures of memory that the target has too; "" = none."""
    complete: bool = False
    """The target has the manifest and all of its chunks."""
    images: tuple[str, ...] = ()
    """Those of the offered images that the target holds too: their blocks may be named. None where it has the base."""
    qemu: str = ""
    accelerator: str = ""
    site_address: str = ""
    """The address that the guest will have there, of the site's pool, with the policy mptcp."""
    same_vdso: bool = False
    """Of a container: the kernel there puts the same code into each process; pages are compressed against it."""


class Resumption(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source site to target agent: new workers go on with a post-copy of which both have lost theirs."""

    guest: str
    handoff: str
    epoch: int
    secret: str
    """Of the new session."""
    pictured: bool = False
    """The source still has what its dead worker knew the target to have."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """job.json: what a worker needs to know when it starts."""

    handoff: str
    role: str
    guest: str
    peer: str
    options: Options = Options()
    offer: Offer | None = None
    """At the target: the offer it was accepted from."""
    manifest: str = ""
    """At the target: name of the base manifest in the store, if it is there."""
    golden: bool = False
    """At the target: the golden snapshot's disk is here, as the source was told."""
    images: tuple[str, ...] = ()
    """At the target: images that both sites hold, as the source was told."""
    memory_base: str = ""
    """At the target: the picture of memory that the source was told to start from."""


class Status(msgspec.Struct, kw_only=True):
    """status.json: written several times a second, replaced in one step."""

    handoff: str
    role: str
    guest: str
    source: str
    target: str
    phase: str = "start"
    started: float = 0.0
    updated: float = 0.0
    progress: float = 0.0
    eta_s: float = -1.0
    """-1 = not known yet."""
    rate_bps: float = 0.0
    rtt_s: float = 0.0
    wire_bytes: int = 0
    disk_left: int = 0
    memory_left: int = 0
    message: str = ""
    port: int = 0
    """At the target: where its session listens."""
    paths: list[dict[str, Any]] = []
    transport: str = ""
    """At the source: how the bytes travel, and why not as was asked for."""
    memory_base: str = ""
    """The picture of memory that this side's mirror began with."""
    downtime_ms: float = 0.0
    """At the source, while memory converges: what the downtime would be if the guest were stopped now."""
    mode: str = ""
    """At the source: how memory is being encoded, and ..."""
    why: str = ""
    """... why."""
    layers: dict[str, dict[str, int]] = {}
    """At the source: chunks and wire bytes of the disk by layer (base, application, instance)."""


# -- control messages ---------------------------------------------------------------------------------------------


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all control messages."""


class Base(Message, frozen=True, tag="base"):
    """S>T: the manifest the disk starts from, in full, because the target lacks it."""

    manifest: bytes


class BaseReady(Message, frozen=True, tag="base-ready"):
    """T>S: disk messages may come."""


class Heat(Message, frozen=True, tag="heat"):
    """S>T: how often each chunk of the disk was read, one byte a chunk, zstd: what will probably be read next."""

    counts: bytes


class PrepareMemory(Message, frozen=True, tag="prepare-memory"):
    """S>T: start a stopped QEMU and connect the mirror."""

    memory_base: str


class Compare(Message, frozen=True, tag="compare"):
    """S>T: digests of regions of the picture that an earlier attempt left (`haulier.memory.salvage`)."""

    regions: bytes


class Unlike(Message, frozen=True, tag="unlike"):
    """T>S: numbers of the regions that differ (u32, little-endian, ascending), and a digest for each page of them.

    No digests where there are more regions than can be told of: then the whole picture is given up.
    """

    regions: bytes
    pages: bytes


class GiveUp(Message, frozen=True, tag="give-up"):
    """S>T: one bit for each of those pages: it differs, and is zero from now on."""

    pages: bytes


class GivenUp(Message, frozen=True, tag="given-up"):
    """T>S: both pictures are equal now."""


class MemoryReady(Message, frozen=True, tag="memory-ready"):
    """T>S: the stream may come. `pictured`: after the two have agreed on what dead workers' mirrors held."""

    pictured: bool = False


class Stretch(Message, frozen=True, tag="stretch"):
    """S>T: make the far end of a tunnel: number on the wire, addresses of both hosts, MAC of the bridge here.

    With `ahead` the target is home: the tunnel leads from there to the guest, which is still here.
    """

    vni: int
    home: str
    away: str
    gateway_mac: str
    ahead: bool = False


class Stretched(Message, frozen=True, tag="stretched"):
    """T>S: it is there, or why not; of a tunnel ahead, with the MAC of the bridge there."""

    error: str = ""
    gateway_mac: str = ""


class Prepared(Message, frozen=True, tag="prepared"):
    """T>S: all that a container needs to be restored is there but for the final dump."""


class Clock(Message, frozen=True, tag="clock"):
    """Either way: for comparing the two hosts' clocks. `sent` is echoed, `seen` is the peer's own time."""

    sent: float
    seen: float = 0.0


class Arrived(Message, frozen=True, tag="arrived"):
    """T>S: everything is here, durable and stopped; goes with the vote READY."""

    epoch: int
    raw_bytes: int
    stream_digest: bytes
    manifest: bytes
    """Digest of the committed manifest."""
    memory: bytes = b""
    """Digests of regions of the guest's memory, when a check was asked for."""
    check_s: float = 0.0
    durable_at: float = 0.0
    """When the final manifest was durable, and ..."""
    loaded_at: float = 0.0
    """... when QEMU had loaded device state, by the target's clock."""
    came_at: float = 0.0
    """Of a container: when all of its dump was there, by the same clock; its restore is what follows."""


class GoFirst(Message, frozen=True, tag="go-first"):
    """S>T: the guest will run there before its memory is whole: vote as soon as its disk is."""


class Poised(Message, frozen=True, tag="poised"):
    """T>S: the disk is durable, QEMU waits for device state; goes with the vote READY."""

    epoch: int
    manifest: bytes
    """Digest of the committed manifest."""
    durable_at: float = 0.0


class Filled(Message, frozen=True, tag="filled"):
    """T>S: all of the memory is there; goes with TOOK. What the guest had to wait for meanwhile, in milliseconds."""

    raw_bytes: int
    stream_digest: bytes
    requests: int = 0
    worst_ms: float = 0.0
    mean_ms: float = 0.0
    loaded_at: float = 0.0
    """When device state was, by the target's clock."""


class Own(Message, frozen=True, tag="own"):
    """Either way: a message of the ownership table."""

    event: str
    epoch: int


class Running(Message, frozen=True, tag="running"):
    """T>S: the guest runs here; `at` is QEMU's RESUME event by the target's clock."""

    at: float


class Finish(Message, frozen=True, tag="finish"):
    """S>T: the source is done with it; keep the mirror under this name for the way back."""

    memory_id: str
    places: bytes = b""
    """Of a container: where its pages lie in that picture."""


class Failed(Message, frozen=True, tag="failed"):
    """Either way, before the token: this side cannot go on."""

    text: str
    code: int = 12


AnyMessage = (
    Base
    | BaseReady
    | Heat
    | PrepareMemory
    | Compare
    | Unlike
    | GiveUp
    | GivenUp
    | MemoryReady
    | Stretch
    | Stretched
    | Prepared
    | Clock
    | Arrived
    | GoFirst
    | Poised
    | Filled
    | Own
    | Running
    | Finish
    | Failed
)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(AnyMessage)
MAX_CONTROL = 16 << 20


def encode(message: AnyMessage) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Raises Corrupt for what is no control message."""
    if len(data) > MAX_CONTROL:
        raise Corrupt(f"a control message of {len(data)} bytes came: at most {MAX_CONTROL} are allowed")
    try:
        message: AnyMessage = _DECODER.decode(data)
    except UNDECODABLE as error:
        raise Corrupt(f"a control message makes no sense ({error}): run the same haulier at both sites") from None
    return message
