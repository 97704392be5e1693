"""The commands of the documents, and what they show as output. Pure.

How the documents show commands:

- a fence ``console`` holds a session: ``oslo# COMMAND`` is run at site oslo as root, lines below are what it prints;
- a fence ``sh`` holds commands that are run on one's own machine, in a clone of the repository;
- a line that ends in a backslash goes on in the next; `` # ...`` at the end of a line is a remark.

In the output that is shown, numbers stand for any numbers, a word that ends in ``…`` for any word that begins so, and
``...`` alone for any lines. A word with ``…`` in a later command means what was printed in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
COMMAND_FENCES: Final = frozenset({"console", "sh"})
PROMPT: Final = re.compile(r"([a-z][a-z0-9-]*)# (.*)")
FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})\s*([A-Za-z0-9_+-]*)\s*$")
PROGRAMS: Final = re.compile(
    r"(?:sudo )?(?:haulier |scripts/|bench/|systemctl |ip (?:link|addr|route) |apt-get |python3? -m |\.ci/)"
)
"""How a line begins that is a command, wherever it stands."""


@dataclass(frozen=True)
class Block:
    """A fence (with its language, which may be "") or an indented block (language "indented")."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One command. `site` is "" on one's own machine; `shown` is the output that the document shows."""

    page: str
    line: int
    site: str
    command: str
    shown: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: str, text: str) -> list[Block]:
    """All code blocks of a page, in order. ValueError for a fence that is not closed."""
    found: list[Block] = []
    lines = text.splitlines()
    at = 0
    after_blank = True
    while at < len(lines):
        opened = FENCE.match(lines[at])
        begin = at
        if opened:
            mark = opened[1]
            at += 1
            while at < len(lines) and lines[at].strip() != mark:
                at += 1
            if at == len(lines):
                raise ValueError(f"{page}:{begin + 1}: a fence that is not closed")
            found.append(Block(page, begin + 2, opened[2], tuple(lines[begin + 1 : at])))
            at += 1
        elif after_blank and lines[at].startswith("    "):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            body = tuple(line[4:] for line in lines[begin:at])
            found.append(Block(page, begin + 1, "indented", body))
            after_blank = True
            continue
        else:
            at += 1
        after_blank = at > 0 and not lines[at - 1].strip()
    return found


def steps(block: Block) -> Iterator[Step]:
    """The commands of a block. ValueError for a session that begins with output."""
    if block.language not in COMMAND_FENCES:
        return
    now: Step | None = None
    shown: list[str] = []
    number = 0
    while number < len(block.lines):
        text, line = block.lines[number], block.line + number
        number += 1
        prompt = PROMPT.fullmatch(text) if block.language == "console" else None
        if block.language == "console" and prompt is None:
            if now is None and text.strip():
                raise ValueError(f"{block.page}:{line}: a session begins with a prompt such as 'oslo# '")
            shown.append(text)
            continue
        command = prompt[2] if prompt else text.strip()
        while command.endswith("\\") and number < len(block.lines):
            command = command[:-1].rstrip() + " " + block.lines[number].strip()
            number += 1
        command = re.sub(r"\s+#\s.*$", "", command)
        if not command or command.startswith("#"):
            continue
        if now is not None:
            yield _with(now, shown)
        now, shown = Step(block.page, line, prompt[1] if prompt else "", command), []
    if now is not None:
        yield _with(now, shown)


def _with(step: Step, shown: list[str]) -> Step:
    while shown and not shown[-1].strip():
        shown.pop()
    return Step(step.page, step.line, step.site, step.command, tuple(shown))


def all_blocks() -> list[Block]:
    return [block for path in pages() for block in blocks(name_of(path), path.read_text())]


def all_steps() -> list[Step]:
    return [step for block in all_blocks() for step in steps(block)]


def strays(block: Block) -> list[str]:
    """Lines of a block of another language that are commands all the same."""
    if block.language in COMMAND_FENCES:
        return []
    return [
        f"{block.page}:{block.line + number}: {line.strip()}"
        for number, line in enumerate(block.lines)
        if PROGRAMS.match(line.strip()) or PROMPT.fullmatch(line.strip())
    ]


def fill_in(command: str, known: Mapping[str, str]) -> str:
    """`command` with the words that end in … as they were really printed. ValueError for one that never was shown."""
    for word in re.findall(r"\S+…", command):
        if word not in known:
            raise ValueError(f"{word} was not printed by a command before: {command}")
        command = command.replace(word, known[word])
    return command


def missing_lines(shown: tuple[str, ...], printed: str, known: dict[str, str]) -> list[str]:
    """Lines that the document shows and the command did not print, in order; learns the words with … into `known`."""
    rest = printed.splitlines()
    lost = []
    for line in shown:
        if not line.strip() or line.strip() == "...":
            continue
        pattern, names = _pattern(line)
        for at, real in enumerate(rest):
            match = pattern.search(real)
            if match:
                known.update(zip(names, match.groups(), strict=True))
                rest = rest[at + 1 :]
                break
        else:
            lost.append(line)
    return lost


def _pattern(line: str) -> tuple[re.Pattern[str], list[str]]:
    """What a shown line matches, and the words with … in it, in the order of the pattern's groups."""
    words, names = [], []
    for word in line.split():
        if word == "…":
            words.append(r".*")
        elif word.endswith("…"):
            names.append(word)
            words.append(f"({re.escape(_fixed(word))}\\S*)")
        else:
            parts = re.split(r"(?<![A-Za-z\d.])(\d[\d.,:-]*\d|\d)", word)
            words.append("".join(_number(part) if number % 2 else re.escape(part) for number, part in enumerate(parts)))
    return re.compile(r"\s+".join(words)), names


def _fixed(word: str) -> str:
    """What is the same each time of a word with …: `haulier-join-` of `haulier-join-k6R…`, `h` of `h2b7…`."""
    head, dash, _ = word.rpartition("-")
    return head + dash or word[0]


def _number(text: str) -> str:
    # An address or a port is told as it is; amounts, times and dates are not.
    if re.fullmatch(r"\d+\.\d+\.\d+\.\d+(?::\d+)?", text):
        return re.escape(text)
    return r"[\d.,:-]+"
