"""Parts that an experiment can switch off."""

from __future__ import annotations

import pytest

from haulier.without import ORDER, PARTS, RECIPES, VARIABLE, without


def test_nothing_is_off_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not any(without(part) for part in PARTS)
    monkeypatch.setenv(VARIABLE, ",".join(PARTS))
    assert all(without(part) for part in PARTS)
    monkeypatch.setenv(VARIABLE, ORDER)
    assert without(ORDER) and not without(RECIPES)


def test_what_is_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match="gravity"):
        without("gravity")
