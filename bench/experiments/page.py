"""The page of `bench/run seeds`: one file of HTML that needs nothing else. Pure: the JSON document in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from report import Target

from experiments import model, plots
from experiments.model import Check, Experiment, Kind, Row, from_dict

STYLE = """
body { font: 15px/1.45 "DejaVu Sans", Verdana, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
  color: #1d2530; background: #fff; }
h1 { font-size: 1.6em; } h2 { margin-top: 2.2em; border-bottom: 2px solid #2563a8; padding-bottom: .2em; }
table { border-collapse: collapse; margin: .8em 0; font-size: 12.5px; }
th, td { padding: 3px 8px; border-bottom: 1px solid #dde3ea; text-align: left; vertical-align: top; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.published { color: #666; background: #f4f4f4; font-style: italic; }
tr.extrapolated td.n { color: #2563a8; } tr.missing { color: #999; }
.kind { font-size: 11px; white-space: nowrap; }
.good { color: #1f7a45; font-weight: bold; } .bad { color: #b8433f; font-weight: bold; }
svg { display: block; margin: 1em 0; max-width: 100%; height: auto; }
svg text { font: 12px "DejaVu Sans", Verdana, sans-serif; fill: #1d2530; }
svg text.title { font-weight: bold; font-size: 13px; } svg text.tick { font-size: 10.5px; fill: #555; }
svg text.label, svg text.value { font-size: 11px; } svg text.inside { font-size: 10.5px; fill: #fff; }
svg .grid { stroke: #dde3ea; } svg .panel { fill: #fafbfc; stroke: #dde3ea; }
summary { cursor: pointer; color: #2563a8; } ul { padding-left: 1.2em; } code { background: #f1f3f5; padding: 0 3px; }
.legend span { display: inline-block; margin-right: 1.4em; } .legend i { display: inline-block; width: 12px;
  height: 12px; margin-right: 5px; vertical-align: -1px; }
"""
CHIP = {
    Kind.MEASURED: "background:#2563a8",
    Kind.EXTRAPOLATED: "background:repeating-linear-gradient(45deg,#2563a8 0 2px,#dbe7f3 2px 5px)",
    Kind.CALCULATED: "background:#2f8f5b",
    Kind.PUBLISHED: "background:#9a9a9a",
}
MEANING = {
    Kind.MEASURED: "measured here, in this run",
    Kind.EXTRAPOLATED: "given up; a lower bound from bytes left and measured rate",
    Kind.CALCULATED: "replayed or simulated here",
    Kind.PUBLISHED: "theirs: a paper's figure, on its authors' machines",
}
SHOWN = 40
"""Rows of a table that are not folded away."""
MISSING = (Kind.NOT_BUILT, Kind.NOT_RUN)


def page(document: Mapping[str, Any]) -> str:
    """All of it. `document`: what `bench/run seeds --json` writes."""
    experiments = [from_dict(each) for each in document["experiments"]]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>haulier beside the published experiments</title>',
        f"<style>{STYLE}</style></head><body>",
        "<h1>haulier beside the published experiments</h1>",
        "<p>The same guest, work and link for every alternative; what is not built or not run says so.</p>",
        _legend(),
        _contents(experiments),
        *(_experiment(each) for each in experiments),
        _machine(document),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _legend() -> str:
    spans = (
        f'<span><i style="{CHIP[kind]}"></i>{escape(kind.value)}: {escape(said)}</span>'
        for kind, said in MEANING.items()
    )
    return f'<p class="legend">{"<br>".join(spans)}</p>'


def _contents(experiments: Sequence[Experiment]) -> str:
    lines = []
    for each in experiments:
        missed = sum(1 for target in each.targets if not target.ok)
        wrong = sum(1 for check in each.checks if not check.ok)
        verdict = f"{len(each.targets) - missed} of {len(each.targets)} aims met" if each.targets else "no aims"
        consistent = f'<span class="bad">{wrong} inconsistent figures</span>' if wrong else "figures consistent"
        if not model.ours(each.rows) and not each.checks:
            lines.append(f'<li><a href="#{escape(each.name)}">{escape(each.title)}</a>: not run</li>')
            continue
        lines.append(
            f'<li><a href="#{escape(each.name)}">{escape(each.title)}</a>: {verdict}, {consistent}, '
            f"{plots.number(each.seconds)} s</li>"
        )
    return f"<ul>{''.join(lines)}</ul>"


def _experiment(one: Experiment) -> str:
    parts = [f'<h2 id="{escape(one.name)}">{escape(one.title)}</h2>', f"<p>{escape(one.question)}</p>"]
    parts += [_targets(one.targets)] if one.targets else []
    parts += [plots.bars(picture) for picture in one.bars]
    parts += [_folded(rows(one.rows), len(one.rows))] if one.rows else []
    if one.notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in one.notes)}</ul>")
    if one.handoffs:
        first, rest = plots.handoff(one.handoffs[0]), "".join(plots.handoff(each) for each in one.handoffs[1:])
        drawn = first + (
            f"<details><summary>{len(one.handoffs) - 1} more handoffs</summary>{rest}</details>" if rest else ""
        )
        parts.append(f"<h3>Handoffs over time</h3>{drawn}")
    parts += [_checks(one.checks)] if one.checks else []
    return "\n".join(parts)


def _targets(targets: Sequence[Target]) -> str:
    lines = []
    for target in targets:
        verdict = '<span class="good">met</span>' if target.ok else '<span class="bad">missed</span>'
        value, aim = plots.number(target.value), plots.number(target.target)
        cells = f'<td class="n">{value}</td><td class="n">{aim}</td>'
        lines.append(f"<tr><td>{verdict}</td><td>{escape(target.name)}</td>{cells}</tr>")
    return f"<table><tr><th></th><th>aim</th><th>found</th><th>wanted</th></tr>{''.join(lines)}</table>"


def rows(found: Sequence[Row]) -> str:
    """A table: one column for each figure that any row has."""
    names = list(dict.fromkeys(name for row in found for name, value in row.figures.items() if value is not None))
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [f"<tr><th>way</th><th>setting</th><th>kind</th><th>runs</th>{heads}<th></th></tr>"]
    for row in found:
        kind = "missing" if row.kind in MISSING else row.kind.value
        cells = "".join(f'<td class="n">{plots.number(row.get(name))}</td>' for name in names)
        runs = str(row.runs) if row.kind in (Kind.MEASURED, Kind.EXTRAPOLATED) else ""
        lines.append(
            f'<tr class="{kind}"><td>{escape(row.way)}</td><td>{escape(row.setting)}</td>'
            f'<td class="kind">{escape(row.kind.value)}</td><td class="n">{runs}</td>{cells}'
            f"<td>{escape(row.note)}</td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _folded(table: str, count: int) -> str:
    return table if count <= SHOWN else f"<details><summary>all {count} rows</summary>{table}</details>"


def _checks(checks: Sequence[Check]) -> str:
    wrong = [check for check in checks if not check.ok]
    lines = "".join(
        f'<tr><td class="{"good" if check.ok else "bad"}">{"agree" if check.ok else "DISAGREE"}</td>'
        f'<td>{escape(check.name)}</td><td class="n">{plots.number(check.value)}</td>'
        f'<td class="n">{plots.number(check.limit)}</td></tr>'
        for check in [*wrong, *(check for check in checks if check.ok)]
    )
    head = f"{len(checks)} checks of the figures against each other, {len(wrong)} failed"
    return f"<details{' open' if wrong else ''}><summary>{head}</summary><table>{lines}</table></details>"


def _machine(document: Mapping[str, Any]) -> str:
    told = {**document["machine"], **document["versions"], "command": document.get("command", "")}
    told["made"] = document.get("made", "")
    lines = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in told.items()
    )
    return f"<h2>Machine, versions, command</h2><table>{lines}</table>"
