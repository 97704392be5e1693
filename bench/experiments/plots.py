"""Pictures of the page: SVG as text, with no font, script or picture from anywhere else. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from experiments.model import Bars, Handoff, Kind

WIDTH = 960
LABELS = 330
ROW = 24
COLOURS = {
    Kind.MEASURED: "#2563a8",
    Kind.EXTRAPOLATED: "url(#hatched)",
    Kind.CALCULATED: "#2f8f5b",
    Kind.PUBLISHED: "#9a9a9a",
    Kind.NOT_BUILT: "none",
    Kind.NOT_RUN: "none",
}
PALETTE = ("#2563a8", "#d9822b", "#2f8f5b", "#b8433f", "#7a5ca8", "#8a6d52", "#c667a0", "#6f7780", "#a8a32b", "#2ba3a8")
HATCH = (
    '<defs><pattern id="hatched" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="6" height="6" fill="#dbe7f3"/><rect width="2.4" height="6" fill="#2563a8"/></pattern></defs>'
)


def number(value: float | None) -> str:
    """Three significant digits; thousands apart."""
    if value is None:
        return ""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}".replace(",", " ")
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or not size else f"{value:.2g}"


def text(x: float, y: float, what: str, *, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(what)}</text>'


def svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'
    )


def bars(picture: Bars) -> str:
    """Horizontal bars; on a logarithmic scale where the picture says so, with its lines at powers of ten."""
    known = [value for _, value, _ in picture.bars if value is not None and value > 0]
    top = max(known, default=1.0)
    low = 10 ** math.floor(math.log10(min(known, default=1.0))) if picture.log else 0.0
    if picture.log and low >= top:
        low = top / 10
    room = WIDTH - LABELS - 110

    def length(value: float) -> float:
        if picture.log:
            return room * max(0.0, math.log(max(value, low) / low) / math.log(top / low))
        return room * value / top

    height = 30 + ROW * len(picture.bars) + (18 if picture.log else 4)
    parts = [HATCH, text(0, 16, picture.title, more='class="title"')]
    if picture.log:
        tick = low
        while tick <= top * 1.0001:
            x = LABELS + length(tick)
            parts.append(f'<line x1="{x:.1f}" y1="26" x2="{x:.1f}" y2="{height - 16}" class="grid"/>')
            parts.append(text(x, height - 4, number(tick), anchor="middle", more='class="tick"'))
            tick *= 10
    for place, (label, value, kind) in enumerate(picture.bars):
        y = 28 + ROW * place
        parts.append(text(LABELS - 8, y + 15, label, anchor="end", more='class="label"'))
        if value is None:
            parts.append(text(LABELS, y + 15, kind.value, more='class="tick"'))
            continue
        wide = max(1.0, length(value))
        parts.append(f'<rect x="{LABELS}" y="{y + 3}" width="{wide:.1f}" height="{ROW - 7}" fill="{COLOURS[kind]}"/>')
        said = number(value) + {
            Kind.EXTRAPOLATED: " or more",
            Kind.PUBLISHED: " (theirs)",
            Kind.CALCULATED: " (calculated)",
        }.get(kind, "")
        parts.append(text(LABELS + wide + 6, y + 15, said, more='class="value"'))
    return svg(height, parts, picture.title)


Scale = Callable[[float], float]


def line(points: Sequence[tuple[float, float]], x: Scale, y: Scale, colour: str, *, dashed: bool = False) -> str:
    path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>'


def handoff(one: Handoff) -> str:
    """Phases above; bytes sent and rate; what is left to send; then bytes by origin, on the wire and of the guest."""
    left, right = 70.0, WIDTH - 70.0
    end = max([one.total_s, *(phase["at"] + phase["seconds"] for phase in one.phases)], default=1.0) or 1.0

    def x(at: float) -> float:
        return left + (right - left) * min(1.0, at / end)

    said = f"{one.title}: {number(one.total_s)} s, {number(one.downtime_ms)} ms of downtime"
    parts = [text(0, 14, said, more='class="title"')]
    parts += _phases(one, x)
    parts += _panel(one, x, 62, 100, "wire", "MB sent", PALETTE[0], 1e6, ("rate_bps", "Mbps", PALETTE[1], 1e6))
    parts += _panel(one, x, 186, 70, "left", "MB of memory left", PALETTE[3], 1e6, None)
    for second in range(6):
        at = end * second / 5
        parts.append(text(x(at), 272, f"{number(at)} s", anchor="middle", more='class="tick"'))
    parts += _stack(one.origins, 290, "on the wire, MB")
    parts += _stack(one.raw, 350, "of the guest, MB")
    return svg(412, parts, said)


def _phases(one: Handoff, x: Scale) -> list[str]:
    parts = []
    for place, phase in enumerate(one.phases):
        begin, width = x(phase["at"]), x(phase["at"] + phase["seconds"]) - x(phase["at"])
        said = f"{phase['name']}: {number(phase['seconds'])} s, {number(phase['wire_bytes'] / 1e6)} MB"
        parts.append(
            f'<rect x="{begin:.1f}" y="24" width="{max(1.0, width):.1f}" height="20" '
            f'fill="{PALETTE[place % len(PALETTE)]}" opacity="0.75"><title>{escape(said)}</title></rect>'
        )
        if width > 8 * len(phase["name"]):
            parts.append(text(begin + 4, 38, phase["name"], more='class="inside"'))
    return parts


def _panel(
    one: Handoff,
    x: Scale,
    top: float,
    height: float,
    name: str,
    unit: str,
    colour: str,
    scale: float,
    other: tuple[str, str, str, float] | None,
) -> list[str]:
    parts = [f'<rect x="70" y="{top}" width="{WIDTH - 140}" height="{height}" class="panel"/>']

    def curve(name: str, unit: str, colour: str, scale: float, right: bool) -> None:
        values = [(point["at"], point[name] / scale) for point in one.points if name in point]
        if not values:
            return
        most = max(value for _, value in values) or 1.0
        parts.append(line(values, x, lambda value: top + height - height * value / most, colour, dashed=right))
        at, anchor = (WIDTH - 64, "start") if right else (64, "end")
        more = f'class="tick" fill="{colour}"'
        parts.append(text(at, top + 9, number(most), anchor=anchor, more=more))
        parts.append(text(at, top + height, "0", anchor=anchor, more=more))
        # Outside of the curves' paths: under the panel's top edge, one at each side.
        parts.append(text(WIDTH - 76 if right else 76, top + 12, unit, anchor="end" if right else "start", more=more))

    curve(name, unit, colour, scale, False)
    if other is not None:
        curve(*other, True)
    return parts


def _stack(shares: Mapping[str, float], top: float, title: str) -> list[str]:
    """One bar of parts, the largest first, and their names below."""
    known = sorted(((value, name) for name, value in shares.items() if value > 0), reverse=True)
    total = sum(value for value, _ in known) or 1.0
    parts = [text(0, top + 12, f"{title}: {number(total / 1e6)}", more='class="label"')]
    x, said = 210.0, 210.0
    for place, (value, name) in enumerate(known):
        width = (WIDTH - 210) * value / total
        colour = PALETTE[place % len(PALETTE)]
        label = f"{name} {number(value / 1e6)}"
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{max(0.4, width):.1f}" height="16" fill="{colour}">'
            f"<title>{escape(label)}</title></rect>"
        )
        x += width
        if said + 7 * len(label) < WIDTH and place < 7:
            parts.append(f'<rect x="{said:.1f}" y="{top + 24}" width="9" height="9" fill="{colour}"/>')
            parts.append(text(said + 13, top + 32, label, more='class="tick"'))
            said += 25 + 6.2 * len(label)
    return parts
