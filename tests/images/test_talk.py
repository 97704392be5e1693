"""One side's end of a push: what the other side may say, and what not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from haulier.errors import Corrupt, NoRoom, PeerError
from haulier.images import messages, talk
from haulier.images.messages import Failed, Part
from haulier.images.talk import Talk


class Line:
    """Stands for a session: hands over what is said, and hears nothing."""

    error = None
    over = False

    def __init__(self) -> None:
        self.take: Callable[[bytes], None] = lambda data: None

    def on(self, channel: int, take: Callable[[bytes], None]) -> None:
        assert channel == messages.CONTROL
        self.take = take


def made() -> tuple[Any, Talk]:
    line: Any = Line()
    return line, Talk(line, "lisbon", lambda: None)


def test_what_the_other_side_says_went_wrong_is_raised() -> None:
    line, end = made()
    line.take(messages.encode(Failed(text="full", code=NoRoom.exit_code)))
    with pytest.raises(NoRoom, match="at site 'lisbon': full"):
        end.next(Failed)


@pytest.mark.parametrize("text", ["full", "full" * 100_000])
def test_who_says_no_end_of_things_is_not_listened_to(text: str) -> None:
    line, end = made()
    said = messages.encode(Part(data=text.encode()))
    most = min(talk.MOST_WAITING, talk.MOST_WAITING_BYTES // len(said))
    for _ in range(most):
        line.take(said)
    assert end.next(Part).data == text.encode()
    for _ in range(2 * most):
        line.take(said)
    assert end._news.qsize() == most
    with pytest.raises(Corrupt, match="more than was asked"):
        end.next(Part)


def test_what_was_heard_makes_room() -> None:
    line, end = made()
    said = messages.encode(Part(data=bytes(messages.PART)))
    for _ in range(2 * talk.MOST_WAITING_BYTES // len(said)):
        line.take(said)
        assert len(end.next(Part).data) == messages.PART


def test_what_makes_no_sense_and_who_is_gone() -> None:
    line, end = made()
    line.take(b"\xff")
    with pytest.raises(Corrupt, match="makes no sense"):
        end.next(Failed)
    line.over = True
    with pytest.raises(PeerError, match="ended the push"):
        end.next(Failed)
