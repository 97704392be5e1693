"""Which page's commands run where, and which commands are not run, for which reason."""

from __future__ import annotations

import re
from typing import Final

from tests.docs.pages import Step

README: Final = ("README.md",)
"""By itself, on two sites without haulier."""
FLEET: Final = (
    "docs/sites.md",
    "docs/guests.md",
    "docs/images.md",
    "docs/handoff.md",
    "docs/caches.md",
    "docs/on-demand.md",
    "docs/network.md",
    "docs/coordinator.md",
)
"""One after the other on the same two sites, which have no haulier before the first page."""
LAB: Final = ("docs/lab.md",)
"""On one's own machine. Its TOML is demo.toml; its Python is run, too."""
BENCH: Final = re.compile(r"bench/run ([a-z-]+)(?: --.*)?")
"""Run with --quick by the tests marked `full`."""
EXEMPT: Final = (
    (re.compile(r"haulier relay "), "tests/network/test_relay.py runs it, where HAProxy is installed"),
    (re.compile(r"haulier handoff .* --through "), "tests/system/test_data_left_behind.py runs it, with a third site"),
    (re.compile(r"scripts/test( |$)"), "runs this very test"),
    (re.compile(r"scripts/setup( |$)"), "scripts/test and .ci/run begin with it"),
    (
        re.compile(r"scripts/demo( |$)"),
        "ten minutes with stock QEMU's part; its options are checked here, and its"
        " machinery is that of the tests in tests/system",
    ),
)


def exemption(step: Step) -> str:
    """Why the command is not run; "" if it has to be."""
    return next((reason for pattern, reason in EXEMPT if pattern.match(step.command)), "")


def runs(step: Step) -> str:
    """What runs the command; "" if nothing does."""
    if step.page in README + FLEET and step.site:
        return "fleet"
    if step.page in LAB and not step.site:
        return "lab"
    return "bench" if BENCH.fullmatch(step.command) else ""
