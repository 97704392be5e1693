"""The machine's own package sources, read from its apt configuration.

haulier names no mirror: what it builds from packages comes from where this machine gets its own.
`parse_*` are pure; `machine_sources` reads /etc/apt.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from haulier.errors import UnknownThing

_ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<rest>\S.*)$")


@dataclass(frozen=True)
class Source:
    """One stanza: binary packages of `suites` x `components` at `uris`; `options` are the further deb822 fields."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)

    def deb822(self) -> str:
        """The stanza as text, as apt reads it from a `.sources` file."""
        lines = ["Types: deb", f"URIs: {' '.join(self.uris)}", f"Suites: {' '.join(self.suites)}"]
        if self.components:
            lines.append(f"Components: {' '.join(self.components)}")
        lines += [f"{name}: {value}" for name, value in self.options.items()]
        return "\n".join(lines) + "\n"


def parse_deb822(text: str) -> list[Source]:
    """The enabled binary sources of a `.sources` file. Nonsense is skipped as apt would complain about it anyway."""
    found = []
    for stanza in _stanzas(text):
        if "deb" not in stanza.get("types", "").split() or stanza.get("enabled", "yes").lower() in {"no", "false", "0"}:
            continue
        uris, suites = stanza.get("uris", "").split(), stanza.get("suites", "").split()
        if uris and suites:
            kept = {n: stanza[k] for k, n in (("signed-by", "Signed-By"), ("trusted", "Trusted")) if k in stanza}
            found.append(Source(tuple(uris), tuple(suites), tuple(stanza.get("components", "").split()), kept))
    return found


def parse_one_line(text: str) -> list[Source]:
    """The binary sources of a `.list` file (`deb [options] uri suite components...`)."""
    found = []
    for line in text.splitlines():
        match = _ONE_LINE.match(line.split("#", 1)[0].strip())
        words = match["rest"].split() if match else []
        if match is None or len(words) < 2:
            continue
        given = dict(word.split("=", 1) for word in (match["options"] or "").split() if "=" in word)
        kept = {
            n: given[k].replace(",", " ") for k, n in (("signed-by", "Signed-By"), ("trusted", "Trusted")) if k in given
        }
        found.append(Source((words[0],), (words[1],), tuple(words[2:]), kept))
    return found


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Every enabled binary source of this machine, in apt's order."""
    found: list[Source] = []
    parts = sorted((etc / "sources.list.d").glob("*")) if (etc / "sources.list.d").is_dir() else []
    for file in [etc / "sources.list", *parts]:
        if file.suffix not in {".list", ".sources"} or not file.is_file():
            continue
        text = file.read_text(errors="replace")
        found += parse_deb822(text) if file.suffix == ".sources" else parse_one_line(text)
    return found


def sources_for(suite: str, host_suite: str, sources: Iterable[Source]) -> list[Source]:
    """Sources of `suite` alone, from wherever `sources` have it, else from where they have `host_suite`.

    Raises UnknownThing when neither is among them.
    """
    known = list(sources)
    for wanted in (suite, host_suite):
        found = [replace(source, suites=(suite,)) for source in known if wanted in source.suites]
        if found:
            return found
    raise UnknownThing(
        f"no source of {suite} or {host_suite} among this machine's apt sources; add one under /etc/apt/sources.list.d"
    )


def host_release(file: Path = Path("/etc/os-release")) -> tuple[str, str]:
    """(distribution id, code name) of this machine, such as ("debian", "trixie")."""
    known = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', file.read_text(), re.MULTILINE))
    suite = known.get("VERSION_CODENAME", "")
    if not suite:
        raise UnknownThing(f"{file} names no VERSION_CODENAME; say which suite to build")
    return known.get("ID", "debian"), suite


def acquire_options() -> list[str]:
    """How this machine's apt fetches (proxies, certificates, time-outs), as `Name "value";` lines for another apt."""
    dump = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    kept = re.compile(
        r'^Acquire::(?!IndexTargets|cdrom|Languages|CompressionTypes|GzipIndexes)\S+ "[^"]+";$', re.IGNORECASE
    )
    return [line for line in dump.splitlines() if kept.match(line)]


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    stanza: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if stanza:
                yield stanza
            stanza, name = {}, ""
        elif line[0] in " \t" and name:
            stanza[name] += "\n" + line
        elif ":" in line:
            head, value = line.split(":", 1)
            name = head.strip().lower()
            stanza[name] = value.strip()
