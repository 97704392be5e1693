"""Every command of the documents is one that a test runs, and every verb and option that they name exists."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import subprocess
import sys

import pytest

from haulier.cli.main import app, main
from haulier.errors import HaulierError
from tests.docs.pages import (
    ROOT,
    Block,
    Step,
    all_blocks,
    all_steps,
    blocks,
    fill_in,
    missing_lines,
    name_of,
    pages,
    steps,
    strays,
)
from tests.docs.plan import BENCH, FLEET, LAB, README, exemption, runs

PAGE = """
Words `haulier x`.

```console
oslo# haulier a --b c   # a remark
lisbon# haulier site join x \\
    --token t…
made x

oslo# haulier z
```

    haulier indented

```sh
scripts/demo --x
# a remark
```
"""


def test_the_parser_finds_commands_and_output() -> None:
    found = [step for block in blocks("p.md", PAGE) for step in steps(block)]
    assert found == [
        Step("p.md", 5, "oslo", "haulier a --b c"),
        Step("p.md", 6, "lisbon", "haulier site join x --token t…", ("made x",)),
        Step("p.md", 10, "oslo", "haulier z"),
        Step("p.md", 16, "", "scripts/demo --x"),
    ]
    assert [stray for block in blocks("p.md", PAGE) for stray in strays(block)] == ["p.md:13: haulier indented"]


def test_the_parser_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="not closed"):
        blocks("p.md", "```console\noslo# true\n")
    with pytest.raises(ValueError, match="prompt"):
        list(steps(Block("p.md", 1, "console", ("haulier x",))))


def test_shown_output_is_compared() -> None:
    known: dict[str, str] = {}
    printed = "h11aa  web1  12.5 MB\nother\nguest web1 runs at 192.0.2.10:7447 (epoch 7)\n"
    assert missing_lines(("h2b…  web1  3.1 MB", "guest web1 runs at 192.0.2.10:7447 (epoch 2)"), printed, known) == []
    assert known == {"h2b…": "h11aa"}
    assert fill_in("haulier status h2b…", known) == "haulier status h11aa"
    for wrong in ("web2", "192.0.2.11:7447", "guest web1 runs elsewhere"):
        assert missing_lines((wrong,), printed, {}) == [wrong]
    assert missing_lines(("other", "h2b…  web1"), printed, {}) == ["h2b…  web1"], "lines are in order"
    with pytest.raises(ValueError, match="x…"):
        fill_in("haulier status x…", known)


def test_every_command_is_run_or_exempt_for_a_reason() -> None:
    nowhere = [
        f"{step.where}: {step.site or 'here'}# {step.command}"
        for step in all_steps()
        if not exemption(step) and not runs(step)
    ]
    assert not nowhere, "no test runs these: give each a site ('oslo# ') on a page that tests/docs/plan.py lists"


def test_commands_stand_where_they_are_found() -> None:
    found = [stray for block in all_blocks() for stray in strays(block)]
    assert not found, "commands stand in fences ```console (with prompts such as 'oslo# ') or ```sh"


def test_the_pages_that_are_run_exist_and_have_commands() -> None:
    with_steps = {step.page for step in all_steps()}
    assert set(README + FLEET + LAB) <= with_steps


def test_benchmarks_that_are_shown_exist() -> None:
    shown = {found[1] for step in all_steps() if (found := BENCH.fullmatch(step.command))}
    said = subprocess.run([sys.executable, "bench/run", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown and all(re.search(rf"\b{name}\b", said.stdout) for name in shown), said.stdout


def test_options_of_the_demonstration_that_are_shown_exist() -> None:
    words = {word for step in all_steps() if step.command.startswith("scripts/demo") for word in step.command.split()}
    said = subprocess.run(
        [sys.executable, "-m", "haulier.lab.demo", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(word in said.stdout for word in words if word.startswith("--"))


# -- words in the text ---------------------------------------------------------------------------------------------


@functools.cache
def help_of(*path: str) -> str | None:
    """What `haulier PATH --help` says; None if there is no such verb."""
    here = app
    for word in path:
        try:
            here = here[word]
        except KeyError:
            return None
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*path, "--help"])
    return said.getvalue()


def subcommands(*path: str) -> list[str]:
    here = app
    for word in path:
        here = here[word]
    return [name for name in here if not name.startswith("-")]


def named_in_text() -> list[tuple[str, list[str]]]:
    found = []
    for path in pages():
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for words in re.findall(r"`haulier ([^`]+)`", text):
            found.append((name_of(path), words.replace("\\|", "|").split()))
    return found


def verb_of(words: list[str]) -> tuple[str, ...] | None:
    if not words or not re.fullmatch(r"[a-z-]+", words[0]):
        return ()
    if help_of(words[0]) is None:
        return None
    below = subcommands(words[0])
    if not below or len(words) == 1 or not re.fullmatch(r"[a-z-]+", words[1]):
        return (words[0],)
    return (words[0], words[1]) if words[1] in below else None


def test_verbs_and_options_named_in_the_text_exist() -> None:
    wrong = []
    for page, words in named_in_text():
        verb = verb_of(words)
        if verb is None:
            wrong.append(f"{page}: haulier {' '.join(words)}: no such verb")
        elif verb:
            said = help_of(*verb) or ""
            options = re.findall(r"--[a-z][a-z-]*", " ".join(words))
            wrong += [f"{page}: haulier {' '.join(words)}: no {o}" for o in options if not re.search(rf"{o}\b", said)]
    assert not wrong


def test_the_command_lines_page_names_every_verb() -> None:
    named = {verb_of(words) for page, words in named_in_text() if page == "docs/cli.md"}
    there = {(verb, below) for verb in subcommands() for below in subcommands(verb) if verb != "lab"}
    there |= {(verb,) for verb in subcommands() if not subcommands(verb) or verb == "lab"}
    assert there <= named, there - named


def test_the_exit_codes_on_the_command_lines_page_are_those_of_the_errors() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)}
    kinds = [HaulierError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert told == {0, 130, *(kind.exit_code for kind in kinds)}
