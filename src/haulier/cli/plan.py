"""`haulier plan`: what a handoff would send and take."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from haulier.cli.common import GuestName, Json, Root, client, console, plain, print_json, print_table, size
from haulier.compress.xz import name_of
from haulier.errors import by_code


def plan(
    guest: GuestName,
    /,
    *,
    to: Annotated[str, Parameter(help="The site that the guest would go to.")],
    disk: Annotated[str, Parameter(help="full, or on-demand: data at rest would stay here.")] = "full",
    root: Root = None,
    json: Json = False,
) -> int:
    """Say what a handoff would send and how long it would take. Nothing moves.

    The exit code is 0 if the handoff could begin, else that of what stands against it."""
    found = client(root).post("/v1/plan", {"guest": guest, "to": to, "options": {"disk": disk}}, timeout=180)
    reasons: list[Any] = list(found.get("reasons", []))
    if json:
        print_json(found)
    else:
        _show(found)
    if not reasons:
        return 0
    code = int(reasons[0][0])
    if json:
        return code
    raise by_code(code)(f"site {to!r} cannot take guest {guest!r}: {'; '.join(str(text) for _, text in reasons)}")


def _show(found: dict[str, Any]) -> None:
    amount = found["bytes"]
    seconds, downtime = found["seconds"], found["downtime_ms"]
    console.print(
        plain(
            f"{found['guest']} from {found['source']} to {found['target']}: about {size(amount['total'])} in "
            f"{seconds['likely']:.0f} s ({seconds['low']:.0f} to {seconds['high']:.0f}), downtime "
            f"{downtime['likely']:.0f} ms ({downtime['low']:.0f} to {downtime['high']:.0f})"
        ),
        highlight=False,
    )
    rows: list[tuple[str, object]] = [
        ("disk", size(amount["disk"])),
        ("  changed chunks", amount["disk_chunks"]),
    ]
    if amount.get("left_behind"):
        rows.append(("  left behind for now", size(amount["left_behind"])))
    for name, layer in found.get("layers", {}).items():
        text = f"{size(layer['bytes'])}, {size(layer['missing'])} missing there, about {size(layer['wire'])} to send"
        rows.append((f"  layer {name}", text))
    rows.append(("memory", size(amount["memory"])))
    rows += [(f"  pages {kind}", count) for kind, count in amount["memory_pages"].items()]
    if "converges" in found:
        rows.append(("  dirtied meanwhile", size(amount["again"])))
        rows.append(("mode", f"{name_of(found['mode']['level'])}; the {found['limit']} is the limit"))
        if not found["converges"]:
            rows.append(("converges", "no: the guest dirties memory faster than the link carries it"))
            rows.append(("", "what could be allowed: --allow auto-converge slows it, --allow post-copy sends it first"))
    rows += [
        ("link", f"{found['rate_bps'] / 1e6:.1f} Mbit/s, round trip {found['rtt_s'] * 1000:.0f} ms"),
        ("memory there to start from", found["memory_base"] or "none"),
        *(("clients", text) for text in found.get("clients", ())),
    ]
    print_table(("", ""), rows)
