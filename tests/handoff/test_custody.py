"""The ownership table applied to a journal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from haulier.errors import HandoffFailed
from haulier.handoff.custody import happen, record_of
from haulier.handoff.journal import GuestRow, Journal
from haulier.handoff.ownership import Action, Event, Record, State


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.sqlite") as journal:
        yield journal


def owner(journal: Journal) -> None:
    journal.advance("web1", "absent", "owner", epoch=3, taken=3, owner="oslo", manifest="guest/web1", wanted="running")


def test_no_row_and_an_absent_row_are_the_same_record() -> None:
    assert record_of(None) == record_of(GuestRow("web1")) == Record()
    assert record_of(GuestRow("web1", state="ready", epoch=0, pending=4, last_epoch=4, taken=2)) == Record(
        State.READY, 0, 4, 4, 2
    )


def test_a_step_is_durable_with_the_changes_of_other_columns(journal: Journal, tmp_path: Path) -> None:
    owner(journal)
    happened = happen(journal, "web1", Event.BEGIN, decided=True, changes={"handoff": "h1"})
    assert happened.changed and happened.messages() == [(Event.OFFER, 4)]
    with Journal(tmp_path / "journal.sqlite") as other:
        row = other.guest("web1")
    assert row == happened.row
    assert (row.state, row.epoch, row.pending, row.last_epoch, row.taken, row.handoff) == ("offered", 3, 4, 4, 3, "h1")
    assert (row.owner, row.manifest, row.wanted) == ("oslo", "guest/web1", "running"), "nothing else changed"


def test_a_decision_without_a_row_in_the_table_is_refused_and_changes_nothing(journal: Journal) -> None:
    owner(journal)
    before = journal.guest("web1")
    with pytest.raises(HandoffFailed, match="'owner' here"):
        happen(journal, "web1", Event.GRANT, decided=True)
    with pytest.raises(HandoffFailed):
        happen(journal, "web2", Event.BEGIN, decided=True)
    assert journal.guest("web1") == before
    assert journal.find_guest("web2") is None


def test_a_late_message_changes_nothing_not_even_the_other_columns(journal: Journal) -> None:
    owner(journal)
    before = journal.guest("web1")
    happened = happen(journal, "web1", Event.TOOK, 3, changes={"owner": "lisbon", "wanted": ""})
    assert not happened.changed and not happened.actions
    assert journal.guest("web1") == before


def test_an_answer_without_a_change_still_goes_out(journal: Journal) -> None:
    owner(journal)
    # The token under which it came, once more: TOOK had been lost.
    happened = happen(journal, "web1", Event.TOKEN, 3, changes={"wanted": "stopped"})
    assert not happened.changed
    assert happened.messages() == [(Event.TOOK, 3)]
    assert journal.guest("web1").wanted == "running"


def test_a_guest_that_was_never_here_answers_too(journal: Journal) -> None:
    happened = happen(journal, "web9", Event.READY, 0)
    assert happened.row == GuestRow(name="web9")
    assert journal.find_guest("web9") is None


def test_the_whole_way_there(journal: Journal, tmp_path: Path) -> None:
    owner(journal)
    with Journal(tmp_path / "target.sqlite") as target:
        assert happen(journal, "web1", Event.BEGIN, decided=True).messages() == [(Event.OFFER, 4)]
        assert happen(target, "web1", Event.OFFER, 4).after.state is State.RECEIVING
        assert happen(target, "web1", Event.COMPLETE, decided=True).messages() == [(Event.READY, 4)]
        assert not happen(journal, "web1", Event.READY, 4).actions
        assert happen(journal, "web1", Event.GRANT, decided=True).messages() == [(Event.TOKEN, 4)]
        took = happen(target, "web1", Event.TOKEN, 4)
        assert took.actions == (Action.RUN_COPY, Action.SEND_TOOK) and took.messages() == [(Event.TOOK, 4)]
        gone = happen(journal, "web1", Event.TOOK, 4, changes={"owner": "lisbon"})
        assert gone.actions == (Action.RETIRE,) and gone.row.owner == "lisbon"
        assert (journal.guest("web1").state, target.guest("web1").state) == ("away", "owner")
        assert target.guest("web1").epoch == 4


def test_what_an_earlier_handoff_decides_is_nothing_to_a_later_one(journal: Journal) -> None:
    happen(journal, "web1", Event.OFFER, 4, changes={"handoff": "h1"})
    happened = happen(journal, "web1", Event.OFFER, 6, changes={"handoff": "h2"})
    assert happened.actions == (Action.DISCARD_COPY,)
    before = journal.guest("web1")
    late = happen(journal, "web1", Event.FAIL, handoff="h1")
    assert not late.changed and not late.actions, "its worker must not throw the new copy away"
    with pytest.raises(HandoffFailed, match="h2 came after"):
        happen(journal, "web1", Event.COMPLETE, decided=True, handoff="h1")
    assert journal.guest("web1") == before
    assert happen(journal, "web1", Event.COMPLETE, decided=True, handoff="h2").changed


def test_two_openers_cannot_both_take_one_step(journal: Journal, tmp_path: Path) -> None:
    owner(journal)
    happen(journal, "web1", Event.BEGIN, decided=True)
    with Journal(tmp_path / "journal.sqlite") as other:
        assert happen(other, "web1", Event.GRANT, decided=True).changed
        assert not happen(journal, "web1", Event.FAIL).changed
        assert journal.guest("web1").state == "granted"
