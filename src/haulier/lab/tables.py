"""The demonstration's result as a person reads it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    ("stock_default", "stock QEMU\ndefault pre-copy"),
    ("stock_best", "stock QEMU\nmultifd + zstd"),
    ("haulier", "haulier"),
)


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the comparison, then where haulier's bytes came from and where its time went."""
    console.print()
    console.print(comparison(result))
    report = result["haulier"].get("report", {})
    if report:
        console.print(phases(report))
        console.print(origins(report))
    for line in verdict(result):
        console.print(line)


def comparison(result: dict[str, Any]) -> Table:
    link, guest = result["link"], result["guest"]
    table = Table(
        title=f"{guest['memory_mib']} MiB guest with {guest['working_set_mib']} MiB of live working set, "
        f"{link['rate_bps'] / 1e6:g} Mbps, {link['rtt_ms']:g} ms ({result['accelerator']}, link by {link['backend']})"
    )
    there = [(key, title) for key, title in COLUMNS if key in result]
    table.add_column("")
    for _, title in there:
        table.add_column(title, justify="right")
    for name, value in (
        ("total time", _total),
        ("downtime (STOP to RESUME)", lambda r: _ms(r.get("downtime_ms"))),
        ("first answer to a client", lambda r: _ms(r.get("first_answer_ms"))),
        ("bytes on the wire", lambda r: f"{r['wire_bytes'] / 1e6:.1f} MB"),
        ("guest's own check", lambda r: {True: "right", False: "WRONG", None: "-"}[r.get("alive")]),
    ):
        table.add_row(name, *(value(result[key]) for key, _ in there))
    if len(there) > 1:
        ours = result["haulier"]
        table.add_section()
        table.add_row("haulier is faster by", *(_ratio(result[k]["total_s"], ours["total_s"]) for k, _ in there))
        table.add_row("haulier sends less by", *(_ratio(result[k]["wire_bytes"], ours["wire_bytes"]) for k, _ in there))
    return table


def phases(report: dict[str, Any]) -> Table:
    """Where haulier's time went."""
    table = Table(title="haulier, by phase")
    for name in ("phase", "seconds", "on the wire"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for phase in report.get("phases", []):
        table.add_row(phase["name"], f"{phase['seconds']:.2f}", _bytes(phase["wire_bytes"]))
    table.add_section()
    for name, ms in report.get("switchover_ms", {}).items():
        table.add_row(f"  after the stop: {name}", f"{ms:.0f} ms", "")
    if report.get("check_ms"):
        table.add_row("  (the check of all memory, not counted)", f"{report['check_ms']:.0f} ms", "")
    return table


def origins(report: dict[str, Any]) -> Table:
    """Where the bytes at the target came from."""
    table = Table(title="what the target's bytes were made from")
    for name in ("origin", "count", "stands for", "on the wire"):
        table.add_column(name, justify="left" if name == "origin" else "right")
    kinds = report["memory"]["kinds"]
    words = {
        "zero": "zero pages",
        "same": "same as the mirror (golden snapshot, or sent before)",
        "block": "blocks of the disk that the target has (base)",
        "base": "pages of the golden snapshot elsewhere",
        "xor": "difference to the mirror (delta)",
        "series": "numbers that run on, as differences",
        "literal": "literal pages",
        "raw": "device state and headers",
        "meta": "addresses and kinds",
    }
    for kind, text in words.items():
        pages, raw, wire = (kinds[what].get(kind, 0) for what in ("pages", "raw", "wire"))
        if pages or raw or wire:
            table.add_row(f"memory: {text}", str(pages) if pages else "", _bytes(raw), _bytes(wire))
    disk = report["disk"]["origin"]
    table.add_section()
    for text, count, wire in (
        ("disk: chunks at the target", disk["chunks_at_target"], 0),
        ("disk: zero chunks", disk["chunks_zero"], 0),
        ("disk: recipes of 4 KiB blocks", disk["chunks_recipe"], disk["recipe_bytes"]),
        ("disk: patches of earlier chunks", disk.get("chunks_patch", 0), disk.get("patch_bytes", 0)),
        ("disk: chunks sent whole", disk["chunks_sent"], disk["sent_bytes"]),
    ):
        if count:
            table.add_row(text, str(round(count)), _bytes(count * 65536), _bytes(wire) if wire else "0")
    return table


def verdict(result: dict[str, Any]) -> list[str]:
    """The result in sentences."""
    ours = result["haulier"]
    lines = [
        f"memory equal: {_yes(ours['memory_equal'])}; disk equal: {_yes(ours['disk_equal'])}; "
        f"guest alive and right: {_yes(ours['alive'])}; wrong answers to the client: {ours.get('wrong_answers', '?')} "
        f"of {ours.get('answers', '?')}"
    ]
    for key, title in COLUMNS[:2]:
        if key in result and not result[key]["converged"]:
            name = title.replace("\n", ", ")
            lines.append(f"{name} was given up after {result[key]['total_s']:.0f} s: it did not converge")
    return lines


def _total(row: dict[str, Any]) -> str:
    text = f"{row['total_s']:.1f} s"
    return text if row.get("converged", True) else f"> {text} (given up)"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.1f}x" if ours else "-"


def _bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _yes(value: object) -> str:
    return "yes" if value else "NO"
