"""Who may join a session: four frames at the start of each connection, as two small state machines.

    listener   -> CHALLENGE   version, nonce
    connector  -> HELLO       version, session id, path, own nonce, proof
    listener   -> WELCOME     its own proof          (or REFUSED code, text)

A proof is HMAC-SHA256 of everything both have said, keyed with the session's secret, with a label for each side
so that neither can be sent back as the other. TLS has shown by then which site the peer is; the proof shows that
it belongs to this very session.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from haulier.errors import Conflict, Corrupt, HaulierError, NotTrusted, PeerError, UsageError
from haulier.session.frames import MAGIC, VERSION, Frame, Kind, encode

NONCE: Final = 32
SESSION_ID: Final = 16
MAX_PATHS: Final = 16
LEAST_SECRET: Final = 16

_CHALLENGE: Final = struct.Struct(f"!8sH{NONCE}s")
_HELLO: Final = struct.Struct(f"!8sHB{SESSION_ID}s{NONCE}s32s")


class Refusal(IntEnum):
    """Why a listener sends a connection away; the flags of the session's fate hang on it."""

    VERSION = 1
    PROOF = 2
    OTHER_SESSION = 3
    ENDED = 4
    MALFORMED = 5


class Refused(HaulierError):
    """Carries a refusal up to the transport; `fatal` when dialling again cannot help. Never leaves the package."""

    def __init__(self, error: HaulierError, *, fatal: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.fatal = fatal


def session_of(secret: bytes) -> bytes:
    """The id of a session that began on a connection that was handed over: there no hello says one."""
    return hmac.digest(secret, b"session", hashlib.sha256)[:SESSION_ID]


def check_secret(secret: bytes) -> None:
    """UsageError unless the secret is long enough to be one."""
    if len(secret) < LEAST_SECRET:
        raise UsageError(
            f"a session secret of {len(secret)} bytes is too short: use at least {LEAST_SECRET} random bytes"
        )


def _proof(secret: bytes, label: bytes, session: bytes, path: int, theirs: bytes, ours: bytes) -> bytes:
    said = label + struct.pack("!HB", VERSION, path) + session + theirs + ours
    return hmac.digest(secret, said, hashlib.sha256)


def _text(payload: bytes) -> str:
    """A peer's words, safe to print."""
    return "".join(c if c.isprintable() else "?" for c in payload.decode("utf-8", "replace"))[:300]


@dataclass
class ConnectorHandshake:
    """The side that dialled. Feed frames until `done`."""

    secret: bytes
    session: bytes
    path: int
    nonce: bytes
    peer: str
    done: bool = False
    _challenge: bytes = b""

    def start(self) -> bytes:
        """The listener speaks first."""
        return b""

    def receive(self, frame: Frame) -> bytes:
        """The answer to `frame`; sets `done`. Raises Refused."""
        if frame.kind == Kind.REFUSED:
            raise self._refused(frame)
        if not self._challenge:
            if frame.kind != Kind.CHALLENGE or len(frame.payload) != _CHALLENGE.size:
                raise self._odd("a challenge")
            magic, version, self._challenge = _CHALLENGE.unpack(frame.payload)
            if magic != MAGIC:
                raise self._odd("a challenge")
            if version != VERSION:
                raise Refused(_other_version(self.peer, version), fatal=True)
            proof = _proof(self.secret, b"connector", self.session, self.path, self._challenge, self.nonce)
            return encode(Kind.HELLO, payload=_HELLO.pack(MAGIC, VERSION, self.path, self.session, self.nonce, proof))
        proof = _proof(self.secret, b"listener", self.session, self.path, self._challenge, self.nonce)
        if frame.kind != Kind.WELCOME:
            raise self._odd("a welcome")
        if not hmac.compare_digest(frame.payload, proof):
            raise Refused(
                NotTrusted(
                    f"{self.peer} does not know the secret of this session: it is another site's worker or "
                    "something in between; start the handoff again"
                ),
                fatal=True,
            )
        self.done = True
        return b""

    def _odd(self, wanted: str) -> Refused:
        return Refused(
            Corrupt(f"{self.peer} did not answer with {wanted}: check that this port belongs to haulier"), fatal=False
        )

    def _refused(self, frame: Frame) -> Refused:
        said = _text(frame.payload)
        match frame.number:
            case Refusal.PROOF:
                return Refused(
                    NotTrusted(f"{self.peer} refused the secret of this session ({said}): start the handoff again"),
                    fatal=True,
                )
            case Refusal.VERSION:
                error: HaulierError = PeerError(f"{self.peer}: {said}")
            case Refusal.OTHER_SESSION:
                error = Conflict(f"{self.peer} serves another session on this port ({said}): start the handoff again")
            case Refusal.ENDED:
                error = PeerError(f"{self.peer} has ended this session ({said}): start the handoff again")
            case _:
                error = PeerError(f"{self.peer} refused the connection: {said}")
        return Refused(error, fatal=frame.number in tuple(Refusal) and frame.number != Refusal.MALFORMED)


def _other_version(peer: str, version: int) -> PeerError:
    return PeerError(
        f"{peer} speaks version {version} of the bulk protocol, this site version {VERSION}: upgrade the older one"
    )


@dataclass
class ListenerHandshake:
    """The side that listens. `admit(session)` says why a proved session is not wanted, or None; feed until `done`."""

    secret: bytes
    nonce: bytes
    peer: str
    admit: Callable[[bytes], tuple[Refusal, str] | None]
    done: bool = False
    session: bytes = b""
    path: int = field(default=-1)
    answer: bytes = b""

    def start(self) -> bytes:
        """What to send as soon as TLS stands."""
        return encode(Kind.CHALLENGE, payload=_CHALLENGE.pack(MAGIC, VERSION, self.nonce))

    def receive(self, frame: Frame) -> bytes:
        """The answer to `frame`; sets `done`. Raises Refused with `answer` set to what the peer should be told."""
        payload = frame.payload
        if frame.kind != Kind.HELLO or len(payload) < 10 or not payload.startswith(MAGIC):
            raise self._refuse(Refusal.MALFORMED, "this is no hello of haulier", Corrupt)
        (version,) = struct.unpack_from("!H", payload, 8)
        if version != VERSION:
            text = f"this site speaks version {VERSION} of the bulk protocol, not {version}: upgrade the older one"
            raise self._refuse(Refusal.VERSION, text, PeerError)
        if len(payload) != _HELLO.size:
            raise self._refuse(Refusal.MALFORMED, f"a hello of {len(payload)} bytes", Corrupt)
        _, _, path, session, theirs, proof = _HELLO.unpack(payload)
        wanted = _proof(self.secret, b"connector", session, path, self.nonce, theirs)
        if not hmac.compare_digest(proof, wanted):
            raise self._refuse(Refusal.PROOF, "the proof does not fit this session's secret", NotTrusted)
        if path >= MAX_PATHS:
            raise self._refuse(Refusal.MALFORMED, f"path {path}, at most {MAX_PATHS - 1}", Corrupt)
        if (no := self.admit(session)) is not None:
            raise self._refuse(no[0], no[1], Conflict)
        self.session, self.path, self.done = session, path, True
        return encode(Kind.WELCOME, payload=_proof(self.secret, b"listener", session, path, self.nonce, theirs))

    def _refuse(self, code: Refusal, text: str, error: type[HaulierError]) -> Refused:
        self.answer = encode(Kind.REFUSED, number=int(code), payload=text.encode())
        return Refused(error(f"{self.peer} was sent away: {text}"), fatal=False)
