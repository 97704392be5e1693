"""Which site should keep which layers in its cache: `haulier.policy.coordinated.place` over what the sites reported.

A thing to keep is a *layer*: the chunks that a manifest has beyond the manifests before it (bases first), so that no
chunk counts twice. Pure: what is known is passed in, the plan is handed back. A plan is a hint; no site fetches or
evicts anything because of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from haulier.coordinator import bitmaps
from haulier.coordinator.bitmaps import Bits
from haulier.coordinator.index import UNMEASURED, Link
from haulier.policy import coordinated
from haulier.policy.model import Key
from haulier.units import CHUNK

MAX_SITES: Final = 64
MAX_LAYERS: Final = 2000
MAX_STEPS: Final = 500_000
"""Layers times sites squared: a second or two of work."""
ORIGIN_S: Final = 8 / 1e6
"""Seconds a byte for what no site holds."""
STAY: Final = 0.1
"""So much more than its demand a layer is worth where it is already: plans should not wander."""
HALF_LIFE_S: Final = 86_400.0
_ORDER: Final = {"base": 0, "application": 1, "": 2, "instance": 3}


@dataclass(frozen=True)
class Layer:
    """`bits` are the ids that it adds; `size` in bytes of chunks; `wanted[site]` its decayed uses, `spread` those of
    which the site is not known."""

    digest: bytes
    names: tuple[str, ...]
    layer: str
    bits: Bits
    wanted: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0

    @property
    def size(self) -> int:
        return len(self.bits) * CHUNK


@dataclass(frozen=True)
class Place:
    """A site: `room` in bytes for what nothing there refers to, `pinned` digests of manifests that it keeps anyway."""

    site: str
    room: int
    held: Bits
    pinned: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class Plan:
    """`keep[site]` and `over[site]` are ids: planned there, and held though the plan does not want them there
    and has another site keep the copy that it has. `facts` is what an operator is shown. `made` is in Unix seconds."""

    made: float
    keep: Mapping[str, Bits]
    over: Mapping[str, Bits]
    facts: dict[str, Any]


def layers_of(manifests: Sequence[tuple[bytes, tuple[str, ...], str, Bits]]) -> list[Layer]:
    """Disjoint layers of manifests (digest, names, kind of layer, ids); those that add nothing are left out."""
    seen = bitmaps.empty()
    found = []
    for digest, names, layer, bits in sorted(manifests, key=lambda each: (_ORDER.get(each[2], 2), len(each[3]), each)):
        own = bits - seen
        if len(own):
            seen = seen | own
            found.append(Layer(digest, names, layer, own))
    return found


def make_plan(
    layers: Sequence[Layer], places: Sequence[Place], links: Mapping[str, Mapping[str, Link]], now: float
) -> Plan:
    """The plan of all sites at once. `links[target][source]`. Beyond the bounds above, the sites last by name and the
    layers that are wanted least are left out: such a site goes on without a plan."""
    chosen = sorted(places, key=lambda each: each.site)[:MAX_SITES]
    most = min(MAX_LAYERS, MAX_STEPS // max(len(chosen), 1) ** 2)
    planned = sorted(layers, key=lambda each: (-(sum(each.wanted.values()) + each.spread), each.digest))[:most]
    names = [each.site for each in chosen]
    fleet = coordinated.Fleet(
        [[_cost(links, r, s) for s in names] for r in names], [ORIGIN_S] * len(names), half_life=HALF_LIFE_S
    )
    sizes: dict[Key, int] = {each.digest: each.size for each in planned}
    held = [{u.digest for u in planned if u.bits.issubset(each.held)} for each in chosen]
    pinned = [{u.digest for u in planned if u.digest in each.pinned} for each in chosen]
    for unit in planned:
        total = sum(unit.wanted.values()) + unit.spread
        for number, name in enumerate(names):
            uses = unit.wanted.get(name, 0.0) + unit.spread / len(names)
            if unit.digest in held[number]:
                uses += STAY * total
            if uses > 0:
                fleet.expect(number, unit.digest, uses, now)
    # what is referenced is not of the room, which `place` takes it from
    budgets = [each.room + sum(sizes[key] for key in mine) for each, mine in zip(chosen, pinned, strict=True)]
    kept = coordinated.place(fleet, sizes, budgets, dict(enumerate(pinned)))
    before, after = (fleet.seconds(sizes, each) for each in (held, kept))
    rows, keep, over = [], {}, {}
    for number, place in enumerate(chosen):
        # copies that stay: two sites must not both rely on the other's
        elsewhere = {key for other, each in enumerate(held) if other != number for key in each if key in kept[other]}
        row = _row(place, planned, kept[number], pinned[number], elsewhere)
        keep[place.site] = bitmaps.union([u.bits for u in planned if u.digest in kept[number]])
        spare = [u.bits for u in planned if u.digest not in kept[number] and u.digest in elsewhere]
        over[place.site] = bitmaps.union(spare) & place.held
        rows.append(row)
    facts = {
        "made": now,
        "layers": len(planned),
        "left_out": {"sites": len(places) - len(chosen), "layers": len(layers) - len(planned)},
        "fetch_s_now": before,
        "fetch_s_planned": after,
        "fetch_s_saved": before - after,
        "sites": rows,
    }
    return Plan(now, keep, over, facts)


def _cost(links: Mapping[str, Mapping[str, Link]], target: str, source: str) -> float:
    """Seconds a byte; the other direction stands for one that was not measured."""
    if target == source:
        return 0.0
    link = links.get(target, {}).get(source) or links.get(source, {}).get(target) or UNMEASURED
    return 8 / link.rate_bps


def _row(
    place: Place, layers: Sequence[Layer], kept: set[Any], pinned: set[bytes], elsewhere: set[bytes]
) -> dict[str, Any]:
    found: dict[str, Any] = {"site": place.site, "room": place.room, "keep": [], "missing": [], "over": []}
    for unit in layers:
        here = unit.bits.intersection_cardinality(place.held) * CHUNK
        fact = {
            "names": list(unit.names),
            "digest": unit.digest.hex(),
            "layer": unit.layer,
            "bytes": unit.size,
            "here": here,
            "pinned": unit.digest in pinned,
        }
        if unit.digest in kept:
            found["keep" if here == unit.size else "missing"].append(fact)
        elif here:
            found["over"].append(fact | {"elsewhere": unit.digest in elsewhere})
    return found
