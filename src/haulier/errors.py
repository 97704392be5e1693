"""The one tree of errors. A message says what happened, to which thing, and what to do next.

HaulierError                     1   anything haulier says on purpose
├── UsageError                   2   the call's words are off (also ValueError)
├── UnknownThing                 3   no such site, guest, image, handoff (also LookupError)
├── Conflict                     4   it exists already, or is busy with another handoff
├── Unsupported                  5   this QEMU, CPU, machine type or stream cannot be handed over
├── NoRoom                       6   memory, disk or a bound is too small
├── Corrupt                      7   bytes do not match their fingerprint, checksum or format
├── PeerError                    8   the other site cannot be reached, or answered wrongly
│   └── NotTrusted               9   certificate, token or signature refused
├── GuestError                  10   QEMU or the guest did not do what was asked
├── Cancelled                   11   the operator cancelled; the guest runs on at the source
└── HandoffFailed               12   the handoff failed; the message says where the guest runs

The number is the exit code of the command line, and travels in the control API as ``code``.
"""

from __future__ import annotations

from typing import Final

import msgspec

UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError)
"""What msgspec raises of bytes that are no message: for text that is not UTF-8 that is no error of its own."""


class HaulierError(Exception):
    """Base of everything haulier raises on purpose."""

    exit_code = 1


class UsageError(HaulierError, ValueError):
    """The call's words are off."""

    exit_code = 2


class UnknownThing(HaulierError, LookupError):
    """No such site, guest, image or handoff."""

    exit_code = 3


class Conflict(HaulierError):
    """It exists already, or is busy."""

    exit_code = 4


class Unsupported(HaulierError):
    """This QEMU, CPU, machine type or stream cannot be handed over."""

    exit_code = 5


class NoRoom(HaulierError):
    """Memory, disk or a bound is too small."""

    exit_code = 6


class Corrupt(HaulierError):
    """Bytes do not match their fingerprint, checksum or format."""

    exit_code = 7


class PeerError(HaulierError, ConnectionError):
    """The other site cannot be reached, or answered wrongly."""

    exit_code = 8


class NotTrusted(PeerError):
    """Certificate, token or signature refused."""

    exit_code = 9


class GuestError(HaulierError):
    """QEMU or the guest did not do what was asked."""

    exit_code = 10


class Cancelled(HaulierError):
    """The operator cancelled; the guest runs on at the source."""

    exit_code = 11


class HandoffFailed(HaulierError):
    """The handoff failed; the message says where the guest runs."""

    exit_code = 12


def by_code(code: int) -> type[HaulierError]:
    """The class whose exit code is `code`; HaulierError if there is none."""
    todo: list[type[HaulierError]] = [HaulierError]
    while todo:
        cls = todo.pop()
        if cls.exit_code == code:
            return cls
        todo.extend(cls.__subclasses__())
    return HaulierError
