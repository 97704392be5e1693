"""What a policy is told, what it answers, and the names under which policies are known.

A policy keeps books of *items*: chunks, extents or whole images, whatever its caller counts in. It is told of
accesses in the order in which they happen, and names a victim whenever its caller needs room:

    miss:  while there is no room: policy.victim();  then policy.insert(item)
    hit:   policy.hit(key)

It never looks at a clock, and two policies that are told the same answer the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from haulier.errors import UsageError

Key = Hashable


@dataclass(slots=True)
class Item:
    """`size` in bytes of room; `cost` in seconds to fetch it again; `hits` after the access that brought it.

    `came` and `used` order items that are restored (first and last access, any clock). `main` is S3-FIFO's: it has
    shown that it is used again.
    """

    key: Key
    size: int
    cost: float = 1.0
    hits: int = 0
    came: float = 0.0
    used: float = 0.0
    main: bool = False


class Policy(Protocol):
    """One site's policy. `capacity` is the room in bytes that the items share."""

    name: ClassVar[str]

    def insert(self, item: Item) -> None:
        """`item` was fetched and is kept now."""

    def hit(self, key: Key, cost: float | None = None) -> None:
        """`key` was used again; `cost` is what fetching it would have cost now, where that has changed."""

    def remove(self, key: Key) -> None:
        """`key` left for a reason that is not the policy's."""

    def victim(self) -> Key:
        """What goes next; it is struck from the books. LookupError when there is nothing."""

    def restore(self, items: Iterable[Item]) -> None:
        """Fill empty books with what a store remembers of earlier accesses."""

    def memory(self) -> dict[str, Any]:
        """What lasts beyond the items, small, as JSON. `remember` takes it back."""

    def remember(self, memory: dict[str, Any]) -> None:
        """Undo `memory`; what is not understood is ignored, a policy can always begin anew."""


class Forgetful(ABC):
    """The part of a policy that remembers nothing beyond its items, which it takes back in the order of their use."""

    @abstractmethod
    def insert(self, item: Item) -> None: ...

    def restore(self, items: Iterable[Item]) -> None:
        for item in sorted(items, key=lambda item: item.used):
            self.insert(item)

    def memory(self) -> dict[str, Any]:
        return {}

    def remember(self, memory: dict[str, Any]) -> None:  # noqa: B027 - there is nothing to take back
        pass


LRU_NAME: Final = "lru"
LFU_NAME: Final = "lfu"
GDSF_NAME: Final = "gdsf"
S3FIFO_NAME: Final = "s3-fifo"
COORDINATED_NAME: Final = "coordinated"
NAMES: Final = (LRU_NAME, LFU_NAME, GDSF_NAME, S3FIFO_NAME, COORDINATED_NAME)
DEFAULT_NAME: Final = GDSF_NAME


def check_policy(name: str) -> str:
    """`name` if a policy has it; UsageError otherwise."""
    if name not in NAMES:
        raise UsageError(f"there is no cache policy {name[:40]!r}: choose one of {', '.join(NAMES)}")
    return name
