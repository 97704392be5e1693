"""What the papers say of themselves, to stand beside our figures; never mixed with them. Pure.

Only figures that were read in the papers' own text, slides or data are here. Machines, guests and years differ:
they ran KVM on hardware, we run emulated guests on two cores; so ratios are to be compared, and these with care.
"""

from __future__ import annotations

from experiments.model import Kind, Row

ADAPTIVE = "adaptive VM handoff (slides)"
SETTING = "10 Mbps, 8 GB disk, 1 GB memory, KVM, OBJECT"
MAR = "10 Mbps, 8 GB disk, 1 GB memory, KVM, MAR (Windows)"


def row(way: str, setting: str, note: str = "", **figures: float) -> Row:
    named = {name.replace("_", " "): value for name, value in figures.items()}
    return Row(f"paper: {way}", setting, Kind.PUBLISHED, named, note=note)


LIVE_MIGRATION = [
    row("VM handoff", SETTING, ADAPTIVE, total_s=60.0, downtime_ms=5500.0),
    row("KVM (no-share)", SETTING, ADAPTIVE, total_s=127 * 60.0, downtime_ms=1450.0),
    row("KVM (incremental)", SETTING, ADAPTIVE, total_s=12 * 60.0, downtime_ms=1540.0),
    row("VM handoff", MAR, ADAPTIVE, total_s=4.2 * 60, downtime_ms=12600.0),
    row("KVM (no-share)", MAR, ADAPTIVE, total_s=159 * 60.0, downtime_ms=7440.0),
    row("KVM (incremental)", MAR, ADAPTIVE, total_s=52 * 60.0, downtime_ms=7630.0),
]

_PROFILE = "computed from the profiles that they publish with their code: one pass, nothing dirtied meanwhile"
STATIC_MODES = [
    row(f"{app}, best mode of 4 cores", f"{mbps} Mbps", _PROFILE, total_s=seconds)
    for app, times in {"FACE": (83, 42, 28, 21, 17), "OBJECT": (92, 46, 31, 23, 18)}.items()
    for mbps, seconds in zip((5, 10, 15, 20, 25), times, strict=True)
]
STATIC_MODES += [
    row(app, "mean over 5 to 100 Mbps, 1 to 4 cores", _PROFILE, regret=fixed)
    for app, fixed in (("FACE, one good fixed mode (gzip 5)", 1.20), ("OBJECT, one good fixed mode (gzip 6)", 1.25))
]
STATIC_MODES += [
    row(f"{app}, their default mode", "mean over 5 to 100 Mbps, 1 to 4 cores", _PROFILE, regret=fixed)
    for app, fixed in (("FACE", 3.1), ("OBJECT", 2.6))
]

PATHS = [
    row("MPTCP, two paths against one", "low bandwidth", "talk on migration in edge clouds: 'almost 2x'", one_two=2.0),
    row("MPTCP, client's throughput after the move", "as measured there", "the same talk", after_before=13.0),
]

_MA = "Ma et al. 2019, Docker; 'handoff' there leaves out a transfer of 115 MB before it (184 s at 5 Mbps)"
LAYERS = [
    row("OpenFace container", f"{mbps} Mbps, 50 ms", _MA, total_s=total, downtime_ms=down * 1000, MB=final)
    for mbps, total, down, final in (
        (5, 48.9, 48.1, 22.6),
        (10, 28.5, 27.9, 22.2),
        (20, 17.8, 17.3, 21.2),
        (100, 10.7, 10.1, 21.6),
    )
]
