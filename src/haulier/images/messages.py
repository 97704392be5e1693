"""What two sites say to each other when an image is pushed. Pure; bounded; nonsense raises Corrupt.

S is the site that pushes, T the one that takes. First all items are named, then each is sent:

    S>T  Item, Part...        a manifest that T is to hold, and what it is
    T>S  Lacks                how many of its chunks T lacks
    S>T  Begin                send it now; blocks may be named of these manifests, which both hold
    T>S  Ready
         ... disk messages (docs/formats/disk-transfer.md) up to the final commit
    T>S  Kept                 durable under its name
    S>T  End
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from haulier.errors import UNDECODABLE, Corrupt
from haulier.units import CHUNK, FINGERPRINT, MAX_DISK, MIB

CONTROL: Final = 0
DISK: Final = 1
PART: Final = 4 * MIB
MAX_MANIFEST: Final = MAX_DISK // CHUNK * FINGERPRINT + 8 * MIB
"""Of the largest disk: its fingerprints, which do not compress, and 2 MiB of flags."""
MAX_ITEMS: Final = 64
MAX_COMMON: Final = 64

IMAGE: Final = "image"
GOLDEN: Final = "golden"
MEMORY: Final = "memory"
KINDS: Final = (IMAGE, GOLDEN, MEMORY)
"""An image's disk; the disk of a golden snapshot; the memory file of one, cut into chunks like a disk."""


class Message(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of all of them."""


class Item(Message, frozen=True, tag="item"):
    """S>T: `length` bytes of encoded manifest follow in parts. `name` is an image's, or a snapshot's id."""

    kind: str
    name: str
    length: int
    meta: dict[str, Any] = {}


class Part(Message, frozen=True, tag="part"):
    data: bytes


class Lacks(Message, frozen=True, tag="lacks"):
    """T>S: of the item named last."""

    chunks: int


class Begin(Message, frozen=True, tag="begin"):
    """S>T: item `number` is sent now; `common` are digests of manifests (hexadecimal) whose blocks may be named."""

    number: int
    common: tuple[str, ...] = ()


class Ready(Message, frozen=True, tag="ready"):
    """T>S: disk messages may come."""


class Kept(Message, frozen=True, tag="kept"):
    """T>S: the item is durable here."""


class End(Message, frozen=True, tag="end"):
    """S>T: that was all."""


class Failed(Message, frozen=True, tag="failed"):
    """Either way: this side cannot go on."""

    text: str
    code: int = 1


AnyMessage = Item | Part | Lacks | Begin | Ready | Kept | End | Failed


class PushOffer(msgspec.Struct, frozen=True, kw_only=True):
    """Site to site, by way of the agents, before a session: `images` by name and digest; `goldens` by id.

    `bytes` of all chunks; `secret` is the session's, 64 hexadecimal digits.
    """

    push: str
    secret: str
    images: tuple[tuple[str, str], ...]
    goldens: tuple[str, ...] = ()
    bytes: int = 0


class PushAccept(msgspec.Struct, frozen=True, kw_only=True):
    """`have`: images of those that are there already, whole; `goldens` likewise; `digests` of whole manifests there.

    `port` 0: nothing is lacking, there is no session.
    """

    port: int
    bulk: tuple[str, ...] = ()
    have: tuple[str, ...] = ()
    goldens: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Raises Corrupt for what is no message of a push."""
    if len(data) > 2 * PART:
        raise Corrupt(f"a message of {len(data)} bytes came in a push: at most {2 * PART} are allowed")
    try:
        message: AnyMessage = _DECODER.decode(data)
    except UNDECODABLE as error:
        raise Corrupt(f"a message of a push makes no sense ({error}): run the same haulier at both sites") from None
    return message
