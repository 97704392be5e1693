"""What the verbs share: options, the local agent's client, tables and JSON lines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from haulier.agent.client import Client
from haulier.agent.site import Site, default_root
from haulier.errors import UsageError

Root = Annotated[
    Path | None, Parameter(name="--root", help="Directory of the site [default: $HAULIER_ROOT or /var/lib/haulier].")
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print facts as JSON, one object a line.")]

GuestName = Annotated[str, Parameter(help="Name of the guest.")]
ImageName = Annotated[str, Parameter(help="Name of the image.")]
SiteName = Annotated[str, Parameter(help="Name of the site.")]

console = Console(soft_wrap=True)
bars = Console(stderr=True)
"""Progress goes to stderr: what is printed may be read by a program."""


def load_site(root: Path | None) -> Site:
    return Site.load(root or default_root())


def client(root: Path | None) -> Client:
    """The agent of the site at `root`."""
    return Client.local(load_site(root))


def words_of(command: str) -> list[str]:
    """A command line as words, as a shell would take it. UsageError if it is no such line."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UsageError(f"bad command {command[:80]!r} ({error}): quote it as for a shell") from None


def print_json(value: Any) -> None:
    """One object, one line."""
    print(json.dumps(value), flush=True)


def tell(result: Any, as_json: bool, text: str) -> None:
    """What a command did: all of it as one object, or the sentence."""
    if as_json:
        print_json(result)
    else:
        console.print(plain(text), highlight=False)


def plain(text: object) -> str:
    """`text` without control characters: names and messages of other sites must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as wide as it needs to be; lines are not cut when the output is a pipe."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ignore" if not console.is_terminal else "ellipsis")
    from rich.text import Text

    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    wide = console if console.is_terminal else Console(width=4000)
    wide.print(table)


def size(count: float) -> str:
    """Bytes for people: "3.2 MB" (powers of ten, as on links)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_memory(text: str) -> int:
    """ "512M", "2G" or "512" (MiB) as MiB; UsageError otherwise."""
    from haulier.errors import UsageError

    scale = {"m": 1, "g": 1024}
    body = text.strip().lower().removesuffix("ib").removesuffix("b")
    factor = scale.get(body[-1:])
    digits = body[:-1] if factor else body
    if not digits.isascii() or not digits.isdigit() or not 0 < int(digits) <= 1 << 24:
        raise UsageError(f"bad amount of memory {text!r}: write for example 512M or 2G")
    return int(digits) * (factor or 1)


def parse_seconds(text: str) -> float:
    """ "30s", "2m", "1h", "300ms" or "30" as seconds."""
    from haulier.errors import UsageError

    scale = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0}
    body = text.strip().lower()
    unit = body.lstrip("0123456789.")
    try:
        seconds = float(body.removesuffix(unit)) * scale[unit]
    except (ValueError, KeyError):
        raise UsageError(f"bad time {text!r}: write for example 30s, 2m or 300ms") from None
    return seconds


def parse_size(text: str) -> int:
    """ "40G", "500M", "0" as bytes (powers of ten, as `size` shows them; KiB, MiB, GiB are powers of two)."""
    from haulier.errors import UsageError

    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
    scale["ti"] = 1 << 40
    body = text.strip().lower().removesuffix("b")
    unit = body.lstrip("0123456789.")
    number = body.removesuffix(unit)
    try:
        amount = float(number) * scale[unit]
    except (ValueError, KeyError):
        raise UsageError(f"bad amount {text!r}: write for example 40G, 500M or 0") from None
    if amount > 1 << 60:
        raise UsageError(f"bad amount {text!r}: that is more than there is")
    return int(amount)
