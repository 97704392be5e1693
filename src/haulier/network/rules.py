"""What an operator says of a site's uplinks: caps and costs. Pure; site.toml is read with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from haulier.errors import UsageError
from haulier.network.addresses import Uplink

AUTO: Final = "auto"
"""Instead of bulk addresses: whatever uplinks the host has."""
MAX_RULES: Final = 16
MAX_COST: Final = 1000
_KEYS: Final = frozenset({"uplink", "cap_mbps", "cost"})


@dataclass(frozen=True)
class Rule:
    """What the operator says of an uplink (an interface or an address here): bits per second at most, and its cost."""

    uplink: str
    cap_bps: float = 0.0
    cost: int = 0


def read_rules(tables: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The ``[[path]]`` tables of site.toml. UsageError for one that makes no sense. Pure."""
    if len(tables) > MAX_RULES:
        raise UsageError(f"{len(tables)} tables [[path]]: at most {MAX_RULES} are allowed")
    rules = []
    for table in tables:
        if not isinstance(table, Mapping) or not set(table) <= _KEYS:
            raise UsageError(f"a table [[path]] has the keys {', '.join(sorted(_KEYS))}, not {str(table)[:80]}")
        uplink, cap, cost = table.get("uplink"), table.get("cap_mbps", 0), table.get("cost", 0)
        if not isinstance(uplink, str) or not 0 < len(uplink) < 64:
            raise UsageError('a table [[path]] names its uplink, an interface or an address here: uplink = "wwan0"')
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 <= cap < 1e6 or math.isnan(cap):
            raise UsageError(f"[[path]] {uplink}: cap_mbps = {str(cap)[:40]}: give Mbit/s, 0 for no limit")
        if isinstance(cost, bool) or not isinstance(cost, int) or not 0 <= cost <= MAX_COST:
            raise UsageError(f"[[path]] {uplink}: cost = {str(cost)[:40]}: give 0 (always used) to {MAX_COST}")
        rules.append(Rule(uplink, cap * 1e6, cost))
    return tuple(rules)


def rule_for(uplink: Uplink | None, rules: Sequence[Rule]) -> Rule:
    """The rule that names the uplink's address, else its interface, else one without cap and cost. Pure."""
    if uplink is not None:
        for word in (uplink.address, uplink.interface):
            for rule in rules:
                if rule.uplink == word:
                    return rule
    return Rule("")
