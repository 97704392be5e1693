"""Amounts of memory, sizes, tables."""

from __future__ import annotations

import pytest

from haulier.cli.common import parse_memory, parse_seconds, plain, print_table, size, words_of
from haulier.errors import UsageError


@pytest.mark.parametrize(
    ("text", "mib"), [("512M", 512), ("2G", 2048), ("512", 512), ("512MiB", 512), (" 1g ", 1024), ("256mb", 256)]
)
def test_memory(text: str, mib: int) -> None:
    assert parse_memory(text) == mib


@pytest.mark.parametrize("text", ["", "M", "0", "-1G", "1.5G", "lots", "1T", "٣M", "9" * 30])
def test_bad_memory(text: str) -> None:
    with pytest.raises(UsageError, match="bad amount of memory"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("2m", 120), ("1.5h", 5400), ("300ms", 0.3), ("30", 30), (" 1S ", 1), ("0", 0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "soon", "1.2.3s", "٣s", "1e9s"])
def test_bad_times(text: str) -> None:
    with pytest.raises(UsageError, match="bad time"):
        parse_seconds(text)


def test_the_words_of_a_command() -> None:
    assert words_of("sh -c 'echo hi'") == ["sh", "-c", "echo hi"]
    with pytest.raises(UsageError, match="quote it"):
        words_of("sh -c 'echo hi")


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_500_000, 2.5e9, 7e12)] == [
        "0 B", "999 B", "1.0 kB", "1.5 MB", "2.5 GB", "7.0 TB",
    ]  # fmt: skip


def test_control_characters_are_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain("a\x1b[2Jb\nc") == "a?[2Jb?c"
    print_table(("A", "B"), [("[bold]x[/]", "y" * 300)])
    out = capsys.readouterr().out
    assert "[bold]x[/]" in out and "y" * 300 in out
