"""`haulier status`: handoffs, running and past."""

from __future__ import annotations

import time
from typing import Annotated, Any

from cyclopts import Parameter

from haulier.cli.common import Json, Root, client, print_json, print_table, size
from haulier.cli.handoff import prefetched, summary
from haulier.compress.xz import name_of


def status(
    which: str = "",
    /,
    *,
    explain: Annotated[bool, Parameter(negative="", help="Of one handoff: how it chose its compression.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Show handoffs of this site: all, or one with its report.

    Parameters
    ----------
    which
        Id of a handoff, or name of a guest (its newest handoff).
    """
    agent = client(root)
    if which:
        facts = agent.handoff(which)
        if json:
            print_json(facts)
        else:
            _one(facts, explain)
        return
    handoffs = agent.handoffs()
    residuals = agent.get("/v1/residuals")
    kept = agent.get("/v1/kept")
    if json:
        print_json({"handoffs": handoffs, "residuals": residuals, **kept})
        return
    print_table(
        ("HANDOFF", "GUEST", "FROM", "TO", "BEGUN", "STATE", "PROGRESS", "ETA"),
        [
            (
                h["id"],
                h["guest"],
                h["source"],
                h["target"],
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(h["created"])),
                ("prefetch " if h["kind"] == "prefetch" else "")
                + (h["outcome"] or h["status"].get("phase", "starting")),
                "" if h["outcome"] else f"{100 * float(h['status'].get('progress', 0)):.0f} %",
                "" if h["outcome"] or float(h["status"].get("eta_s", -1)) < 0 else f"{h['status']['eta_s']:.0f} s",
            )
            for h in handoffs
        ],
    )
    _residuals(residuals)
    _kept(kept)


def _kept(found: dict[str, Any]) -> None:
    """What makes the next handoff of a guest short: left by one that was cut, by a prefetch, or by the last stay."""
    if found["kept"]:
        print()
        rows = [
            (one["guest"], one["kind"], one["peer"], size(one["bytes"]), f"{one['age_s'] / 60:.0f} min")
            for one in found["kept"]
        ]
        print_table(("GUEST", "KEPT FOR", "SITE", "SIZE", "AGE"), rows)


def _residuals(residuals: dict[str, Any]) -> None:
    """Data left behind: what guests here still lack, and what is kept here for guests that went away."""
    rows: list[tuple[object, ...]] = []
    for one in residuals["here"]:
        fill = one.get("fill") or {}
        rate = f"{float(fill['rate']) * 8 / 1e6:.1f} Mbit/s" if fill.get("rate") and one["left_bytes"] else ""
        rows.append((one["guest"], f"from {one['source']}", size(one["left_bytes"]), fill.get("mode", ""), rate))
    for one in residuals["left"]:
        told = "not told yet" if one["left_bytes"] is None else size(one["left_bytes"])
        rows.append((one["guest"], f"kept here for {one['target']}", told, "", ""))
    if rows:
        print()
        print_table(("GUEST", "DATA LEFT BEHIND", "MISSING THERE", "FILL", "RATE"), rows)


def _one(facts: dict[str, object], explain: bool = False) -> None:
    if facts["outcome"] == "done" and facts.get("report") and facts["role"] == "source":
        print(prefetched(facts) if facts["kind"] == "prefetch" else summary(facts))
    rows: list[tuple[str, object]] = [
        (key, facts[key]) for key in ("id", "kind", "guest", "source", "target", "role", "state", "outcome", "epoch")
    ]
    if facts.get("error"):
        rows.append(("error", facts["error"]))
    state = facts.get("status")
    if facts["state"] != "ended" and isinstance(state, dict):
        rows += [(key, state[key]) for key in ("phase", "message", "progress", "eta_s", "wire_bytes") if key in state]
    report = facts.get("report")
    rows += path_rows(report, state)
    if explain:
        rows += _explained(state if isinstance(state, dict) else {}, report if isinstance(report, dict) else {})
    layers = report.get("layers") if isinstance(report, dict) else None
    if not layers and isinstance(state, dict):
        layers = state.get("layers")
    rows += layer_rows(layers or {})
    if isinstance(report, dict) and report.get("post_copy"):
        rows += post_copy_rows(report["post_copy"])
    if isinstance(report, dict):
        made, came = report.get("forecast"), report.get("came_true")
        if made and came:
            seconds = made["seconds"]
            text = (
                f"{size(made['bytes']['total'])} in {seconds['likely']:.1f} s ({seconds['low']:.1f} to "
                f"{seconds['high']:.1f}), downtime {made['downtime_ms']['likely']:.0f} ms (by {made['made']})"
            )
            rows.append(("forecast", text))
            shares = [f"{came[key]:.2f} of the {key}" for key in ("bytes", "seconds", "downtime")]
            rows.append(("what came", ", ".join(shares)))
        for phase in report.get("phases", []):
            rows.append((f"phase {phase.get('name')}", f"{phase.get('seconds')} s, {phase.get('wire_bytes')} bytes"))
    print_table(("", ""), rows)


def post_copy_rows(told: dict[str, Any]) -> list[tuple[str, object]]:
    """What a guest that ran before its memory was whole asked for, and how long it waited."""
    text = f"the guest asked for {told['requested_pages']} pages, {told['pushed_pages']} went before the others"
    if told.get("worst_wait_ms") is not None:
        text += f", a page took {told['mean_wait_ms']:.0f} ms, the slowest {told['worst_wait_ms']:.0f} ms"
    if told.get("seconds") is not None:
        text += f"; whole {told['seconds']:.1f} s after it ran there"
    return [("post-copy", text + ("; new workers went on with it" if told.get("resumed") else ""))]


def path_rows(report: object, state: object) -> list[tuple[str, object]]:
    """How the bytes travelled, and what each path carried, at which rate and round trip, losing how much."""
    wire = report.get("wire") if isinstance(report, dict) else None
    found = wire if isinstance(wire, dict) else state if isinstance(state, dict) else {}
    rows: list[tuple[str, object]] = [("transport", found["transport"])] if found.get("transport") else []
    for each in found.get("paths", []):
        text = f"{size(each['acked'])}, {each['rate_bps'] / 1e6:.1f} Mbit/s, {each['rtt_s'] * 1000:.0f} ms"
        text += f", {100 * each.get('loss', 0):.1f} % sent again"
        if each.get("cap_bps"):
            text += f", at most {each['cap_bps'] / 1e6:g} Mbit/s"
        if each.get("cost"):
            text += f", cost {each['cost']}" + (", in reserve" if each.get("held") else "")
        rows.append((f"path {each['name']}", text if each["up"] else f"{text}, down"))
    if isinstance(report, dict):
        missing = {name: why for name, why in report.get("waypoints", {}).items() if why}
        rows += [(f"nothing went through {name}", why) for name, why in missing.items()]
    return rows


def _explained(state: dict[str, Any], report: dict[str, Any]) -> list[tuple[str, object]]:
    """What the controller decided, and why."""
    told = report.get("adapting") or {}
    rows: list[tuple[str, object]] = []
    if not told and state.get("why"):
        rows.append(("now", state["why"]))
    for change in told.get("changes", []):
        rows.append((f"after {change['at']:.1f} s", change["why"]))
    if content := told.get("content"):
        text = f"{content['speed']:.2f} of the profile's speed, {content['ratio']:.2f} of its bytes"
        rows.append(("what was sent", text))
    for level, fix in told.get("learnt", {}).items():
        text = f"{fix['speed']:.2f} of the profile's speed, {fix['ratio']:.2f} of its bytes"
        rows.append((f"{name_of(int(level))} of this guest", text))
    if told:
        rows.append(("codec's share of its core", f"{100 * told['cpu_share']:.0f} %"))
        rows.append(("profile", "measured here" if told["calibrated"] else "not measured here: 'haulier calibrate'"))
    return rows or [("mode", "nothing was chosen (yet): the level was given, or no memory was sent")]


def layer_rows(layers: dict[str, dict[str, int]]) -> list[tuple[str, object]]:
    """What was sent of each layer of the disk."""
    rows: list[tuple[str, object]] = []
    for name, each in layers.items():
        text = f"{size(each['wire_bytes'])} for {each['chunks']} chunks, {each['at_target']} were there"
        for key, words in (("elsewhere", "came from other sites"), ("left", "left behind")):
            if each.get(key):
                text += f", {each[key]} {words}"
        if each.get("memory_wire_bytes"):
            text += f"; {size(each['memory_wire_bytes'])} of memory"
        rows.append((f"layer {name}", text))
    return rows
