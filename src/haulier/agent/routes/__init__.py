"""The control API, one module a noun. Each has a `TABLE` of routes: method, path, who may call it, handler.

A handler is a plain blocking function ``handler(agent, call) -> dict``; it runs in a thread, off the event loop.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from haulier.errors import UNDECODABLE, UsageError

_T = TypeVar("_T")


class Access(enum.Enum):
    """Who may call a route."""

    ANYONE = "anyone"
    """Also without a certificate."""
    FLEET = "fleet"
    """The operator of this site, or a site of the fleet."""
    OPERATOR = "operator"
    """The operator of this site, through the unix socket."""
    SITE = "site"
    """Another site of the fleet."""


@dataclass(frozen=True)
class Call:
    """One request. `site` is the caller's, "" for this site's operator; `names` are the parts of the path."""

    site: str
    names: dict[str, str]
    body: bytes
    query: dict[str, str]

    def read(self, kind: type[_T]) -> _T:
        """The body as `kind`; UsageError if it is not one."""
        try:
            return msgspec.json.decode(self.body or b"{}", type=kind)
        except UNDECODABLE as error:
            raise UsageError(f"the request does not make sense ({error})") from None


Handler = Callable[[Any, Call], dict[str, Any]]
"""Its first argument is the daemon that serves the route."""


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    access: Access
    handler: Handler
    worker: Callable[[Any, Call], Path | None] | None = None
    """Where a worker waits for the connection over which the call came, once the handler has answered it."""
