"""What a store gives up now: a policy's books are made from what the store remembers, asked, and put away again.

A store is opened by many processes and outlives them all, so no policy lives on in memory. Each chunk's row says when
it came and was used last, and how often; what is not in the rows (GDSF's age, S3-FIFO's queues) is handed back to be
written down. Between two choices nothing is lost but the order of accesses within a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from haulier.policy.coordinated import Facts, Informed
from haulier.policy.gdsf import Gdsf
from haulier.policy.model import COORDINATED_NAME, GDSF_NAME, Item, Key, Policy
from haulier.policy.replay import local_policy
from haulier.policy.s3fifo import S3Fifo


@dataclass
class Choice:
    """`victims` in order; `moved` keys got another round, with so many uses left over; `memory` is for next time."""

    victims: list[Key] = field(default_factory=list)
    moved: dict[Key, int] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


def choose(
    name: str,
    items: Sequence[Item],
    need: int,
    *,
    capacity: int,
    now: float,
    memory: dict[str, Any] | None = None,
    facts: Callable[[Key], Facts] | None = None,
    sites: int = 1,
    spare: Callable[[Key], bool] = lambda key: False,
) -> Choice:
    """Pick items of at least `need` bytes together (or all there are).

    `capacity` is the room in bytes for all items; `facts` says what the fleet of `sites` sites knows of a key
    ("coordinated", and the cost that "gdsf" weighs); items for which `spare` is true are not looked at.
    """
    policy: Policy
    if name == COORDINATED_NAME:
        policy = Informed(facts or (lambda key: Facts()), sites, now)
    else:
        policy = local_policy(name, max(capacity, 1))
    if name == GDSF_NAME and facts is not None:
        items = [replace(item, cost=facts(item.key).refetch_s * item.size) for item in items]
    policy.remember((memory or {}).get(name, {}))
    policy.restore([item for item in items if not spare(item.key)])
    sizes = {item.key: item.size for item in items}
    found = Choice(memory=dict(memory or {}))
    while need > 0:
        try:
            key = policy.victim()
        except LookupError:
            break
        found.victims.append(key)
        need -= sizes[key]
    if isinstance(policy, Gdsf):
        policy.mark(now)
    if isinstance(policy, S3Fifo):
        gone = set(found.victims)
        found.moved = {key: uses for key, uses in policy.moved.items() if key not in gone}
    found.memory[name] = policy.memory()
    return found
