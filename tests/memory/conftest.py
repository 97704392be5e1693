"""Fixtures of this folder."""

from __future__ import annotations

from tests.support.mirrors import mirrors_closed

__all__ = ["mirrors_closed"]
