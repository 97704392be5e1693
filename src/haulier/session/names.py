"""Where a host is, asked of the resolver on a thread of its own: one that does not answer takes 5 to 20 s to say so."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from haulier.errors import PeerError

_UNKNOWN: Final = (OSError, UnicodeError)
"""The second for what cannot even be a name."""


@dataclass(frozen=True)
class Where:
    """What `socket` and `connect` want."""

    family: int
    address: tuple[Any, ...]


class Lookup:
    """One host and port. `where` never waits; `answered` is called, on the resolver's thread, when it is worth asking
    again."""

    def __init__(self, host: str, port: int, answered: Callable[[], None]) -> None:
        self.host, self.port = host, port
        self._answered = answered
        self._last: Where | None = None
        self._answer: Where | Exception | None = None
        self._asking = False

    def where(self) -> Where | None:
        """Where it was when the resolver last said so, None before it ever has; has it asked anew in the meantime.

        Raises PeerError when it has said that there is no such name, and never anything else.
        """
        try:
            return _find(self.host, self.port, socket.AI_NUMERICHOST)
        except _UNKNOWN:
            pass  # a name
        answer, self._answer = self._answer, None
        if isinstance(answer, Where):
            self._last = answer
        elif answer is not None and self._last is None:
            raise PeerError(
                f"{self.host} is no address and no known name ({answer}): check `haulier site list`"
            ) from answer
        elif not self._asking:
            self._asking = True
            threading.Thread(target=self._ask, name="haulier-resolver", daemon=True).start()
        return self._last

    def _ask(self) -> None:
        answer: Where | Exception
        try:
            answer = _find(self.host, self.port)
        except _UNKNOWN as e:
            answer = e
        self._answer, self._asking = answer, False
        self._answered()


def _find(host: str, port: int, flags: int = 0) -> Where:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    return Where(family, address)
