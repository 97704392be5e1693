"""The hello: who knows the secret gets in, nobody else does, and each side learns why."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haulier.errors import Conflict, Corrupt, NotTrusted, PeerError, UsageError
from haulier.session import handshake
from haulier.session.frames import MAGIC, Frame, FrameReader, Kind
from haulier.session.handshake import ConnectorHandshake, ListenerHandshake, Refusal, Refused, check_secret

SECRET = b"s" * 32
SESSION = b"i" * 16


def pair(theirs: bytes = SECRET, no: tuple[Refusal, str] | None = None) -> tuple[ConnectorHandshake, ListenerHandshake]:
    return (
        ConnectorHandshake(SECRET, SESSION, 2, b"c" * 32, "site lisbon"),
        ListenerHandshake(theirs, b"l" * 32, "site oslo", lambda session: no),
    )


def frame(data: bytes) -> Frame:
    (found,) = FrameReader().feed(data)
    return found


def test_who_knows_the_secret_gets_in() -> None:
    connector, listener = pair()
    assert connector.start() == b""
    hello = connector.receive(frame(listener.start()))
    welcome = listener.receive(frame(hello))
    assert listener.done
    assert (listener.session, listener.path) == (SESSION, 2)
    assert connector.receive(frame(welcome)) == b""
    assert connector.done


def test_a_wrong_secret_is_refused_and_said_so() -> None:
    connector, listener = pair(theirs=b"t" * 32)
    hello = connector.receive(frame(listener.start()))
    with pytest.raises(Refused) as listeners:
        listener.receive(frame(hello))
    assert isinstance(listeners.value.error, NotTrusted)
    with pytest.raises(Refused) as connectors:
        connector.receive(frame(listener.answer))
    assert isinstance(connectors.value.error, NotTrusted)
    assert connectors.value.fatal
    assert "refused the secret" in str(connectors.value.error)


def test_a_listener_without_the_secret_is_not_believed() -> None:
    connector, listener = pair()
    connector.receive(frame(listener.start()))
    with pytest.raises(Refused) as found:
        connector.receive(Frame(Kind.WELCOME, 0, 0, 0, bytes(32)))
    assert isinstance(found.value.error, NotTrusted)


def test_a_hello_cannot_be_used_twice() -> None:
    connector, listener = pair()
    hello = connector.receive(frame(listener.start()))
    other = ListenerHandshake(SECRET, b"m" * 32, "site oslo", lambda session: None)
    with pytest.raises(Refused):
        other.receive(frame(hello))


def test_a_proof_cannot_be_sent_back() -> None:
    """The listener's proof is no connector's proof, even over the same nonces."""
    said = (SECRET, b"connector", SESSION, 0, b"n" * 32, b"n" * 32)
    assert handshake._proof(*said) != handshake._proof(SECRET, b"listener", *said[2:])


@pytest.mark.parametrize(
    ("no", "error", "words"),
    [
        ((Refusal.OTHER_SESSION, "one is under way"), Conflict, "another session"),
        ((Refusal.ENDED, "it is over"), PeerError, "has ended"),
    ],
)
def test_a_session_that_is_not_wanted_is_told(no, error, words) -> None:
    connector, listener = pair(no=no)
    hello = connector.receive(frame(listener.start()))
    with pytest.raises(Refused):
        listener.receive(frame(hello))
    with pytest.raises(Refused) as found:
        connector.receive(frame(listener.answer))
    assert isinstance(found.value.error, error)
    assert words in str(found.value.error)
    assert found.value.fatal


def test_another_version_is_named_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    connector, listener = pair()
    challenge = frame(listener.start())
    newer = challenge._replace(payload=MAGIC + struct.pack("!H", 9) + challenge.payload[10:])
    with pytest.raises(Refused, match="version 9"):
        connector.receive(newer)
    hello = frame(pair()[0].receive(challenge))
    with pytest.raises(Refused, match="not 9"):
        listener.receive(hello._replace(payload=MAGIC + struct.pack("!H", 9) + hello.payload[10:]))
    with pytest.raises(Refused) as found:
        connector.receive(frame(listener.answer))
    assert "upgrade" in str(found.value.error)


@given(st.integers(1, 10), st.binary(max_size=120))
def test_no_bytes_get_in_or_crash(kind: int, payload: bytes) -> None:
    for one in pair():
        with pytest.raises(Refused) as found:
            one.receive(Frame(kind, 0, 0, 0, payload))
        assert isinstance(found.value.error, Corrupt | PeerError)
        assert not one.done


def test_what_a_stranger_says_is_made_printable() -> None:
    connector, _ = pair()
    with pytest.raises(Refused) as found:
        connector.receive(Frame(Kind.REFUSED, 0, 0, 77, b"\x1b[2Jboo\n"))
    assert "\x1b" not in str(found.value.error)
    assert "?[2Jboo?" in str(found.value.error)


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(UsageError, match="16"):
        check_secret(b"short")
