"""For how long nothing has gone on: only while something is waited for, and somebody looks."""

from __future__ import annotations

from haulier.handoff.standstill import GAP_S, Standstill


def looks(still: Standstill, times: range, waits: bool = True, moved: int = 0) -> list[float]:
    return [still.note(1000.0 + second, waits, (moved,)) for second in times]


def test_time_counts_from_the_first_look_at_which_nothing_had_changed() -> None:
    still = Standstill()
    assert looks(still, range(4)) == [0, 1, 2, 3]
    assert looks(still, range(4, 7), moved=1) == [0, 1, 2]


def test_where_nothing_is_waited_for_none_counts() -> None:
    still = Standstill()
    looks(still, range(4))
    assert looks(still, range(4, 7), waits=False) == [0, 0, 0]
    assert looks(still, range(7, 9)) == [1, 2], "from when nothing was waited for the last time"


def test_time_in_which_nobody_looked_does_not_count() -> None:
    still = Standstill()
    looks(still, range(4))
    after = 4 + int(GAP_S)
    assert looks(still, range(after, after + 3)) == [0, 1, 2]
